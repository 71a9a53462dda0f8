"""Waiting for capacity: a first-come queue per group, no polling.

Whoever waits, on a thread or on an event loop, stands in the queue of his group. When somebody
frees a cell and tells this router so (`turns.pyx`), the queues are served in order: by the event
loop itself, which a doorbell wakes (`doorbell.pyx`), or by one thread, if threads wait. Between the
routers of all processes the one whose caller waits longest is told; callers of one router are
served strictly in order.
"""

from __future__ import annotations

import collections
import contextlib
import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar

from shmcoord.waiters import LoopSide, LoopWaiter, ThreadWaiter, Waiter, WakeUps

if TYPE_CHECKING:
    import asyncio

__all__ = ["LOST_WAKEUP_S", "WaitQueue"]

_log = logging.getLogger("shmcoord.waiting")
T = TypeVar("T")

# Who was told of a free cell and dies before he takes it has taken the wake-up with him; and nobody
# is told of a cell whose owner was killed. After this long everybody who waits looks by himself.
LOST_WAKEUP_S = 0.05
# The thread stays this long after the last caller was served: starting one costs 0.1 ms.
LINGER_S = 2.0


class WaitQueue(Generic[T]):
    """Callers that wait until their attempt succeeds, first come first served per group.

    No release is missed: a caller's turn is published before he looks a last time, and whoever
    frees a cell looks at the turns after that. A caller who arrives behind nobody of his own router
    looks himself, right after he has queued; the others are served by the thread.

    Args:
        wake_ups: the router's `Turns`.
        undo: gives back a result that nobody takes any more.
        pass_on: called with a group that has nobody waiting here any more after this router was,
            or may have been, told of a free cell: tells the next router if one is left. None
            stands for all groups.
        most: callers that may wait at once.
    """

    def __init__(
        self,
        wake_ups: WakeUps,
        undo: Callable[[T], object],
        pass_on: Callable[[str | None], object],
        most: int = 1024,
    ) -> None:
        self.wake_ups = wake_ups
        self._undo = undo
        self._pass_on = pass_on
        self._most = most
        self._lock = threading.RLock()  # a signal handler may come here while we hold it
        self._arrived = threading.Condition(self._lock)
        self._queues: dict[str, collections.deque[Waiter[T]]] = {}
        self._deadlines: list[tuple[float, int, Waiter[T]]] = []
        self._order = itertools.count()
        self._count = 0
        self._on_threads = 0
        self._begun = False
        self._asleep_until = float("-inf")
        self._thread: threading.Thread | None = None
        self._sides: dict[asyncio.AbstractEventLoop, LoopSide] = {}
        self._closed = False

    @property
    def net_s(self) -> float:
        """After how long everybody who waits looks by himself."""
        return LOST_WAKEUP_S

    @property
    def linger_s(self) -> float:
        """How long what serves stays after the last caller."""
        return LINGER_S

    def ahead(self, group: str) -> int:
        """How many callers of this router wait for the group: a new one goes behind them."""
        queue = self._queues.get(group)  # without the lock: the usual case is that nobody waits
        if not queue:
            return 0
        with self._lock:
            return sum(not waiter.is_gone() for waiter in queue)

    def has_ahead(self, group: str) -> bool:
        """Whether a new caller goes behind somebody."""
        queue = self._queues.get(group)
        if not queue:
            return False
        with self._lock:
            return any(not waiter.is_gone() for waiter in queue)

    def put(
        self, group: str, group_hash: int, attempt: Callable[[], T | None], timeout_s: float
    ) -> ThreadWaiter[T] | None:
        """Join the queue from a thread; None if too many wait.

        `future` gets the result, None at the time-out, or the error.
        """
        waiter = ThreadWaiter[T](
            group, group_hash, attempt, time.monotonic() + timeout_s, self.wake_ups.tickets()
        )
        return waiter if self._enqueue(waiter) else None

    def put_async(
        self, group: str, group_hash: int, attempt: Callable[[], T | None], timeout_s: float
    ) -> LoopWaiter[T] | None:
        """`put` for the running event loop; `leave` if the task is cancelled."""
        import asyncio

        loop = asyncio.get_running_loop()
        side = self._sides.get(loop)
        if side is None:
            for other in list(self._sides.values()):
                if other.loop.is_closed():
                    self.forget(other)
            side = self._sides[loop] = LoopSide(self, loop)
        waiter = LoopWaiter[T](
            side,
            self._undo,
            *(group, group_hash, attempt, time.monotonic() + timeout_s, self.wake_ups.tickets()),
        )
        if not self._enqueue(waiter):
            return None
        if waiter.queued:
            try:
                side.arm(waiter.deadline)
            except BaseException:
                self.leave(waiter)
                raise
        return waiter

    def leave(self, waiter: Waiter[T]) -> None:
        """Take a caller out who does not want to wait any longer."""
        if self._remove(waiter):
            self._has_left(waiter.group)

    def close(self) -> None:
        """Everybody's wait ends, as at the time-out."""
        with self._lock:
            self._closed = True
            waiters = [waiter for queue in self._queues.values() for waiter in queue]
            told = self._begun and self.wake_ups.consume()
            self._forget_all()
            self._arrived.notify()
        if told:
            self._pass_on(None)
        for waiter in waiters:
            waiter.settle(None, None)
        for side in list(self._sides.values()):
            if threading.get_ident() == side.thread_id:
                self.forget(side)
            else:
                with contextlib.suppress(RuntimeError):  # its loop was closed
                    side.loop.call_soon_threadsafe(self.forget, side)

    def forget(self, side: LoopSide) -> None:
        """Let go of a loop on which nobody waits; in its thread, or once it is closed."""
        if self._sides.pop(side.loop, None) is side:
            side.close()

    def serve_told(self) -> None:
        """Serve the queues, on a loop: it was told of a free cell, or looks by itself."""
        self._serve_all(self.wake_ups.consume())

    def serve_if_told(self) -> None:
        """`serve_told`, unless somebody rang for nothing."""
        if self.wake_ups.consume():
            self._serve_all(True)

    def republish(self) -> None:
        """A doorbell has come: show it."""
        with self._lock:
            self._publish()

    def next_deadline(self) -> float:
        """When the next caller's time is over (monotonic seconds); inf if nobody waits."""
        with self._lock:
            return self._next_deadline()

    # --- arriving and leaving

    def _enqueue(self, waiter: Waiter[T]) -> bool:
        with self._lock:
            if self._closed:
                raise ValueError("the router is closed")
            if self._count >= self._most:
                return False
            if self._thread is None and isinstance(waiter, ThreadWaiter):
                thread = threading.Thread(target=self._run, name="shmcoord-waiting", daemon=True)
                thread.start()  # may fail; it waits for our lock before it looks at the queues
                self._thread = thread
            queue = self._queues.setdefault(waiter.group, collections.deque())
            first = not any(not other.is_gone() for other in queue)
            queue.append(waiter)
            self._count += 1
            if isinstance(waiter, LoopWaiter):
                waiter.side.waiting += 1
            else:
                self._on_threads += 1
            heapq.heappush(self._deadlines, (waiter.deadline, next(self._order), waiter))
            try:
                self._begin()
                self._publish()
            except BaseException:
                self._drop(waiter)
                raise
            early = waiter.deadline < self._asleep_until
            self._arrived.notify()
        if first:
            self._try(waiter)
        if early:  # or his time-out would pass unnoticed until somebody else's
            self.wake_ups.wake()
        return True

    def _remove(self, waiter: Waiter[T]) -> bool:
        """Take a waiter out; False if somebody else has done so: he then answers for it."""
        with self._lock:
            if not waiter.queued:
                return False
            self._drop(waiter)
            self._publish()
            return True

    def _has_left(self, group: str) -> None:
        """A caller has gone unserved. We may have been told of a free cell for his sake, and have
        nobody else who would take it.

        Our turn was taken back before: whoever frees a cell from here on does not tell us, and one
        that was freed before is seen by `pass_on`.
        """
        if group not in self._queues and not self._closed:
            try:
                self._pass_on(group)
            except ValueError:  # the router is just being closed
                return

    def _drop(self, waiter: Waiter[T]) -> None:
        """The caller has the lock."""
        self._unqueue(waiter)
        queue = self._queues[waiter.group]
        if queue[0] is waiter:
            queue.popleft()
        else:
            queue.remove(waiter)
        if not queue:
            del self._queues[waiter.group]
        self._count -= 1
        if not self._count:
            self._deadlines.clear()
        elif len(self._deadlines) > 2 * self._count + 64:  # of callers served long before
            self._deadlines = [entry for entry in self._deadlines if entry[2].queued]
            heapq.heapify(self._deadlines)

    def _unqueue(self, waiter: Waiter[T]) -> None:
        waiter.queued = False
        if isinstance(waiter, LoopWaiter):
            waiter.side.waiting -= 1
        else:
            self._on_threads -= 1

    def _forget_all(self) -> None:
        for queue in self._queues.values():
            for waiter in queue:
                self._unqueue(waiter)
        self._queues.clear()
        self._deadlines.clear()
        self._count = 0
        self._publish()

    def _begin(self) -> None:
        if not self._begun:
            self.wake_ups.begin()
            self._begun = True

    def _publish(self) -> None:
        """Show our turns, or that we have none; the caller has the lock."""
        if not self._begun:
            return
        if not self._count:
            self._begun = False
            self.wake_ups.end()
            return
        heads = [(queue[0].group_hash, queue[0].tickets) for queue in self._queues.values()]
        if len(heads) > 1:
            heads.sort(key=lambda head: head[1][0])
        self.wake_ups.publish(heads, self._count, not self._on_threads)

    # --- the thread

    def _run(self) -> None:
        try:
            while True:
                with self._lock:
                    if not self._count:
                        if not self._closed:
                            self._arrived.wait(LINGER_S)
                        if not self._count:
                            self._thread = None
                            return
                self._serve_all(self.wake_ups.consume())
                with self._lock:
                    if not self._count:
                        continue
                    now = time.monotonic()
                    until = min(self._next_deadline(), now + LOST_WAKEUP_S)
                    self._asleep_until = until
                self.wake_ups.sleep(max(until - now, 0.0))
                self._asleep_until = float("-inf")
                if not self._count and self.wake_ups.consume():
                    self._pass_on(None)  # told for callers who have gone
        except BaseException as error:  # noqa: BLE001 - everybody who waits must learn of it
            with self._lock:
                self._thread = None
                closed = self._closed
                waiters = [waiter for queue in self._queues.values() for waiter in queue]
                self._forget_all()
            for waiter in waiters:
                waiter.settle(None, error)
            if not closed:  # where the router was closed meanwhile, that is all there is to it
                _log.exception("waiting for capacity ended")

    def _next_deadline(self) -> float:
        while self._deadlines and not self._deadlines[0][2].queued:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else float("inf")

    def _serve_all(self, told: bool) -> None:
        """Serve the queues; a telling that nobody here needs any more goes to the next router."""
        self._serve(told)
        if told and not self._count:
            self._pass_on(None)

    def _serve(self, told: bool) -> None:
        """Let the callers of each group try in order, until one fails."""
        for group in list(self._queues):
            while True:
                with self._lock:
                    queue = self._queues.get(group)
                    waiter = queue[0] if queue else None
                if waiter is None:
                    if told:
                        self._pass_on(group)
                    break
                if waiter.is_gone():
                    self._remove(waiter)
                elif not self._try(waiter):
                    break
        now = time.monotonic()
        while True:
            with self._lock:
                if self._next_deadline() > now:
                    return
                waiter = self._deadlines[0][2]
            if self._remove(waiter):
                waiter.settle(None, None)
                self._has_left(waiter.group)

    def _try(self, waiter: Waiter[T]) -> bool:
        """One attempt; whether the waiter is done with (served, failed or gone)."""
        try:
            result = waiter.attempt()
        except Exception as error:  # noqa: BLE001 - it belongs to the caller who waits
            if self._remove(waiter):
                waiter.settle(None, error)
            return True
        if result is None:
            return False
        # If somebody else has just served him, or he is gone: back with it.
        if not self._remove(waiter) or not waiter.settle(result, None):
            self._undo(result)
        return True
