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
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    import asyncio

    from shmcoord.doorbell import Doorbell

__all__ = ["LOST_WAKEUP_S", "LoopWaiter", "ThreadWaiter", "WaitQueue", "WakeUps"]

_log = logging.getLogger("shmcoord.waiting")
T = TypeVar("T")

# Who was told of a free cell and dies before he takes it has taken the wake-up with him; and nobody
# is told of a cell whose owner was killed. After this long everybody who waits looks by himself.
LOST_WAKEUP_S = 0.05
# The thread stays this long after the last caller was served: starting one costs 0.1 ms.
LINGER_S = 2.0


class WakeUps(Protocol):
    """What the queue needs of the shared memory: `turns.Turns`."""

    def begin(self) -> object:
        """Count this router among those who wait."""

    def end(self) -> object:
        """The reverse of `begin`."""

    def tickets(self) -> Sequence[int]:
        """A place in the order of all callers of all processes."""

    def publish(
        self, heads: Sequence[tuple[int, Sequence[int]]], waiting: int, by_loop: bool = False
    ) -> object:
        """Show the oldest caller of each group (oldest first), how many wait, and where."""

    def consume(self) -> bool:
        """Whether we were told of a free cell; called before looking for it."""

    def pass_on(self, group: int) -> object:
        """Tell the next router, of this group (0: of any): a cell may be left."""

    def wake(self) -> object:
        """End a `sleep` that has begun or is about to."""

    def sleep(self, timeout_s: float) -> object:
        """Block until we are told, or for the given seconds."""

    @property
    def version(self) -> int:
        """Moves when a doorbell made before does not hear everything any more."""

    def doorbell(self) -> Doorbell:
        """What makes a descriptor readable when we are told."""


class _Waiter(Generic[T]):
    """One caller in the queue."""

    def __init__(
        self,
        group: str,
        group_hash: int,
        attempt: Callable[[], T | None],
        deadline: float,
        tickets: Sequence[int],
    ) -> None:
        self.group = group
        self.group_hash = group_hash
        self.attempt = attempt
        self.deadline = deadline
        self.tickets = tickets
        self.queued = True

    def is_gone(self) -> bool:
        """Whether nobody wants the result any more."""
        raise NotImplementedError

    def settle(self, result: T | None, error: BaseException | None) -> bool:
        """Hand over; False if nobody takes it."""
        raise NotImplementedError


