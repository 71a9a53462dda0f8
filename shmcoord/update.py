"""The Python side of the heartbeat: one daemon thread per process that refreshes its nodes.

The native beat thread shows that the process exists; this one shows that Python runs in it (it
needs the GIL), and takes the opportunity to publish memory, CPU and the rest of the record.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import threading
import time
import weakref

TYPE_CHECKING = False  # what typing has under this name; typing itself costs a third of a MiB
if TYPE_CHECKING:
    from typing import Any, Protocol
else:
    Protocol = object

_log = logging.getLogger("shmcoord.update")


class Refreshable(Protocol):
    """What the thread needs of a node."""

    name: str
    interval_s: float
    left: bool

    def refresh(self) -> None:
        """Publish the metrics of this moment."""


class _Sampler:
    """Resident memory and CPU of this process, by psutil; sampled at most every 50 ms."""

    def __init__(self) -> None:
        import psutil

        self._process = psutil.Process()
        self._process.cpu_percent()
        self._sampled_at = float("-inf")
        self._last = (0, 0.0)
        self._lock = threading.RLock()  # a signal handler may sample inside of a sample

    def sample(self) -> tuple[int, float]:
        """Resident memory in bytes, and CPU in percent of one core since the sample before."""
        with self._lock:
            now = time.monotonic()
            if now - self._sampled_at > 0.05:
                with self._process.oneshot():
                    self._last = (
                        self._process.memory_info().rss,
                        self._process.cpu_percent(),
                    )
                self._sampled_at = now
            return self._last


class _UpdateThread:
    """Runs `refresh` of every registered node once per its interval."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._due: list[tuple[float, int, weakref.ref[Any]]] = []
        self._count = itertools.count()
        self._thread: threading.Thread | None = None

    def add(self, node: Refreshable) -> None:
        with self._changed:
            entry = (time.monotonic() + node.interval_s, next(self._count), weakref.ref(node))
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="shmcoord-update", daemon=True)
                thread.start()
                self._thread = thread
                _log.info("update thread started (every %g s)", node.interval_s)
            heapq.heappush(self._due, entry)
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                now = time.monotonic()
                while not self._due or self._due[0][0] > now:
                    self._changed.wait(self._due[0][0] - now if self._due else None)
                    now = time.monotonic()
                _, order, ref = heapq.heappop(self._due)
            node = ref()
            if node is not None and self._refresh(node):
                with self._changed:
                    heapq.heappush(self._due, (now + node.interval_s, order, ref))
            del node  # or this thread would keep the last node alive while it waits

    @staticmethod
    def _refresh(node: Refreshable) -> bool:
        """Refresh one node; whether it is still to be refreshed later."""
        try:
            node.refresh()
        except Exception:  # noqa: BLE001 - one bad sample must not end all heartbeats
            if not node.left:
                _log.exception("metrics of node %s could not be published", node.name)
        return not node.left


_sampler: _Sampler | None = None
_updates = _UpdateThread()


def sample() -> tuple[int, float]:
    """Resident memory (bytes) and CPU (percent of one core) of this process."""
    global _sampler
    if _sampler is None:
        _sampler = _Sampler()
    return _sampler.sample()


def add(node: Refreshable) -> None:
    """Refresh a node once per interval until it leaves or is collected."""
    _updates.add(node)


def _after_fork() -> None:
    """The child has neither the thread nor the nodes."""
    global _sampler, _updates
    _sampler = None
    _updates = _UpdateThread()


os.register_at_fork(after_in_child=_after_fork)
