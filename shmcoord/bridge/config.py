"""`bridge.toml`: the hosts, what each tells, and how they reach each other."""

from __future__ import annotations

import importlib
import re
import socket
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from shmcoord.bridge.endpoints import NAME, endpoint_problem, is_loopback
from shmcoord.bridge.engine import EngineConfig, Tls
from shmcoord.errors import ShmcoordError

__all__ = ["BridgeConfig", "BridgeConfigError", "HostConfig", "load", "parse"]

# The standard library has it from 3.11 on.
_toml: Any = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

# Not `$`, which would let a line feed follow.
_HOST = rf"^{NAME.pattern}\Z"
_SEGMENT = r"^[A-Za-z0-9_.-]{1,64}\Z"

# Engines whose addresses are checked here; others check what they are told themselves.
_OURS = ("memory", "zenoh")

_Seconds = Annotated[float, msgspec.Meta(gt=0, le=86400)]
_Segment = Annotated[str, msgspec.Meta(pattern=_SEGMENT)]


class BridgeConfigError(ShmcoordError, ValueError):
    """The configuration cannot be used; the message names the file, the key and what to do."""


class HostConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One host.

    Attributes:
        listen: Where its bridge listens: `tls/ADDRESS:PORT`, or `tcp/ADDRESS:PORT`. An engine of
            others may understand something else, or need nothing.
        segments: Its segments that the others mirror.
    """

    listen: tuple[str, ...] = ()
    segments: tuple[_Segment, ...] = ()


class TlsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The PEM files, relative to the configuration; `{host}` stands for the host's name."""

    ca: str
    certificate: str
    key: str


class BridgeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole configuration, as one host reads it.

    Attributes:
        hosts: All hosts by name, this one among them.
        host: Which of them this is.
        realm: Bridges of other realms are not heard.
        engine: Name of what carries the frames, see `shmcoord.bridge.engine`.
        tick_s: Time between two frames, in seconds.
        full_s: Time between two frames that name everybody, in seconds.
        suspect_after_s: News older than this makes the nodes SUSPECT, in seconds.
        remove_after_s: A host silent so long leaves its mirrors, if others are heard, in seconds.
        mirror: Name of a mirror on this host; `{segment}` and `{host}` (this one) are replaced.
        mode: Permission bits of the mirrors.
        insecure: Whether addresses that others can reach may go without TLS.
        tls: The certificates.
        settings: What else the engine wants to know.
        folder: What the paths are relative to.
    """

    hosts: dict[Annotated[str, msgspec.Meta(pattern=_HOST)], HostConfig]
    host: str = ""
    realm: Annotated[str, msgspec.Meta(pattern=_HOST)] = "shmcoord"
    engine: Annotated[str, msgspec.Meta(min_length=1)] = "zenoh"
    tick_s: Annotated[float, msgspec.Meta(ge=0.005, le=10)] = 0.05
    full_s: _Seconds = 1.0
    suspect_after_s: Annotated[float, msgspec.Meta(ge=0.02, le=3600)] = 0.25
    remove_after_s: _Seconds = 30.0
    mirror: str = "{segment}"
    mode: Annotated[int, msgspec.Meta(ge=0o600, le=0o777)] = 0o600
    insecure: bool = False
    tls: TlsConfig | None = None
    settings: dict[str, str] = {}
    folder: str = "."

    @property
    def own(self) -> HostConfig:
        """This host."""
        return self.hosts[self.host]

    @property
    def others(self) -> dict[str, HostConfig]:
        """All other hosts."""
        return {name: host for name, host in self.hosts.items() if name != self.host}

    @property
    def is_loopback(self) -> bool:
        """Whether all hosts are this machine."""
        known = [at for host in self.hosts.values() for at in host.listen]
        return bool(known) and all(map(is_loopback, known))

    def mirror_name(self, segment: str) -> str:
        """Return the name that a mirror of a segment has on this host."""
        return self.mirror.replace("{segment}", segment).replace("{host}", self.host)

    def engine_config(self) -> EngineConfig:
        """Return what the engine is told."""
        tls = None
        if self.tls is not None:
            tls = Tls(*(self._path(text) for text in msgspec.structs.astuple(self.tls)))
        return EngineConfig(
            host=self.host,
            realm=self.realm,
            listen=self.own.listen,
            connect=tuple(
                at for name, other in self.others.items() if name > self.host for at in other.listen
            ),
            hosts=tuple(self.others),
            tls=tls,
            insecure=self.insecure,
            settings=self.settings,
        )

    def _path(self, text: str) -> Path:
        return Path(self.folder) / text.replace("{host}", self.host)


def load(file: Path, *, host: str | None = None) -> BridgeConfig:
    """Read and check a file.

    Args:
        file: The TOML file.
        host: Which of its hosts this is; by default what it says, or the machine's name.

    Raises:
        BridgeConfigError: It cannot be read, or is wrong.
    """
    try:
        raw = _toml.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BridgeConfigError(f"{file}: {error.strerror}") from None
    except (ValueError, UnicodeDecodeError) as error:  # of which TOMLDecodeError is one
        raise BridgeConfigError(f"{file}: not TOML: {error}") from None
    if "folder" in raw:
        raise BridgeConfigError(f"{file}: unknown key `folder`")
    return parse({**raw, "folder": str(file.resolve().parent)}, host=host, source=str(file))


def parse(raw: Mapping[str, Any], *, host: str | None = None, source: str) -> BridgeConfig:
    """Check a configuration that was read already; `source` is named in errors."""
    try:
        config = msgspec.convert(dict(raw), BridgeConfig)
    except msgspec.ValidationError as error:
        raise BridgeConfigError(f"{source}: {error}") from None
    name = host or config.host or socket.gethostname().partition(".")[0]
    if name not in config.hosts:
        raise BridgeConfigError(
            f"{source}: this host is {name!r}, and the hosts are {', '.join(config.hosts)}; say "
            "which it is: --host, or `host` in the file"
        )
    config = msgspec.structs.replace(config, host=name)
    problems = [f"{source}: {problem}" for problem in _problems(config)]
    if problems:
        raise BridgeConfigError("\n".join(problems))
    return config


def _problems(config: BridgeConfig) -> list[str]:
    found = []
    owners: dict[str, str] = {}
    listeners: dict[str, str] = {}
    for name, host in config.hosts.items():
        if config.engine in _OURS:
            if not host.listen:
                found.append(f"hosts.{name}.listen: where does its bridge listen?")
            for at in host.listen:
                problem = endpoint_problem(
                    at, has_tls=config.tls is not None, insecure=config.insecure
                )
                if problem is not None:
                    found.append(f"hosts.{name}.listen: {problem}")
                listener = listeners.setdefault(at, name)
                if listener != name:
                    found.append(f"hosts.{name}.listen: host {listener} listens on {at!r} already")
        for segment in host.segments:
            owner = owners.setdefault(segment, name)
            if owner != name:
                found.append(f"hosts.{name}.segments: {segment} is of host {owner} already")
    if "{segment}" not in config.mirror:
        found.append("mirror: it needs {segment}, or all mirrors have one name")
    else:
        mirrors = [config.mirror_name(segment) for segment in owners]
        found += [
            f"mirror: {mirror!r} is no name for a segment"
            for mirror in mirrors
            if not re.match(_SEGMENT, mirror)
        ]
        found += [
            f"mirror: {segment} would have the name of a segment of this host"
            for segment, owner in owners.items()
            if owner != config.host and config.mirror_name(segment) in config.own.segments
        ]
    if config.suspect_after_s < 2 * config.tick_s:
        found.append(
            f"suspect_after_s: {config.suspect_after_s:g} is less than two ticks "
            f"({config.tick_s:g} s): one late frame would put all nodes out of routing"
        )
    if config.mode & 0o600 != 0o600:
        found.append(f"mode: {config.mode:#o} lacks 0600")
    if config.tls is not None:
        found += _file_problems(config)
    return found


def _file_problems(config: BridgeConfig) -> list[str]:
    tls = config.engine_config().tls
    assert tls is not None
    found = []
    for key, path in (("ca", tls.ca), ("certificate", tls.certificate), ("key", tls.key)):
        try:
            with path.open("rb") as file:
                if not file.read(1):
                    found.append(f"tls.{key}: {path} is empty")
        except OSError as error:
            found.append(f"tls.{key}: {path}: {error.strerror}")
            continue
        if key == "key" and stat.S_IMODE(path.stat().st_mode) & 0o077:
            found.append(f"tls.key: others may read {path}: chmod 600 it")
    return found
