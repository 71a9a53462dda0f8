"""The event loop's gRPC server that is a node: real servers on loopback."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import grpc
import grpc.aio
import pytest_asyncio
from grpc_helpers import Method, path, service
from helpers import wait_until

import shmcoord.grpc
from shmcoord import Segment
from shmcoord.grpc._common import NODE_KEY, served_by

Start = Callable[..., Awaitable[tuple[Any, grpc.aio.Channel]]]


@pytest_asyncio.fixture
async def start(segment: Segment) -> AsyncIterator[Start]:
    """Starts servers with one service, each with a channel to it."""
    open_things: list[Any] = []

    async def begin(**options: Any) -> tuple[Any, grpc.aio.Channel]:
        methods = options.pop("methods")
        options = {"node": "B", "segment": segment.name, "group": "GREEN", **options}
        server = shmcoord.grpc.aio.server(**options)
        server.add_generic_rpc_handlers((service(**methods),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        open_things.append((server, channel))
        return server, channel

    yield begin
    for server, channel in open_things:
        await channel.close()
        await server.stop(None)


async def test_a_served_call_is_counted_and_names_its_node(start: Start, segment: Segment) -> None:
    seen = []

    async def answer(request: bytes, context: Any) -> bytes:
        status = segment.status("B")
        seen.append((status.inflight, status.waiting, served_by.get()))
        return request

    server, channel = await start(methods={"Echo": Method(answer)})
    call = channel.unary_unary(path("Echo"))(b"hello")
    assert await call == b"hello"
    found = dict(await call.trailing_metadata())
    assert found[NODE_KEY] == "B"
    assert seen == [(1, 0, "B")]
    status = segment.status("B")
    assert (status.served, status.failed, status.inflight, status.waiting) == (1, 0, 0, 0)
    assert status.endpoint == server.endpoint
    assert served_by.get() is None


async def test_all_kinds_of_handlers(start: Start, segment: Segment) -> None:
    async def echo(request: bytes, context: Any) -> bytes:
        return request

    def plain(request: bytes, context: Any) -> bytes:
        return request

    async def total(requests: AsyncIterator[bytes], context: Any) -> bytes:
        return b"".join([request async for request in requests])

    async def each(request: bytes, context: Any) -> AsyncIterator[bytes]:
        for byte in request:
            yield bytes([byte])

    async def written(request: bytes, context: Any) -> None:
        for byte in request:
            await context.write(bytes([byte]))

    def plain_each(request: bytes, context: Any) -> Iterator[bytes]:
        for byte in request:
            yield bytes([byte])

    async def back(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        context.set_trailing_metadata((("mine", "kept"),))
        async for request in requests:
            yield request

    async def read_back(_: Any, context: Any) -> None:
        while (request := await context.read()) is not grpc.aio.EOF:
            await context.write(request)

    server, channel = await start(
        methods={
            "Echo": Method(echo),
            "Plain": Method(plain),
            "Total": Method(total, True, False),
            "Each": Method(each, False, True),
            "Written": Method(written, False, True),
            "PlainEach": Method(plain_each, False, True),
            "Back": Method(back, True, True),
            "ReadBack": Method(read_back, True, True),
        }
    )
    for name in ("Echo", "Plain"):
        call = channel.unary_unary(path(name))(b"abc")
        assert await call == b"abc"
        assert dict(await call.trailing_metadata())[NODE_KEY] == "B"
    assert await channel.stream_unary(path("Total"))([b"a", b"b"]) == b"ab"
    for name in ("Each", "Written", "PlainEach"):
        stream = channel.unary_stream(path(name))(b"abc")
        assert [response async for response in stream] == [b"a", b"b", b"c"]
        assert dict(await stream.trailing_metadata())[NODE_KEY] == "B"
    for name in ("Back", "ReadBack"):
        both = channel.stream_stream(path(name))([b"x", b"y"])
        assert [response async for response in both] == [b"x", b"y"]
        found = dict(await both.trailing_metadata())
        assert found[NODE_KEY] == "B"
        assert name != "Back" or found["mine"] == "kept"
    wait_until(lambda: server.node.served == 8)
    assert server.node.inflight == 0
    assert segment.status("B").failed == 0
