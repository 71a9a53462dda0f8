"""Who waits for capacity: callers on threads, callers on event loops, and a loop's own part of it.

The queue that they stand in is in `waiting.py`.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    import asyncio

    from shmcoord.doorbell import Doorbell

__all__ = ["LoopSide", "LoopWaiter", "Served", "ThreadWaiter", "Waiter", "Waits", "WakeUps"]

_log = logging.getLogger("shmcoord.waiting")
T = TypeVar("T")


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


class Waiter(Generic[T]):
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


class ThreadWaiter(Waiter[T]):
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


class Waits:
    """The waits of one user of a router, which may be shared: he can end all of them.

    No lock: who waits adds his future first and looks at `ended` then; who ends has set `ended`
    first and looks for futures then. One of them sees the other, also where a signal handler ends.

    Attributes:
        ended: Whether nobody may wait any more.
    """

    def __init__(self) -> None:
        self.ended = False
        self._futures: dict[Future[Any], None] = {}

    def result(self, future: Future[T | None]) -> T | None:
        """Wait for the result of a future; None if it was cancelled by `end`."""
        self._futures[future] = None
        try:
            if self.ended:
                future.cancel()
            return future.result()
        except CancelledError:
            return None
        finally:
            del self._futures[future]

    def end(self) -> None:
        """End the waits under way, and those that somebody is about to begin."""
        self.ended = True
        for future in list(self._futures):
            future.cancel()  # one that has its result keeps it


class LoopWaiter(Waiter[T]):
    """A caller on an event loop; `future` belongs to the loop."""

    def __init__(self, side: LoopSide, undo: Callable[[T], object], *args: Any) -> None:
        super().__init__(*args)
        self.side = side
        self.future: asyncio.Future[T | None] = side.loop.create_future()
        self._undo = undo

    def is_gone(self) -> bool:
        """Whether `future` was cancelled, or its loop was closed."""
        return self.future.cancelled() or self.side.loop.is_closed()

    def settle(self, result: T | None, error: BaseException | None) -> bool:
        """Have the loop set the result of `future`; what nobody takes there is undone there."""
        if self.side.loop.is_closed():
            return False
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


class Served(Protocol):
    """What a loop's side needs of the queue."""

    @property
    def wake_ups(self) -> WakeUps:
        """The router's."""

    @property
    def net_s(self) -> float:
        """After how long everybody who waits looks by himself."""

    @property
    def linger_s(self) -> float:
        """How long what serves stays after the last caller."""

    def serve_told(self) -> None:
        """Serve the queues."""

    def serve_if_told(self) -> None:
        """Serve the queues if we were told of a free cell."""

    def republish(self) -> None:
        """Show the turns anew."""

    def next_deadline(self) -> float:
        """When the next caller's time is over."""

    def forget(self, side: LoopSide) -> None:
        """Let go of a loop on which nobody waits."""


class LoopSide:
    """One event loop's part of a queue: its doorbell and its timer. Lives in the loop's thread."""

    def __init__(self, queue: Served, loop: asyncio.AbstractEventLoop) -> None:
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
            self._hook()
        now = time.monotonic()
        due = min(deadline, now + self._queue.net_s)
        if due < self._due:
            self._set_timer(due, due - now)

    def _hook(self) -> None:
        self._unhook()
        version = self._queue.wake_ups.version
        try:
            bell = self._queue.wake_ups.doorbell()
        except OSError as error:  # no descriptor, or no thread, is left
            _log.warning("no doorbell (%s): looking every %g s", error, self._queue.net_s)
            return
        self._bell, self._version = bell, version
        self._fds = list(bell.fds)
        for fd in self._fds:
            self.loop.add_reader(fd, self._rung, fd)
        self._queue.republish()

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
        except OSError:  # read before, or closed
            return
        self._queue.serve_if_told()

    def _look(self) -> None:
        """The net under lost wake-ups, and the time-outs."""
        self._timer = None
        if not self.waiting and self._due == float("inf"):  # nobody came for a while
            self._queue.forget(self)
            return
        self._due = float("inf")
        try:
            if self.waiting:
                self._queue.serve_told()
        finally:
            self._look_again()

    def _look_again(self) -> None:
        if self.waiting:
            self.arm(self._queue.next_deadline())
        else:
            self._timer = self.loop.call_later(self._queue.linger_s, self._look)

    def _unhook(self) -> None:
        if self._bell is not None:
            if not self.loop.is_closed():
                for fd in self._fds:
                    self.loop.remove_reader(fd)
            self._bell.close()
            self._bell = None
