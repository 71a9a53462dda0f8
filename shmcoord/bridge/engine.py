"""What carries frames between hosts: the protocol of an engine, and how one is found.

An engine moves opaque bytes from each host to all others and guesses who is there. It knows nothing
of segments. Another one (NATS, Redis) is a class with these methods and an entry point of the group
`shmcoord.bridges`; docs/bridges.md shows how.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol, cast

from shmcoord.errors import ShmcoordError

__all__ = [
    "Bridge",
    "EngineConfig",
    "EngineError",
    "EngineNotFound",
    "LinkState",
    "Listener",
    "Tls",
    "engine",
]

ENTRY_POINTS = "shmcoord.bridges"


class EngineError(ShmcoordError):
    """The engine could not begin: an address is taken, a certificate is wrong."""


class EngineNotFound(ShmcoordError):
    """No engine of that name is installed."""


class Listener(Protocol):
    """Who is told what came: from any thread of the engine; returns at once, never raises."""

    def on_frame(self, host: str, frame: bytes) -> None:
        """Take a frame; `host` is who sent it, as the engine made sure, not as the frame says."""

    def on_host(self, host: str, up: bool) -> None:
        """Take a hint that a host came or went. The age of its frames is what counts."""


@dataclass(frozen=True)
class Tls:
    """The PEM files of mutual TLS: whom to trust, and who we are."""

    ca: Path
    certificate: Path
    key: Path


@dataclass(frozen=True)
class EngineConfig:
    """What an engine is told at its start.

    Attributes:
        host: Our name.
        realm: Bridges of other realms are not heard.
        listen: Where we listen, as `tls/ADDRESS:PORT` or `tcp/ADDRESS:PORT`.
        connect: Where those listen to whom we connect: of two hosts the first by name connects.
        hosts: The names of all others; nobody else may speak, and each only for itself.
        tls: None: without.
        lease_s: A peer silent for so long is taken for gone, in seconds.
        insecure: Whether addresses that others can reach may go without TLS.
        settings: What else an engine wants to know, as the file has it.
    """

    host: str
    realm: str
    listen: tuple[str, ...]
    connect: tuple[str, ...]
    hosts: tuple[str, ...]
    tls: Tls | None = None
    lease_s: float = 1.0
    insecure: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LinkState:
    """What an engine believes of its links.

    Attributes:
        connected: Hosts that seem to be there.
        dropped: Frames that were not sent.
        detail: For people.
    """

    connected: frozenset[str]
    dropped: int
    detail: str


class Bridge(Protocol):
    """An engine."""

    def start(self, config: EngineConfig, listener: Listener) -> None:
        """Listen; return once that is so, and connect in the background, for ever.

        Raises:
            EngineError: It cannot.
        """

    def publish(self, frame: bytes) -> bool:
        """Send to all that are there, without ever blocking; False if it was dropped."""
        ...

    def links(self) -> LinkState:
        """Tell what it believes of its links."""
        ...

    def stop(self) -> None:
        """End in bounded time, leaving no thread and no file. Does nothing the second time."""


def engine(name: str) -> Callable[[], Bridge]:
    """Return what makes an engine, by its name.

    Raises:
        EngineNotFound: None of that name is installed, or it cannot be loaded.
    """
    found = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
    if name not in found:
        there = ", ".join(sorted(found)) or "none"
        raise EngineNotFound(f"no bridge engine {name!r} is installed; there are {there}")
    try:
        return cast("Callable[[], Bridge]", found[name].load())
    except (ImportError, AttributeError) as error:
        ours = found[name].module.partition(".")[0] == "shmcoord"
        advice = ": pip install shmcoord[bridge]" if ours else f" ({found[name].value})"
        raise EngineNotFound(
            f"the bridge engine {name!r} cannot be loaded: {error}{advice}"
        ) from error
