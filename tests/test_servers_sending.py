"""Limits of time, and clients that go away while their request is being ended."""

import asyncio
import gc

import grpc
import pytest

from servers.sending import Refusal, in_time


async def test_work_that_is_late_ends_and_is_refused():
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    with pytest.raises(Refusal) as refused:
        await in_time(work(), 0.01)
    assert refused.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert ended.is_set()


async def test_what_the_work_raises_is_raised():
    async def work() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await in_time(work(), 60)


async def test_the_error_of_cancelled_work_is_not_reported():
    said: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context))

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise RuntimeError("the client has gone") from None

    request = asyncio.create_task(in_time(work(), 60))
    await asyncio.sleep(0.01)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    del request
    for _ in range(3):  # what asyncio has to say comes when the task is collected
        await asyncio.sleep(0)
        gc.collect()
    assert not said
