"""The aio channel: all four kinds of call, their arguments, and where they go."""

from __future__ import annotations

import grpc
import grpc.aio
import pytest
from grpc_aio_nodes import Node, Stub, nothing_held

import shmcoord.grpc


@pytest.fixture
def open_channel(segment):
    def make(**options):
        return shmcoord.grpc.aio.channel(segment, group="GREEN", **options)

    return make


async def requests(*words):
    for word in words:
        yield word


async def test_all_four_kinds(segment, open_channel):
    async with Node(segment), open_channel() as channel:
        stub = Stub(channel)
        for _ in range(2):  # waiting for the connection, then on it
            assert await stub.Say("hello") == "A: hello"
            assert [word async for word in stub.Count(" 2")] == ["A 0", "A 1"]
            assert await stub.Gather(requests("a", "b")) == "A: a+b"
            assert await stub.Gather(iter(["a", "b"])) == "A: a+b"
            assert [w async for w in stub.Chat(requests("a", "b"))] == ["A: a", "A: b"]
        await nothing_held(segment)


async def test_reading_and_writing(segment, open_channel):
    async with Node(segment), open_channel() as channel:
        stub = Stub(channel)
        for _ in range(2):
            call = stub.Count(" 2")
            assert [await call.read() for _ in range(3)] == ["A 0", "A 1", grpc.aio.EOF]
            assert await call.read() is grpc.aio.EOF
            call = stub.Gather()
            await call.write("a")
            await call.write("b")
            await call.done_writing()
            assert await call == "A: a+b"
            call = stub.Chat()
            for word in ("a", "b"):
                await call.write(word)
                assert await call.read() == f"A: {word}"
            await call.done_writing()
            assert await call.read() is grpc.aio.EOF
            assert await call.code() is grpc.StatusCode.OK
        await nothing_held(segment)