class ThreadWaiter(_Waiter[T]):
    """A caller on a thread; cancel `future` to leave the queue."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.future: Future[T | None] = Future()

    def is_gone(self) -> bool:
        """Whether `future` was cancelled."""
        return self.future.cancelled()

    def settle(self, result: T | None, error: BaseException | None) -> bool:
        """Set the result of `future`."""
        if not self.future.set_running_or_notify_cancel():
            return False
        if error is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)
        return True


class LoopWaiter(_Waiter[T]):
    """A caller on an event loop; `future` belongs to the loop."""

    def __init__(self, side: _LoopSide[T], undo: Callable[[T], object], *args: Any) -> None:
        super().__init__(*args)
        self.side = side
        self.future: asyncio.Future[T | None] = side.loop.create_future()
        self._undo = undo

    def is_gone(self) -> bool:
        """Whether `future` was cancelled."""
        return self.future.cancelled()

    def settle(self, result: T | None, error: BaseException | None) -> bool:
        """Have the loop set the result of `future`; what nobody takes there is undone there."""
        if threading.get_ident() == self.side.thread_id:
            self._set(result, error)
            return True
        try:
            self.side.loop.call_soon_threadsafe(self._set, result, error)
        except RuntimeError:  # the loop was closed meanwhile
            return False
        return True

    def _set(self, result: T | None, error: BaseException | None) -> None:
        if self.future.done():  # cancelled meanwhile
            if result is not None:
                self._undo(result)
        elif error is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


class _LoopSide(Generic[T]):
    """One event loop's part of a queue: its doorbell and its timer. Lives in the loop's thread."""

    def __init__(self, queue: WaitQueue[T], loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.thread_id = threading.get_ident()
        self.waiting = 0  # callers of this loop; changed under the queue's lock
        self._queue = queue
        self._bell: Doorbell | None = None
        self._fds: list[int] = []
        self._version = -1
        self._timer: asyncio.TimerHandle | None = None
        self._due = float("inf")

    def arm(self, deadline: float) -> None:
        """Have the queue served when the bell rings, and looked at when the deadline comes."""
        if self._version != self._queue.wake_ups.version:
            self._unhook()
            self._version = self._queue.wake_ups.version
            self._bell = self._queue.wake_ups.doorbell()
            self._fds = list(self._bell.fds)
            for fd in self._fds:
                self.loop.add_reader(fd, self._rung, fd)
            self._queue.republish()
        now = time.monotonic()
        due = min(deadline, now + LOST_WAKEUP_S)
        if due < self._due:
            self._set_timer(due, due - now)

    def close(self) -> None:
        """Let go of the loop."""
        self._unhook()
        if self._timer is not None:
            self._timer.cancel()

    def _set_timer(self, due: float, after_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._due = due
        self._timer = self.loop.call_later(max(after_s, 0.0), self._look)

    def _rung(self, fd: int) -> None:
        try:
            os.read(fd, 8)
        except (BlockingIOError, OSError):
            return
        self._queue.serve_told()

    def _look(self) -> None:
        """The net under lost wake-ups, and the time-outs."""
        self._timer = None
        if not self.waiting and self._due == float("inf"):  # nobody came for a while
            self._queue.forget(self)
            return
        self._due = float("inf")
        if self.waiting:
            self._queue.serve_told()
        if self.waiting:
            self.arm(self._queue.next_deadline())
        else:
            self._timer = self.loop.call_later(LINGER_S, self._look)

    def _unhook(self) -> None:
        if self._bell is not None:
            if not self.loop.is_closed():
                for fd in self._fds:
                    self.loop.remove_reader(fd)
            self._bell.close()
            self._bell = None


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
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        self._queues: dict[str, collections.deque[_Waiter[T]]] = {}
        self._deadlines: list[tuple[float, int, _Waiter[T]]] = []
        self._order = itertools.count()
        self._count = 0
        self._on_threads = 0
        self._begun = False
        self._asleep_until = float("-inf")
        self._thread: threading.Thread | None = None
        self._sides: dict[asyncio.AbstractEventLoop, _LoopSide[T]] = {}
        self._closed = False

    def ahead(self, group: str) -> int:
        """How many callers of this router wait for the group: a new one goes behind them."""
        queue = self._queues.get(group)  # without the lock: the usual case is that nobody waits
        if not queue:
            return 0
        with self._lock:
            return sum(not waiter.is_gone() for waiter in queue)

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
            for other in [other for other in self._sides if other.is_closed()]:
                self.forget(self._sides[other])
            side = self._sides[loop] = _LoopSide(self, loop)
        waiter = LoopWaiter[T](
            side,
            self._undo,
            *(group, group_hash, attempt, time.monotonic() + timeout_s, self.wake_ups.tickets()),
        )
        if not self._enqueue(waiter):
            return None
        if waiter.queued:
            side.arm(waiter.deadline)
        return waiter

    def leave(self, waiter: _Waiter[T]) -> None:
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

    def forget(self, side: _LoopSide[T]) -> None:
        """Let go of a loop on which nobody waits; in its thread, or once it is closed."""
        self._sides.pop(side.loop, None)
        side.close()

    def serve_told(self) -> None:
        """Serve the queues, on a loop: it was told of a free cell, or looks by itself."""
        told = self.wake_ups.consume()
        self._serve(told)
        if told and not self._count:
            self._pass_on(None)

    def republish(self) -> None:
        """A doorbell has come: show it."""
        with self._lock:
            self._publish()

    def next_deadline(self) -> float:
        """When the next caller's time is over (monotonic seconds); inf if nobody waits."""
        with self._lock:
            return self._next_deadline()

    # --- arriving and leaving

    def _enqueue(self, waiter: _Waiter[T]) -> bool:
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

    def _remove(self, waiter: _Waiter[T]) -> bool:
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

    def _drop(self, waiter: _Waiter[T]) -> None:
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

    def _unqueue(self, waiter: _Waiter[T]) -> None:
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
                self._serve(self.wake_ups.consume())
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
                self._has_left(waiter.group)
                waiter.settle(None, None)

    def _try(self, waiter: _Waiter[T]) -> bool:
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
