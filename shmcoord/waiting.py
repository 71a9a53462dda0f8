"""Waiting for capacity: one thread per router, a first-come queue, no polling.

Whoever waits, on a thread or on an event loop, puts a `Future` into the queue. One native thread
sleeps on the segments' release words (futexes that a release moves only while somebody waits) and
serves the queue in order whenever something was released.
"""

from __future__ import annotations

import collections
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

__all__ = ["WaitQueue"]

_log = logging.getLogger("shmcoord.waiting")
T = TypeVar("T")

# A releaser that dies between freeing and waking would lose a wake-up; so does a node or a router
# that dies while it holds leases. After this long somebody looks again.
LOST_WAKEUP_S = 0.25


class _Waiter(Generic[T]):
    """One caller in the queue."""

    def __init__(self, group: str, attempt: Callable[[], T | None], deadline: float) -> None:
        self.group = group
        self.attempt = attempt
        self.deadline = deadline
        self.future: Future[T | None] = Future()


class WaitQueue(Generic[T]):
    """Callers that wait until their attempt succeeds, first come first served per group.

    No release is missed: `begin` counts this router among the waiting before anybody is served,
    a ticket is taken before each round, and `sleep` returns at once if something was released
    since. A caller who arrives behind nobody tries once more himself after he has queued; one who
    arrives behind another is served by the thread, which looks for late arrivals before it sleeps.

    Args:
        begin: counts this router among those to wake.
        ticket: the state of the release words now.
        sleep: blocks until something was released since the ticket, or for the given seconds.
        end: the reverse of `begin`.
        undo: gives back a result that nobody takes any more.
        wake: ends a `sleep` that has begun.
    """

    def __init__(
        self,
        begin: Callable[[], object],
        ticket: Callable[[], object],
        sleep: Callable[[object, float], object],
        end: Callable[[], object],
        undo: Callable[[T], object],
        wake: Callable[[], object] = lambda: None,
    ) -> None:
        self._begin = begin
        self._ticket = ticket
        self._sleep = sleep
        self._end = end
        self._undo = undo
        self._wake = wake
        self._asleep_until = float("-inf")
        self._lock = threading.Lock()
        self._waiters: collections.deque[_Waiter[T]] = collections.deque()
        self._arrivals = 0
        self._thread: threading.Thread | None = None
        self._closed = False

    def is_ahead(self, group: str) -> bool:
        """Whether somebody waits for this group already: a new arrival goes behind them."""
        if not self._waiters:  # the usual case, without the lock
            return False
        with self._lock:
            return self._is_ahead(group)

    def _is_ahead(self, group: str) -> bool:
        return any(
            waiter.group == group and not waiter.future.cancelled() for waiter in self._waiters
        )

    def put(
        self, group: str, attempt: Callable[[], T | None], timeout_s: float
    ) -> Future[T | None]:
        """Join the queue; the future gets the result, None at the time-out, or the error.

        Cancelling the future leaves the queue.
        """
        waiter = _Waiter(group, attempt, time.monotonic() + timeout_s)
        with self._lock:
            if self._closed:
                raise ValueError("the router is closed")
            first = not self._is_ahead(group)
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="shmcoord-waiting", daemon=True)
                thread.start()  # may fail; it waits for our lock before it looks at the queue
                self._thread = thread
            self._waiters.append(waiter)
            self._arrivals += 1
            early = waiter.deadline < self._asleep_until
        if first:
            self._try(waiter)
        if early:  # or his time-out would pass unnoticed until somebody else's
            self._wake()
        return waiter.future

    def close(self) -> None:
        """Everybody's wait ends, as at the time-out."""
        with self._lock:
            self._closed = True
            waiters = list(self._waiters)
            self._waiters.clear()
        for waiter in waiters:
            self._finish(waiter, None)

    def _run(self) -> None:
        begun = False
        try:
            self._begin()
            begun = True
            while True:
                ticket = self._ticket()
                self._serve()
                with self._lock:
                    if not self._waiters:
                        # Under the lock, or the next thread's begin could come before our end.
                        begun = False
                        self._end()
                        self._thread = None
                        return
                    now = time.monotonic()
                    until = min(waiter.deadline for waiter in self._waiters)
                    self._asleep_until = until = min(until, now + LOST_WAKEUP_S)
                self._sleep(ticket, max(until - now, 0.0))
                self._asleep_until = float("-inf")
        except BaseException as error:  # noqa: BLE001 - everybody who waits must learn of it
            with self._lock:
                if begun:
                    self._end()
                self._thread = None
                closed = self._closed
                waiters = list(self._waiters)
                self._waiters.clear()
            for waiter in waiters:
                self._fail(waiter, error)
            if not closed:  # where the router was closed meanwhile, that is all there is to it
                _log.exception("waiting for capacity ended")

    def _serve(self) -> None:
        """Let everybody try once, in order; behind one who fails, the others of his group wait."""
        while True:
            with self._lock:
                waiters = list(self._waiters)
                arrivals = self._arrivals
            stuck: set[str] = set()
            for waiter in waiters:
                if waiter.future.cancelled():
                    self._remove(waiter)
                elif waiter.group not in stuck and not self._try(waiter):
                    stuck.add(waiter.group)
                if time.monotonic() >= waiter.deadline and self._remove(waiter):
                    self._finish(waiter, None)
            with self._lock:
                if arrivals == self._arrivals:
                    return

    def _try(self, waiter: _Waiter[T]) -> bool:
        """One attempt; whether the waiter is done with (served, failed or gone)."""
        try:
            result = waiter.attempt()
        except Exception as error:  # noqa: BLE001 - it belongs to the caller who waits
            if self._remove(waiter):
                self._fail(waiter, error)
            return True
        if result is None:
            return False
        if self._remove(waiter):
            self._finish(waiter, result)
        else:  # the other thread has just served him
            self._undo(result)
        return True

    def _remove(self, waiter: _Waiter[T]) -> bool:
        """Take a waiter out; False if somebody else has done so: he then answers for it."""
        with self._lock:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
                return True
            return False

    def _finish(self, waiter: _Waiter[T], result: T | None) -> None:
        if waiter.future.set_running_or_notify_cancel():
            waiter.future.set_result(result)
        elif result is not None:
            self._undo(result)

    @staticmethod
    def _fail(waiter: _Waiter[T], error: BaseException) -> None:
        if waiter.future.set_running_or_notify_cancel():
            waiter.future.set_exception(error)
