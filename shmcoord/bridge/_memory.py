"""An engine within one process, for tests: every fault of a network at the push of a button."""

from __future__ import annotations

import threading
from collections import defaultdict

from shmcoord.bridge.engine import EngineConfig, EngineError, LinkState, Listener

__all__ = ["Hub", "MemoryBridge", "hub"]


class Hub:
    """The network of one realm. Frames are handed over in the publisher's thread."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._listeners: dict[str, Listener] = {}
        self._cut: set[frozenset[str]] = set()
        self._frozen: set[str] = set()
        self._kept: defaultdict[str, list[tuple[str, bytes]]] = defaultdict(list)

    def join(self, host: str, listener: Listener) -> None:
        """Come in."""
        with self._lock:
            if host in self._listeners:
                raise EngineError(f"host {host} is there already")
            self._listeners[host] = listener
            self._tell(host, up=True)
            for other in self._reached_by(host):
                listener.on_host(other, True)

    def leave(self, host: str, *, listener: Listener | None = None) -> None:
        """Go, or be killed: the others are told at once."""
        with self._lock:
            if listener is not None and self._listeners.get(host) is not listener:
                return
            if self._listeners.pop(host, None) is not None:
                self._tell(host, up=False)
            self._frozen.discard(host)
            self._kept.pop(host, None)

    def send(self, host: str, frame: bytes) -> None:
        """Hand a frame to everybody who can be reached."""
        with self._lock:
            if host in self._frozen or host not in self._listeners:
                return
            for other in self._reached_by(host):
                if other in self._frozen:
                    self._kept[other].append((host, frame))
                else:
                    self._listeners[other].on_frame(host, frame)

    def reached_by(self, host: str) -> frozenset[str]:
        """Return who can be reached."""
        with self._lock:
            return frozenset(self._reached_by(host))

    def cut(self, one: str, other: str) -> None:
        """Cut the link between two hosts: both find the other gone."""
        with self._lock:
            self._cut.add(frozenset((one, other)))
            self._hint(one, other, up=False)

    def heal(self, one: str, other: str) -> None:
        """Mend the link."""
        with self._lock:
            self._cut.discard(frozenset((one, other)))
            self._hint(one, other, up=True)

    def freeze(self, host: str) -> None:
        """Stop a host without anybody being told: what it says is lost, what it is told waits."""
        with self._lock:
            self._frozen.add(host)

    def thaw(self, host: str) -> None:
        """Let it go on: it gets all that has waited, at once."""
        with self._lock:
            self._frozen.discard(host)
            for sender, frame in self._kept.pop(host, []):
                self._listeners[host].on_frame(sender, frame)

    def inject(self, sender: str, receiver: str, frame: bytes) -> None:
        """Hand over a frame that was not sent now: a repeated one, an old one, a forged one."""
        with self._lock:
            self._listeners[receiver].on_frame(sender, frame)

    def _reached_by(self, host: str) -> list[str]:
        return [
            other
            for other in self._listeners
            if other != host and frozenset((host, other)) not in self._cut
        ]

    def _tell(self, host: str, *, up: bool) -> None:
        for other in self._reached_by(host):
            self._listeners[other].on_host(host, up)

    def _hint(self, one: str, other: str, *, up: bool) -> None:
        for host, about in ((one, other), (other, one)):
            if host in self._listeners and about in self._listeners:
                self._listeners[host].on_host(about, up)


_hubs: defaultdict[str, Hub] = defaultdict(Hub)


def hub(realm: str) -> Hub:
    """Return the network of a realm."""
    return _hubs[realm]


class MemoryBridge:
    """Carries frames within this process."""

    def __init__(self) -> None:
        self._host = ""
        self._hub: Hub | None = None
        self._listener: Listener | None = None

    def start(self, config: EngineConfig, listener: Listener) -> None:
        """Join the hub of the realm."""
        self._host, self._listener = config.host, listener
        self._hub = hub(config.realm)
        self._hub.join(config.host, listener)

    def publish(self, frame: bytes) -> bool:
        """Hand it over."""
        if self._hub is None:
            return False
        self._hub.send(self._host, frame)
        return True

    def links(self) -> LinkState:
        """Tell who can be reached."""
        there = frozenset() if self._hub is None else self._hub.reached_by(self._host)
        return LinkState(there, 0, "in this process")

    def stop(self) -> None:
        """Leave."""
        if self._hub is not None:
            self._hub.leave(self._host, listener=self._listener)
            self._hub = None
