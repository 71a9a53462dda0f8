"""The bridge process: frames out once per tick, frames in as they come.

Two threads. One sends: it reads the segments of this host once per tick, and looks a few times in
between whether something has happened that others should hear at once. The other writes: it takes
from a queue what the engine's own threads put there. They share nothing but counters.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from shmcoord.bridge.config import BridgeConfig
from shmcoord.bridge.engine import Bridge, engine
from shmcoord.bridge.receiving import Receiver
from shmcoord.bridge.sending import Sender
from shmcoord.errors import ShmcoordError

__all__ = ["BridgeService", "Heard"]

_log = logging.getLogger("shmcoord.bridge")

# How often the sender looks for what cannot wait, in seconds: one scan of some load words.
_LOOK_EVERY_S = 0.01
# How often `run` looks whether a signal has come, in seconds.
_WAKE_EVERY_S = 0.2
# Frames that wait to be written; of more, the new ones are dropped (they are all alike, and after a
# burst it is the later ones, with new times, that count).
_WAITING_MOST = 4096


class Heard(NamedTuple):
    """What a bridge knows of one other host.

    Attributes:
        host: Its name.
        age_s: Since its last frame, in seconds; None: it was never heard.
        taken: Frames that were taken.
        dropped: Frames that were not, by the reason.
        nodes: Its nodes that are shown here.
    """

    host: str
    age_s: float | None
    taken: int
    dropped: dict[str, int]
    nodes: int


class _Came(NamedTuple):
    """One thing that the engine told us: a frame, or a hint (`frame` None)."""

    host: str
    at_ns: int
    frame: bytes | None
    up: bool = False


class _Inbox:
    """What the engine's threads tell; implements `shmcoord.bridge.engine.Listener`."""

    def __init__(self, greets: threading.Event) -> None:
        self.queue: queue.SimpleQueue[_Came | None] = queue.SimpleQueue()
        self.overflown = 0
        self._greets = greets

    def on_frame(self, host: str, frame: bytes) -> None:
        if self.queue.qsize() >= _WAITING_MOST:
            self.overflown += 1
            return
        self.queue.put(_Came(host, time.monotonic_ns(), frame))

    def on_host(self, host: str, up: bool) -> None:
        if up:
            self._greets.set()  # it knows nothing of us yet
        self.queue.put(_Came(host, time.monotonic_ns(), None, up))


class BridgeService:
    """One host's bridge.

    Args:
        config: See `shmcoord.bridge.config`.
        bridge: The engine; by default the one that the configuration names.

    `run` until `stop`, or `start` and `close` (a context manager).
    """

    def __init__(self, config: BridgeConfig, bridge: Bridge | None = None) -> None:
        self.config = config
        self._bridge = engine(config.engine)() if bridge is None else bridge
        self._greets = threading.Event()
        self._inbox = _Inbox(self._greets)
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []
        self._failed: BaseException | None = None
        own = config.own
        self._sender = Sender(config.host, own.segments, warns_of_local=not config.is_loopback)
        self._receiver = Receiver(
            config.host,
            {
                name: {segment: config.mirror_name(segment) for segment in other.segments}
                for name, other in config.others.items()
            },
            suspect_after_s=config.suspect_after_s,
            remove_after_s=config.remove_after_s,
            mode=config.mode,
        )
        self.sent = Counter[str]()

    def start(self) -> None:
        """Listen, send and write from now on, in threads."""
        self._bridge.start(self.config.engine_config(), self._inbox)
        for work in (self._send, self._write):
            thread = threading.Thread(
                target=self._guarded, args=(work,), name=f"bridge{work.__name__}", daemon=True
            )
            thread.start()
            self._threads.append(thread)

    def run(self) -> None:
        """Work until `stop`, then close.

        Raises:
            ShmcoordError: It could not begin, or could not go on.
        """
        self.start()
        try:
            # A signal may interrupt any thread, Zenoh's too; Python runs its handler in this one,
            # and only when it is awake.
            while not self._stopped.wait(_WAKE_EVERY_S):
                pass
        finally:
            self.close()
        if self._failed is not None:
            raise self._failed

    def stop(self) -> None:
        """End `run`; may be called from a signal handler, and from any thread."""
        self._stopped.set()

    def close(self) -> None:
        """End the threads, leave the mirrors, end the engine. Does nothing the second time."""
        self._stopped.set()
        self._inbox.queue.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []
        self._bridge.stop()
        self._receiver.close()
        self._sender.close()

    def heard(self) -> list[Heard]:
        """Return what is known of each other host."""
        now = time.monotonic_ns()
        return [
            Heard(
                name,
                None if peer.heard_ns is None else (now - peer.heard_ns) / 1e9,
                peer.arrivals.taken,
                {**peer.arrivals.dropped, "wrong": peer.wrong},
                sum(len(kept.mirror.nodes) for kept in list(peer.mirrors.values())),
            )
            for name, peer in self._receiver.peers.items()
        ]

    # --- the two threads

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - `run` raises it
            _log.exception("the bridge cannot go on")
            self._failed = error
            self._stopped.set()

    def _send(self) -> None:
        tick_s, full_s = self.config.tick_s, self.config.full_s
        now = time.monotonic()
        next_tick = next_full = now
        while not self._stopped.wait(min(max(next_tick - now, 0.0), _LOOK_EVERY_S)):
            now = time.monotonic()
            greets = self._greets.is_set()
            if greets or self._sender.moved():
                self._greets.clear()
                full = True
            elif now >= next_tick:
                full = now >= next_full
            else:
                continue
            self._publish(full=full)
            if full:
                next_full = now + full_s
            if now >= next_tick:
                next_tick += tick_s
                if next_tick <= now:  # we were stopped for long: no burst
                    next_tick = now + tick_s

    def _publish(self, *, full: bool) -> None:
        frame = self._sender.frame(full=full)
        self.sent["frames"] += 1
        self.sent["bytes"] += len(frame)
        if not self._bridge.publish(frame):
            self.sent["dropped"] += 1

    def _write(self) -> None:
        receiver = self._receiver
        while True:
            try:
                came = self._inbox.queue.get(timeout=1.0)
            except queue.Empty:
                pass
            else:
                if came is None:
                    return
                if came.frame is None:
                    receiver.hint(came.host, came.up)
                else:
                    receiver.take(came.host, came.frame, came.at_ns)
            receiver.look_after(time.monotonic_ns())

    def __enter__(self) -> BridgeService:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def check(config: BridgeConfig) -> None:
    """Refuse a configuration that no bridge can keep.

    Raises:
        ShmcoordError: Two hosts would be counted as one, or the engine is not installed.
    """
    from shmcoord.origin import host_id

    numbers: dict[int, str] = {}
    for name in config.hosts:
        other = numbers.setdefault(host_id(name), name)
        if other != name:
            raise ShmcoordError(
                f"hosts {other} and {name} have the same number; rename one of them"
            )
    engine(config.engine)
