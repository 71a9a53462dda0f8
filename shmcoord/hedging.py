"""Hedged requests: a second node is asked when the first takes long (Dean, Barroso 2013).

Only for methods that may be executed twice, only onto a node that is idle at that moment, and only
while the retry budget that all routers of the host share allows it: a hedge adds load, so it must
not add it where there is too much already. The first answer counts; what the other does is
cancelled where it can be.
"""

from __future__ import annotations

import concurrent.futures as futures
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from shmcoord.errors import ShmcoordError

if TYPE_CHECKING:
    import asyncio

    from shmcoord.backend import Backend
    from shmcoord.lease import Lease

__all__ = ["HedgePool", "hedge_async", "release_quietly"]

# Another lease, on an idle node that is none of the given; raises Saturated or NoBackend.
AcquireIdle = Callable[[tuple["Backend", ...]], "Lease | None"]


def release_quietly(lease: Lease) -> None:
    """Give back a lease that somebody else may have given back; never raises."""
    if not lease.released:
        with suppress(ShmcoordError):
            lease.release()


def _second(acquire_idle: AcquireIdle, first: Lease) -> Lease | None:
    with suppress(ShmcoordError):  # whatever it is: the first is under way
        return acquire_idle((first.backend,))
    return None


async def hedge_async(
    first: Lease,
    after_s: float,
    acquire_idle: AcquireIdle,
    send: Callable[[Lease], Awaitable[Any]],
) -> Any:
    """Send with one lease and, if no answer came after `after_s` seconds, with a second one.

    Returns the first answer. Raises the error of the first lease's sending if neither gave one; the
    caller releases the first lease, the second is released here.
    """
    import asyncio  # costs more to import than all of shmcoord

    one = asyncio.ensure_future(send(first))
    second: Lease | None = None
    two: asyncio.Future[Any] | None = None
    try:
        done, _ = await asyncio.wait((one,), timeout=after_s)
        if not done:
            second = _second(acquire_idle, first)
        if second is None:
            return await one
        two = asyncio.ensure_future(send(second))
        pending: set[asyncio.Future[Any]] = {one, two}
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                if future.exception() is None:
                    return future.result()
        return await one  # both failed: the error of the first
    finally:
        for future in (one, two):
            if future is not None and not future.done():
                future.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await future
            elif future is not None and not future.cancelled():
                future.exception()  # looked at: nobody else will
        if second is not None:
            release_quietly(second)


class HedgePool:
    """Hedged requests for callers on threads.

    A sending cannot be cancelled from another thread: the slower of two goes on until its answer or
    its time-out, and then gives back its own lease.
    """

    def __init__(self, workers: int = 64) -> None:
        """Threads are started as they are needed, at most `workers`."""
        self._pool = futures.ThreadPoolExecutor(workers, thread_name_prefix="shmcoord-hedge")

    def call(
        self,
        first: Lease,
        after_s: float,
        acquire_idle: AcquireIdle,
        send: Callable[[Lease], Any],
    ) -> tuple[Any, bool]:
        """As `hedge_async`; also returns whether the first lease is still in use.

        Then the caller leaves it alone: it is released when its sending ends.
        """
        one = self._pool.submit(send, first)
        if not futures.wait((one,), timeout=after_s).done and one.running():
            # (Not running: it waits for a thread of ours, not for the node.)
            second = _second(acquire_idle, first)
            if second is not None:
                two = self._pool.submit(send, second)
                two.add_done_callback(lambda _: release_quietly(second))
                pending: set[futures.Future[Any]] = {one, two}
                while pending:
                    done, pending = futures.wait(pending, return_when=futures.FIRST_COMPLETED)
                    for future in done:
                        if future.exception() is None:
                            busy = future is two and not one.done()
                            if busy:
                                one.add_done_callback(lambda _: release_quietly(first))
                            return future.result(), busy
        return one.result(), False

    def close(self) -> None:
        """Wait for nothing; threads end with what they send."""
        self._pool.shutdown(wait=False)
