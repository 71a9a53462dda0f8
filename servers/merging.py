"""Several streams as one, in the order in which their items come."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Mapping
from typing import Any, Generic, TypeVar

import grpc.aio

T = TypeVar("T")


class SourceError(Exception):
    """One of the streams failed: `key` says which one, `__cause__` says why."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


class _End(Generic[T]):
    def __init__(self, key: str, error: Exception | None) -> None:
        self.key = key
        self.error = error


@contextlib.asynccontextmanager
async def merged(
    sources: Mapping[str, AsyncIterable[T]], ahead: int = 4
) -> AsyncIterator[AsyncGenerator[tuple[str, T], None]]:
    """Reads all sources at once; gives (key, item) as items come.

    At most `ahead` items wait for the reader, so that a slow reader slows the sources down.
    Whichever way the `async with` is left, every source is closed or cancelled by then.

    Raises:
        SourceError: from the iteration, when a source fails.
    """
    queue: asyncio.Queue[tuple[str, T] | _End[T]] = asyncio.Queue(ahead)

    async def pump(key: str, source: AsyncIterable[T]) -> None:
        error = None
        try:
            async for item in source:
                await queue.put((key, item))
        except Exception as problem:  # noqa: BLE001 - handed to the reader
            error = problem
        finally:
            await _close(source)
        await queue.put(_End(key, error))

    async def items() -> AsyncGenerator[tuple[str, T], None]:
        running = len(sources)
        while running:
            item = await queue.get()
            if not isinstance(item, _End):
                yield item
            elif item.error is not None:
                raise SourceError(item.key) from item.error
            else:
                running -= 1

    tasks = [asyncio.create_task(pump(key, source)) for key, source in sources.items()]
    try:
        yield items()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _close(source: AsyncIterable[Any]) -> None:
    """Ends a source that may not have ended: a generator, or a call of grpc.aio."""
    if isinstance(source, AsyncGenerator):
        await source.aclose()
    elif isinstance(source, grpc.aio.Call):
        source.cancel()
