"""A search in a worker thread, cancelled at every moment."""

import asyncio
import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from servers.data import SearchInterruptedError
from servers.searching import RunningSearch


class SlowSearch:
    """Stays in `start` until it is interrupted, and misses the first interrupts."""

    def __init__(self, misses: int = 0) -> None:
        self.in_start = threading.Event()
        self.interrupted = threading.Semaphore(0)
        self.misses = misses
        self.events: list[str] = []

    def start(self) -> None:
        self.in_start.set()
        for _ in range(self.misses + 1):
            self.interrupted.acquire()
        self.events.append("out")
        raise SearchInterruptedError

    def next_batch(self) -> None:
        return None

    def interrupt(self) -> None:
        self.interrupted.release()

    def close(self) -> None:
        self.events.append("closed")


@pytest.fixture
def pool():
    with ThreadPoolExecutor(1) as pool:
        yield pool


async def run(search: SlowSearch, pool: ThreadPoolExecutor) -> None:
    async with RunningSearch(search, pool):  # type: ignore[arg-type]
        pass


@pytest.mark.parametrize("misses", [0, 3])
@pytest.mark.parametrize("cancels", [1, 2])
async def test_a_cancelled_search_is_left_only_when_its_thread_is_out(pool, misses, cancels):
    complaints: list[dict] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    search = SlowSearch(misses)
    task = asyncio.create_task(run(search, pool))
    await asyncio.to_thread(search.in_start.wait)
    for _ in range(cancels):
        task.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert search.events == ["out", "closed"]
    del task
    gc.collect()
    await asyncio.sleep(0)
    assert complaints == []


async def test_a_search_that_has_not_begun_never_begins(pool):
    first, second = SlowSearch(), SlowSearch()
    running = asyncio.create_task(run(first, pool))
    await asyncio.to_thread(first.in_start.wait)
    waiting = asyncio.create_task(run(second, pool))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert second.events == ["closed"]
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not second.in_start.is_set()


async def test_an_error_closes_the_search(pool):
    search = SlowSearch()
    search.interrupt()
    with pytest.raises(SearchInterruptedError):
        await run(search, pool)
    assert search.events == ["out", "closed"]
