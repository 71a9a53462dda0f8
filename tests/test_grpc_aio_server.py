"""The event loop's gRPC server that is a node: real servers on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from grpc_helpers import Method, path, service

import shmcoord.grpc
from shmcoord import NoBackend, NodeExists, Router, Saturated, Segment, State
from shmcoord.grpc._common import LEASE_KEY, LEASE_LOST_KEY, NODE_KEY, served_by

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
    await eventually(lambda: server.node.served == 8)
    assert server.node.inflight == 0
    assert segment.status("B").failed == 0


class Gate:
    """A handler that tells that it runs, and waits to be let go."""

    def __init__(self) -> None:
        self.entered = asyncio.Semaphore(0)
        self.open = asyncio.Event()
        self.count = 0
        self.cancelled = 0

    async def wait(self, request: bytes, context: Any) -> bytes:
        self.count += 1
        self.entered.release()
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return request

    async def entries(self, count: int) -> None:
        for _ in range(count):
            await asyncio.wait_for(self.entered.acquire(), 10)


async def eventually(predicate: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Wait on the loop for something to become true."""
    ends = time.monotonic() + timeout_s
    while not predicate():
        assert time.monotonic() < ends, predicate
        await asyncio.sleep(0.002)


async def code_of(call: Any) -> grpc.StatusCode:
    """The status of a call, however it ended."""
    return await asyncio.wait_for(call.code(), 20)  # type: ignore[no-any-return]


def metadata(token: str) -> tuple[tuple[str, str], ...]:
    return ((LEASE_KEY, token),)


