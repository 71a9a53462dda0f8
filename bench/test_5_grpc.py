"""Calls through the channels that route by load, against grpcio's channel to the one node.

Node and calls are the same for both: what is measured is what picking, reserving, the lease in the
metadata and giving back cost. The node is another process, and answers at once.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator

import grpc
import pytest

import shmcoord.grpc
from bench.children import ChildError, children
from bench.grpc_node import GROUP, METHOD
from bench.paired import AsyncCall, Statement
from bench.plugin import Rows
from bench.report import Bar, Row

OVERHEAD = Bar("<=", 1.05)
THROUGHPUT = Bar("<=", round(1 / 0.97, 4))  # time per call: at least 0.97 times as many calls
THREADS = 8
REQUEST = b"x"
PLAIN = "unary call, grpcio's channel"
PLAIN_MANY = "8 threads, grpcio's channel"
PLAIN_AIO = "unary call, grpc.aio's channel"


class Threads:
    """A call made by several threads at once; n calls are divided among them."""

    def __init__(self, call: Callable[[bytes], bytes]) -> None:
        self._call = call

    def run(self, n: int) -> float:
        """Makes n calls; returns the seconds from the first to the last."""
        barrier = threading.Barrier(THREADS + 1)

        def work(count: int) -> None:
            barrier.wait()
            for _ in range(count):
                self._call(REQUEST)

        threads = [
            threading.Thread(target=work, args=(n // THREADS + (i < n % THREADS),))
            for i in range(THREADS)
        ]
        for thread in threads:
            thread.start()
        barrier.wait()
        start = time.perf_counter()
        for thread in threads:
            thread.join()
        return time.perf_counter() - start


@pytest.fixture(scope="module")
def segment_name() -> str:
    """The node's segment, which goes with it."""
    return f"shmbench_{os.getpid()}_{secrets.token_hex(3)}"


@pytest.fixture(scope="module")
def endpoint(segment_name: str) -> Iterator[str]:
    """A node whose server is grpcio's own."""
    with children([["bench.grpc_node", segment_name, "plain"]]) as [endpoint]:
        yield endpoint


@pytest.fixture(scope="module")
def plain(endpoint: str) -> Iterator[Callable[[bytes], bytes]]:
    """The method through grpcio's channel."""
    with grpc.insecure_channel(endpoint) as channel:
        yield _warm(channel)


@pytest.fixture(scope="module")
def routed(endpoint: str, segment_name: str) -> Iterator[Callable[[bytes], bytes]]:
    """The method through the channel that routes."""
    with shmcoord.grpc.channel(segment_name, group=GROUP) as channel:
        yield _warm(channel)


def _warm(channel: grpc.Channel) -> Callable[[bytes], bytes]:
    call: Callable[[bytes], bytes] = channel.unary_unary(METHOD)
    for _ in range(200):
        assert call(REQUEST) == REQUEST
    return call


def _statement(call: Callable[[bytes], bytes]) -> Statement:
    return Statement("call(request)", {"call": call, "request": REQUEST})


def test_plain(rows: Rows, plain: Callable[[bytes], bytes]) -> None:
    """The reference."""
    rows.time(Row("grpc_plain", "grpc", PLAIN), _statement(plain))


def test_channel(
    rows: Rows, plain: Callable[[bytes], bytes], routed: Callable[[bytes], bytes]
) -> None:
    """The same call, routed."""
    row = Row(
        "grpc_channel", "grpc", "the same by shmcoord.grpc.channel", reference=PLAIN, bar=OVERHEAD
    )
    rows.time(row, _statement(routed), _statement(plain), part=4)


def test_channel_threads(
    rows: Rows, plain: Callable[[bytes], bytes], routed: Callable[[bytes], bytes]
) -> None:
    """As many calls as eight threads can make."""
    row = Row(
        "grpc_channel_threads",
        "grpc",
        "the same by shmcoord.grpc.channel, per call",
        reference=PLAIN_MANY,
        bar=THROUGHPUT,
    )
    rows.time(row, Threads(routed), Threads(plain), batch_s=0.05)


def test_channel_future(
    rows: Rows, plain: Callable[[bytes], bytes], routed: Callable[[bytes], bytes]
) -> None:
    """A call that returns at once, and its result."""
    row = Row(
        "grpc_channel_future",
        "grpc",
        "the same by shmcoord.grpc.channel, as futures",
        reference="as futures, grpcio's channel",
    )
    code = "future(request).result()"
    names = [{"future": call.future, "request": REQUEST} for call in (routed, plain)]  # type: ignore[attr-defined]
    rows.time(row, Statement(code, names[0]), Statement(code, names[1]))


def test_aio_channel(rows: Rows, endpoint: str, segment_name: str) -> None:
    """The same on an event loop."""
    loop = asyncio.new_event_loop()
    row = Row(
        "grpc_aio_channel",
        "grpc",
        "the same by shmcoord.grpc.aio.channel",
        reference=PLAIN_AIO,
        bar=OVERHEAD,
    )

    async def open_both() -> list[grpc.aio.Channel]:
        return [
            shmcoord.grpc.aio.channel(segment_name, group=GROUP),
            grpc.aio.insecure_channel(endpoint),
        ]

    async def warm(channel: grpc.aio.Channel) -> None:
        for _ in range(200):
            assert await channel.unary_unary(METHOD)(REQUEST) == REQUEST

    try:
        try:
            channels = loop.run_until_complete(open_both())
        except NotImplementedError:
            rows.skip(row, "not built into this tree")
        calls = []
        for channel in channels:
            loop.run_until_complete(warm(channel))
            method = channel.unary_unary(METHOD)
            calls.append(AsyncCall(loop, lambda method=method: method(REQUEST)))
        rows.time(row, calls[0], calls[1], part=4)
        for channel in channels:
            loop.run_until_complete(channel.close())
    finally:
        loop.close()


def test_both_sides(rows: Rows, plain: Callable[[bytes], bytes]) -> None:
    """Channel and server are ours: the server adopts the lease, and publishes its load."""
    row = Row(
        "grpc_both_sides",
        "grpc",
        "the same to shmcoord.grpc.server",
        reference=PLAIN,
    )
    name = f"shmbench_{os.getpid()}_{secrets.token_hex(3)}"
    try:
        with (
            children([["bench.grpc_node", name, "plugin"]]),
            shmcoord.grpc.channel(name, group=GROUP) as channel,
        ):
            rows.time(row, _statement(_warm(channel)), _statement(plain), part=4)
    except ChildError as reason:
        rows.skip(row, str(reason))
