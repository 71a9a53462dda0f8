"""Searches in worker threads, for an event loop that must stay free."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

from servers.data import Search
from servers.pb import shmcoord_cluster_pb2 as pb

T = TypeVar("T")

# A statement that begins just as it is interrupted may miss it, so it is told again, in seconds.
_INTERRUPT_AGAIN_S = 0.02


class RunningSearch:
    """A search from its start to its end; leaving the `async with` ends it.

    A cancelled task leaves only after the worker thread is out of the search, so that what the
    caller holds for it (a lease) is given back when the work has really ended, not before.
    """

    def __init__(self, search: Search, pool: ThreadPoolExecutor) -> None:
        self._search = search
        self._pool = pool

    async def __aenter__(self) -> "RunningSearch":
        try:
            await self._in_thread(self._search.start)
        except BaseException:
            self._search.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._search.close()

    async def next_batch(self) -> pb.Table | None:
        """The next rows, or None at the end."""
        return await self._in_thread(self._search.next_batch)

    async def _in_thread(self, function: Callable[[], T]) -> T:
        work = self._pool.submit(function)
        done = asyncio.wrap_future(work)
        try:
            return await asyncio.shield(done)
        except asyncio.CancelledError:
            if not work.cancel():
                await self._ended(done)
            raise

    async def _ended(self, done: "asyncio.Future[T]") -> None:
        while not done.done():
            self._search.interrupt()
            try:
                await asyncio.wait([done], timeout=_INTERRUPT_AGAIN_S)
            except asyncio.CancelledError:
                # Cancelled once more: the thread is still in the search, and ends soon.
                continue
        done.exception()  # nobody else will ask for it