async def test_bound_partial_and_callable_handlers(start: Start, segment: Segment) -> None:
    """Each is run as grpcio would run it: the last one is plain, and runs in a thread."""
    threads = []

    class Servicer:
        async def single(self, request: bytes, context: Any) -> bytes:
            return b"single " + request

        async def stream(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
            yield b"stream " + request

    async def added(prefix: bytes, request: bytes, context: Any) -> bytes:
        return prefix + request

    async def added_each(prefix: bytes, request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield prefix + request

    class Callable_:  # noqa: N801
        def __call__(self, request: bytes, context: Any) -> bytes:
            threads.append(threading.current_thread())
            assert served_by.get() == "B"
            return b"callable " + request

    servicer = Servicer()
    server, channel = await start(
        methods={
            "Single": Method(servicer.single),
            "Stream": Method(servicer.stream, False, True),
            "Partial": Method(functools.partial(added, b"partial ")),
            "PartialEach": Method(functools.partial(added_each, b"each "), False, True),
            "Callable": Method(Callable_()),
        }
    )
    assert await channel.unary_unary(path("Single"))(b"x") == b"single x"
    assert await channel.unary_unary(path("Partial"))(b"x") == b"partial x"
    assert await channel.unary_unary(path("Callable"))(b"x") == b"callable x"
    assert [r async for r in channel.unary_stream(path("Stream"))(b"x")] == [b"stream x"]
    assert [r async for r in channel.unary_stream(path("PartialEach"))(b"x")] == [b"each x"]
    assert threads
    assert threads[0] is not threading.current_thread()
    await eventually(lambda: server.node.served == 5)
    assert (server.node.inflight, server.node.failed) == (0, 0)


async def test_plain_handlers_wait_in_the_pool(start: Start, segment: Segment) -> None:
    gate = threading.Event()
    entered = threading.Semaphore(0)

    def plain(request: bytes, context: Any) -> bytes:
        entered.release()
        assert gate.wait(20)
        return request

    def each(request: bytes, context: Any) -> Iterator[bytes]:
        entered.release()
        assert gate.wait(20)
        yield request

    pool = ThreadPoolExecutor(1)
    with contextlib.ExitStack() as stack:
        stack.callback(pool.shutdown, wait=False)
        stack.callback(gate.set)  # whatever happens
        server, channel = await start(
            migration_thread_pool=pool,
            methods={"Plain": Method(plain), "Each": Method(each, False, True)},
        )
        calls = [channel.unary_unary(path("Plain"))(b"x")]
        await eventually(lambda: entered.acquire(blocking=False))
        calls += [channel.unary_unary(path("Plain"))(b"x") for _ in range(2)]
        await eventually(lambda: server.node.waiting == 2)
        streams = [channel.unary_stream(path("Each"))(b"x") for _ in range(2)]
        await eventually(lambda: server.node.waiting == 4)
        assert server.node.inflight == 1
        with Router(segment.name) as router:
            lease = router.acquire("GREEN")
            held = channel.unary_unary(path("Plain"))(b"x", metadata=metadata(lease.token))
            calls[-1].cancel()
            await eventually(lambda: server.node.waiting == 3)
            assert server.node.inflight == 2
            gate.set()
            assert [await c for c in (*calls[:2], held)] == [b"x"] * 3
            assert not lease.release()
        for stream in streams:
            assert [r async for r in stream] == [b"x"]
        await eventually(lambda: server.node.inflight == 0)
        assert (server.node.waiting, server.node.served, server.node.failed) == (0, 5, 0)


async def test_counts_under_rejections_and_cancellations(start: Start) -> None:
    gate = Gate()
    server, channel = await start(methods={"Wait": Method(gate.wait)}, maximum_concurrent_rpcs=6)
    call = channel.unary_unary(path("Wait"))
    calls = [call(b"") for _ in range(6)]
    await gate.entries(6)
    assert server.node.inflight == 6
    rejected = [call(b"") for _ in range(4)]
    for c in rejected:
        assert await code_of(c) is grpc.StatusCode.RESOURCE_EXHAUSTED
    for c in calls[:2]:
        c.cancel()
    await eventually(lambda: gate.cancelled == 2)
    await eventually(lambda: server.node.inflight == 4)
    gate.open.set()
    assert [await c for c in calls[2:]] == [b""] * 4
    await eventually(lambda: server.node.inflight == 0)
    assert (gate.count, server.node.served, server.node.failed) == (6, 6, 0)


async def test_leases_are_adopted_or_refused(start: Start, segment: Segment) -> None:
    gate = Gate()
    server, channel = await start(methods={"Wait": Method(gate.wait)})
    call = channel.unary_unary(path("Wait"))
    with Router(segment.name) as router:
        lease, lost = router.acquire("GREEN"), router.acquire("GREEN")
        lost.release()
        held = call(b"held", metadata=metadata(lease.token))
        await gate.entries(1)
        assert server.node.inflight == 1
        for token, code in (
            (lost.token, grpc.StatusCode.FAILED_PRECONDITION),
            ("nonsense", grpc.StatusCode.INVALID_ARGUMENT),
        ):
            refused = call(b"", metadata=metadata(token))
            assert await code_of(refused) is code
            found = dict(await refused.trailing_metadata())
            assert found[NODE_KEY] == "B"
            assert found.get(LEASE_LOST_KEY) == (token if token == lost.token else None)
        gate.open.set()
        assert await held == b"held"
        assert not lease.release()
    assert (gate.count, server.node.served, server.node.inflight) == (1, 1, 0)


async def test_of_several_leases_the_first_is_meant(start: Start, segment: Segment) -> None:
    """The channel puts its own before whatever interceptors add."""

    async def echo(request: bytes, context: Any) -> bytes:
        return request

    _, channel = await start(methods={"Echo": Method(echo)})
    call = channel.unary_unary(path("Echo"))
    with Router(segment.name) as router:
        lease = router.acquire("GREEN")
        two = (*metadata(lease.token), *metadata("nonsense"))
        assert await call(b"x", metadata=two) == b"x"
        assert not lease.release(), "it was adopted"


def _raises(error: Exception) -> Callable[..., Any]:
    async def handler(request: bytes, context: Any) -> bytes:
        raise error

    return handler


def _aborts(code: grpc.StatusCode) -> Callable[..., Any]:
    async def handler(request: bytes, context: Any) -> bytes:
        await context.abort(code, "no", (("mine", "kept"),))
        raise AssertionError

    return handler


def _sets(code: grpc.StatusCode) -> Callable[..., Any]:
    async def handler(request: bytes, context: Any) -> bytes:
        context.set_trailing_metadata((("mine", "kept"),))
        context.set_code(code)
        return request

    return handler


@pytest.mark.parametrize(
    ("handler", "code", "failed"),
    [
        (_raises(KeyError("x")), grpc.StatusCode.UNKNOWN, 1),
        (_aborts(grpc.StatusCode.INTERNAL), grpc.StatusCode.INTERNAL, 1),
        (_aborts(grpc.StatusCode.UNAVAILABLE), grpc.StatusCode.UNAVAILABLE, 1),
        (_sets(grpc.StatusCode.DATA_LOSS), grpc.StatusCode.DATA_LOSS, 1),
        (_aborts(grpc.StatusCode.INVALID_ARGUMENT), grpc.StatusCode.INVALID_ARGUMENT, 0),
        (_sets(grpc.StatusCode.NOT_FOUND), grpc.StatusCode.NOT_FOUND, 0),
        (_raises(Saturated("full", 0.25)), grpc.StatusCode.RESOURCE_EXHAUSTED, 0),
        (_raises(NoBackend("nobody")), grpc.StatusCode.UNAVAILABLE, 1),
    ],
)
@pytest.mark.parametrize("kind", ["coroutine", "generator", "plain", "plain generator"])
async def test_faults_of_the_server_count_as_failed(
    start: Start, handler: Any, code: grpc.StatusCode, failed: int, kind: str
) -> None:
    async def generator(request: bytes, context: Any) -> AsyncIterator[Any]:
        yield await handler(request, context)

    def plain(request: bytes, context: Any) -> bytes:
        return asyncio.run(handler(request, _Awaitable(context)))

    def plain_generator(request: bytes, context: Any) -> Iterator[Any]:
        yield plain(request, context)

    behavior = {
        "coroutine": handler,
        "generator": generator,
        "plain": plain,
        "plain generator": plain_generator,
    }[kind]
    streams = kind.endswith("generator")
    server, channel = await start(methods={"Do": Method(behavior, False, streams)})
    call: Any
    if streams:
        call = channel.unary_stream(path("Do"))(b"")
        with contextlib.suppress(grpc.aio.AioRpcError):
            assert [response async for response in call] == [b""]
    else:
        call = channel.unary_unary(path("Do"))(b"")
    assert await code_of(call) is code
    found = dict(await call.trailing_metadata())
    assert found[NODE_KEY] == "B"
    if code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND):
        assert found["mine"] == "kept"
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        assert found["grpc-retry-pushback-ms"] == "250"
    await eventually(lambda: server.node.served == 1)
    assert (server.node.inflight, server.node.failed) == (0, failed)


class _Awaitable:
    """The context of a plain handler, for a coroutine."""

    def __init__(self, context: Any) -> None:
        self._context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def abort(self, *args: Any) -> None:
        self._context.abort(*args)


async def test_a_deadline_that_passes_in_the_handler_is_a_fault(start: Start) -> None:
    gate = Gate()
    server, channel = await start(methods={"Wait": Method(gate.wait)})
    call = channel.unary_unary(path("Wait"))(b"", timeout=0.2)
    assert await code_of(call) is grpc.StatusCode.DEADLINE_EXCEEDED
    await eventually(lambda: server.node.served == 1)
    assert (server.node.inflight, server.node.failed) == (0, 1)


async def test_a_stream_that_the_client_leaves_is_ended(start: Start) -> None:
    """Also while the server is kept from sending, since its client does not read."""
    closed = []

    async def endless(request: bytes, context: Any) -> AsyncIterator[bytes]:
        try:
            while True:
                yield request * 100_000
        finally:
            closed.append(1)

    server, channel = await start(methods={"Endless": Method(endless, False, True)})
    streams = [channel.unary_stream(path("Endless"))(b"x") for _ in range(3)]
    for stream in streams:
        assert len(await stream.read()) == 100_000
    assert server.node.inflight == 3
    await asyncio.sleep(0.05)  # until what is in flight fills the windows
    for stream in streams:
        stream.cancel()
    await eventually(lambda: server.node.inflight == 0)
    await eventually(lambda: len(closed) == 3)
    assert (server.node.served, server.node.failed) == (3, 0)


async def test_draining_serves_leases_of_before_and_refuses_the_rest(
    start: Start, segment: Segment
) -> None:
    gate = Gate()
    seen: list[Any] = []

    class Health:
        async def enter_graceful_shutdown(self) -> None:
            seen.append(segment.status("B").state)

    server, channel = await start(methods={"Wait": Method(gate.wait)}, health=Health())
    node = server.node
    call = channel.unary_unary(path("Wait"))
    with Router(segment.name) as router:
        lease = router.acquire("GREEN")
        running = call(b"")
        await gate.entries(1)
        stopping = asyncio.ensure_future(server.stop(20))
        await eventually(lambda: seen)
        assert seen == [State.DRAINING]
        fresh = call(b"")
        assert await code_of(fresh) is grpc.StatusCode.UNAVAILABLE
        assert "draining" in await fresh.details()
        held = call(b"", metadata=metadata(lease.token))
        await gate.entries(1)
        assert not stopping.done()
        gate.open.set()
        assert [await code_of(c) for c in (running, held)] == [grpc.StatusCode.OK] * 2
    await asyncio.wait_for(stopping, 10)
    assert await server.wait_for_termination(0) is False
    assert node.left
    assert (node.served, gate.count) == (2, 2)
    assert segment.snapshot() == ()


@pytest.mark.parametrize("grace", [None, 0.1])
async def test_whoever_has_no_answer_is_told_unavailable(start: Start, grace: float | None) -> None:
    """Never CANCELLED, which no client retries: what runs, and what comes meanwhile."""
    gate = Gate()

    async def each(request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield request
        await gate.wait(request, context)

    server, channel = await start(
        methods={"Wait": Method(gate.wait), "Each": Method(each, False, True)}
    )
    call = channel.unary_unary(path("Wait"))
    calls: list[Any] = [call(b"") for _ in range(3)]
    calls += [channel.unary_stream(path("Each"))(b"") for _ in range(3)]
    await gate.entries(6)
    for stream in calls[3:]:
        assert await stream.read() == b""
    codes: list[grpc.StatusCode] = []
    over = asyncio.Event()

    async def arrive() -> None:
        while not over.is_set():
            codes.append(await code_of(call(b"", timeout=5)))

    arriving = asyncio.ensure_future(arrive())
    await asyncio.wait_for(server.stop(grace), 10)
    assert [await code_of(c) for c in calls] == [grpc.StatusCode.UNAVAILABLE] * 6
    # The handlers of these said so themselves.
    assert {await c.details() for c in calls} == {"node B is stopping"}
    await eventually(lambda: len(codes) > 3)
    over.set()
    await arriving
    assert set(codes) == {grpc.StatusCode.UNAVAILABLE}
    assert gate.cancelled >= 6


async def test_a_second_stop_shortens_the_first(start: Start) -> None:
    gate = Gate()
    server, channel = await start(methods={"Wait": Method(gate.wait)})
    call = channel.unary_unary(path("Wait"))(b"")
    await gate.entries(1)
    first = asyncio.ensure_future(server.stop(60))
    assert await server.wait_for_termination(0.05) is True
    assert not first.done()
    await asyncio.wait_for(server.stop(None), 5)
    await asyncio.wait_for(first, 1)
    assert await code_of(call) is grpc.StatusCode.UNAVAILABLE


async def test_starting_and_stopping_out_of_order(segment: Segment) -> None:
    def new(node: str = "B", **options: Any) -> Any:
        return shmcoord.grpc.aio.server(node=node, segment=segment.name, group="GREEN", **options)

    never = new()
    with pytest.raises(ValueError, match="no port"):
        await never.start()
    with pytest.raises(RuntimeError, match="start it first"):
        never.node  # noqa: B018
    await never.stop(None)

    server = new()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    with pytest.raises(ValueError, match="already-started"):
        await server.start()
    other = new("C")
    with pytest.raises(RuntimeError, match="bind"):
        other.add_insecure_port(f"127.0.0.1:{port}")
    await other.stop(None)

    twin = new("B")
    twin_port = twin.add_insecure_port("127.0.0.1:0")
    with pytest.raises(NodeExists):
        await twin.start()
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", twin_port)):
        pass
    await twin.stop(None)
    assert server.node.state is State.IDLE
    await server.stop(None)


async def test_over_a_unix_socket(segment: Segment, tmp_path: Path) -> None:
    gate = Gate()
    server = shmcoord.grpc.aio.server(node="B", segment=segment, group="GREEN")
    server.add_generic_rpc_handlers((service(Wait=Method(gate.wait)),))
    address = f"unix:{tmp_path}/socket"
    server.add_insecure_port(address)
    await server.start()
    assert segment.status("B").endpoint == address
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.unary_unary(path("Wait"))(b"")
        await gate.entries(1)
        await server.stop(0.05)
        assert await code_of(call) is grpc.StatusCode.UNAVAILABLE
    assert not (tmp_path / "socket").exists()
    assert segment.snapshot() == ()  # a segment that was given stays open


async def test_a_server_of_ones_own(segment: Segment) -> None:
    plug = shmcoord.grpc.aio.instrument(node="B", segment=segment.name, group="GREEN", capacity=2)
    gate = Gate()
    server = grpc.aio.server(
        plug.executor(),
        handlers=[*plug.handlers, service(Wait=Method(gate.wait))],
        interceptors=[plug.interceptor],
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    with pytest.raises(ValueError, match="endpoint"):
        plug.start()
    plug.start(f"127.0.0.1:{port}")
    with pytest.raises(ValueError, match="before"):
        plug.start(f"127.0.0.1:{port}")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary(path("Wait"))
        first = call(b"")
        await gate.entries(1)
        assert segment.status("B").inflight == 1
        await plug.drain()
        assert segment.status("B").state is State.DRAINING
        assert await plug.wait_idle(0.05) is False
        assert await plug.abort_running() is True
        assert await code_of(first) is grpc.StatusCode.UNAVAILABLE
        assert await plug.wait_idle(5) is True
    await server.stop(None)
    plug.stop()
    plug.stop()
    assert segment.snapshot() == ()


@pytest.mark.parametrize("plain", [False, True])
async def test_excluded_methods_are_no_load_but_their_end_is_waited_for(
    start: Start, segment: Segment, plain: bool
) -> None:
    entered, leave = threading.Event(), threading.Event()
    seen = []

    def note() -> None:
        status = segment.status("B")
        seen.append((status.inflight, status.waiting, status.state))
        entered.set()

    async def ask(request: bytes, context: Any) -> bytes:
        note()
        while not leave.is_set():
            await asyncio.sleep(0.005)
        return request

    def ask_plainly(request: bytes, context: Any) -> bytes:
        note()
        assert leave.wait(10)
        return request

    server, channel = await start(
        methods={"Ask": Method(ask_plainly if plain else ask)}, exclude=[path("As")]
    )
    call = channel.unary_unary(path("Ask"))(b"x")
    await eventually(entered.is_set)
    stopping = asyncio.create_task(server.stop(30))
    await eventually(lambda: segment.status("B").state is State.DRAINING)
    assert not stopping.done()
    entered.clear()
    second = channel.unary_unary(path("Ask"))(b"y")
    await eventually(entered.is_set)
    leave.set()
    assert (await call, await second) == (b"x", b"y")
    await stopping
    assert seen == [(0, 0, State.IDLE), (0, 0, State.DRAINING)]
    assert server.node.served == 0
