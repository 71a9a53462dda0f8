"""The gRPC transports against real servers: what was certainly not sent, and what may have been."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import re
import socket
import threading
import time
from concurrent import futures
from pathlib import Path

import grpc
import grpc.aio
import pytest
from dispatch_fakes import FakeRouter

from shmcoord.dispatch import AsyncDispatcher, Dispatcher, NoneReachable
from shmcoord.errors import LeaseLost
from shmcoord.transport import AsyncTransport, ConnectionLost, Transport, Unreachable
from shmcoord.transport import grpc as transport_grpc
from shmcoord.transport.grpc import (
    LEASE_KEY,
    AsyncGrpcTransport,
    GrpcTransport,
    lease_token,
    refuse_lost_lease,
    refuse_lost_lease_async,
)


class Stub:
    """What generated code would hold, with strings for messages."""

    def __init__(self, channel):
        codec = {"request_serializer": str.encode, "response_deserializer": bytes.decode}
        self.Say = channel.unary_unary("/test.Echo/Say", **codec)
        self.Count = channel.unary_stream("/test.Echo/Count", **codec)
        self.Gather = channel.stream_unary("/test.Echo/Gather", **codec)


def handlers(say, count):
    codec = {"request_deserializer": bytes.decode, "response_serializer": str.encode}
    return grpc.method_handlers_generic_handler(
        "test.Echo",
        {
            "Say": grpc.unary_unary_rpc_method_handler(say, **codec),
            "Count": grpc.unary_stream_rpc_method_handler(count, **codec),
        },
    )


class Node:
    """A threaded server whose answers the request asks for."""

    def __init__(self, port=0):
        self.seen = []
        self.ended = threading.Event()
        self.hold = threading.Event()
        self.server = grpc.server(
            futures.ThreadPoolExecutor(4), options=(("grpc.so_reuseport", 0),)
        )
        self.server.add_generic_rpc_handlers((handlers(self.say, self.count),))
        self.port = self.server.add_insecure_port(f"127.0.0.1:{port}")
        self.endpoint = f"127.0.0.1:{self.port}"
        self.server.start()

    def say(self, request, context):
        self.seen.append((request, lease_token(context)))
        if request == "lost":
            refuse_lost_lease(context)
        if request == "hold":
            self.hold.wait(30)
        if request in grpc.StatusCode.__members__:
            context.abort(grpc.StatusCode[request], f"said {request}")
        return request.upper()

    def count(self, request, context):
        self.seen.append((request, lease_token(context)))
        context.add_callback(self.ended.set)
        if request == "lost":
            refuse_lost_lease(context)
        for number in range(int(request)):
            yield str(number)
        while request == "3" and context.is_active() and not self.ended.is_set():
            time.sleep(0.005)

    def stop(self, grace=None):
        self.hold.set()
        return self.server.stop(grace).wait(10)


@pytest.fixture
def node():
    node = Node()
    yield node
    node.stop()


@pytest.fixture
def transport():
    with GrpcTransport(stub=Stub) as transport:
        yield transport


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def send(transport, endpoint, request="hello", method="Say", timeout_s=10.0):
    return transport.send(endpoint, method, request, lease="token", timeout_s=timeout_s)


class Either:
    """Runs a test against the transport of threads and against that of an event loop."""

    def __init__(self, loop):
        self.loop = loop
        make = GrpcTransport if loop is None else AsyncGrpcTransport
        self.make = lambda **options: make(stub=Stub, **options)
        self.transport = self.make()

    def send(self, endpoint, *args, transport=None, **options):
        transport = transport or self.transport
        result = send(transport, endpoint, *args, **options)
        return result if self.loop is None else self.loop.run_until_complete(result)

    def close(self):
        result = self.transport.close()
        if self.loop is not None:
            self.loop.run_until_complete(result)


@pytest.fixture(params=["threads", "asyncio"])
def either(request):
    loop = asyncio.new_event_loop() if request.param == "asyncio" else None
    either = Either(loop)
    yield either
    either.close()
    if loop is not None:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def test_they_follow_the_protocols():
    assert isinstance(GrpcTransport(stub=Stub), Transport)
    assert isinstance(AsyncGrpcTransport(stub=Stub), AsyncTransport)


def test_a_request_goes_there_and_the_token_with_it(either, node):
    assert either.send(node.endpoint) == "HELLO"
    assert either.send(node.endpoint, timeout_s=None) == "HELLO"
    assert node.seen == [("hello", "token")] * 2


def test_there_is_one_channel_per_endpoint(node):
    made = []

    def stub(channel):
        made.append(channel)
        return Stub(channel)

    with GrpcTransport(stub=stub) as transport:
        assert made == []
        for _ in range(3):
            send(transport, node.endpoint)
    assert len(made) == 1


def test_nobody_listening_is_unreachable_at_once(either):
    began = time.monotonic()
    for _ in range(2):
        with pytest.raises(Unreachable, match="does not accept"):
            either.send(f"127.0.0.1:{free_port()}")
    assert time.monotonic() - began < 1.0


def test_a_peer_that_never_speaks_is_unreachable_after_the_bound(either):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        endpoint = f"127.0.0.1:{silent.getsockname()[1]}"
        transport = either.make(connect_timeout_s=0.2)
        began = time.monotonic()
        with pytest.raises(Unreachable, match=r"within 0\.2 s"):
            either.send(endpoint, transport=transport)
        assert 0.15 < time.monotonic() - began < 2.0
        with pytest.raises(TimeoutError, match="connecting"):
            either.send(endpoint, transport=transport, timeout_s=0.05)
        closing = transport.close()
        if either.loop is not None:
            either.loop.run_until_complete(closing)


def test_a_node_that_comes_back_is_reached_at_once(either, node):
    assert either.send(node.endpoint) == "HELLO"
    node.stop()
    time.sleep(0.3)
    for _ in range(5):
        with pytest.raises(Unreachable):
            either.send(node.endpoint)
    again = Node(node.port)
    try:
        began = time.monotonic()
        assert either.send(node.endpoint) == "HELLO"
        assert time.monotonic() - began < 0.5
    finally:
        again.stop()


def test_a_refused_lease_is_a_lost_lease(either, node):
    with pytest.raises(LeaseLost, match="nothing was done"):
        either.send(node.endpoint, "lost")


def test_other_errors_are_grpcs_own(either, node):
    with pytest.raises(grpc.RpcError) as caught:
        either.send(node.endpoint, "FAILED_PRECONDITION")
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert not isinstance(caught.value, LeaseLost)
    with pytest.raises(grpc.RpcError) as caught:
        either.send(node.endpoint, "INTERNAL")
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert isinstance(caught.value, grpc.aio.AioRpcError) is (either.loop is not None)


def test_unavailable_is_a_lost_connection_and_grpcs_error_too(either, node):
    with pytest.raises(ConnectionLost, match="said UNAVAILABLE") as caught:
        either.send(node.endpoint, "UNAVAILABLE")
    error = caught.value
    assert isinstance(error, grpc.RpcError)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert error.details() == "said UNAVAILABLE"
    assert isinstance(error.__cause__, grpc.RpcError)
    if either.loop is not None:
        assert isinstance(error, grpc.aio.AioRpcError)
        assert type(pickle.loads(pickle.dumps(error))) is type(error)


def test_the_time_is_over_with_grpcs_status(either, node):
    with pytest.raises(grpc.RpcError) as caught:
        either.send(node.endpoint, "hold", timeout_s=0.1)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_wrong_methods_are_wrong_arguments(either, node):
    with pytest.raises(ValueError, match="Stub has no method 'Shout'; it has: Count, Gather, Say"):
        either.send(node.endpoint, method="Shout")
    with pytest.raises(ValueError, match="Count is not a UnaryUnary method"):
        either.send(node.endpoint, method="Count")
    assert node.seen == []


def test_a_closed_transport_refuses(either, node):
    either.close()
    with pytest.raises(RuntimeError, match="closed"):
        either.send(node.endpoint)


def test_calls_of_many_threads_share_the_channel(node, transport):
    with futures.ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(send, transport, node.endpoint, f"r{n}") for n in range(50)]
        assert sorted(c.result() for c in calls) == sorted(f"R{n}" for n in range(50))
    assert transport._links.open_links() == 1


def test_a_draining_node_still_answers_what_it_has(node, transport):
    """Its port is closed to new calls, which are unreachable; the running one ends well."""
    with futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(send, transport, node.endpoint, "hold")
        while not node.seen:
            time.sleep(0.005)
        stopped = node.server.stop(10)
        time.sleep(0.4)
        with pytest.raises((Unreachable, ConnectionLost)):
            send(transport, node.endpoint)
        with pytest.raises(Unreachable):
            send(transport, node.endpoint)
        assert not running.done()
        node.hold.set()
        assert running.result(10) == "HOLD"
        assert stopped.wait(10)
    assert transport._links.open_links() == 0


def test_a_transport_belongs_to_one_loop(node):
    transport = AsyncGrpcTransport(stub=Stub)

    async def call():
        return await send(transport, node.endpoint)

    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
    assert first.run_until_complete(call()) == "HELLO"
    with pytest.raises(RuntimeError, match="another event loop"):
        second.run_until_complete(call())
    first.run_until_complete(transport.close())
    first.close()
    second.close()


# --- streams


@contextlib.asynccontextmanager
async def streaming(node, request, timeout_s=10.0):
    async with AsyncGrpcTransport(stub=Stub) as transport:
        yield transport.stream(node.endpoint, "Count", request, lease="token", timeout_s=timeout_s)


async def test_a_stream_yields_as_it_comes(node):
    async with streaming(node, "2") as stream:
        assert [answer async for answer in stream] == ["0", "1"]
    assert node.seen == [("2", "token")]


async def test_a_refused_stream_is_a_lost_lease(node):
    async with streaming(node, "lost") as stream:
        with pytest.raises(LeaseLost):
            await anext(stream)


async def test_closing_a_stream_ends_the_call_on_the_node(node):
    async with streaming(node, "3") as stream:
        assert await anext(stream) == "0"
        await stream.aclose()
        assert await asyncio.to_thread(node.ended.wait, 5)


async def test_the_deadline_of_a_stream_covers_all_of_it(node):
    async with streaming(node, "3", timeout_s=0.3) as stream:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            [_ async for _ in stream]
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_streams_have_stream_methods():
    async with AsyncGrpcTransport(stub=Stub) as transport:
        stream = transport.stream("127.0.0.1:1", "Say", "", lease="token", timeout_s=1.0)
        with pytest.raises(ValueError, match="not a UnaryStream method"):
            await anext(stream)


# --- under a dispatcher


class EndpointRouter(FakeRouter):
    """Nodes are named by their endpoints."""

    def acquire(self, *args, **options):
        lease = super().acquire(*args, **options)
        lease.endpoint = lease.node
        return lease


def test_a_stopped_node_is_passed_by_threads(node, transport):
    gone = Node()
    router = EndpointRouter([gone.endpoint, node.endpoint])
    dispatcher = Dispatcher(router, transport)
    assert dispatcher.call("GREEN", "Say", "one") == "ONE"
    assert gone.seen
    gone.stop()
    time.sleep(0.3)
    assert dispatcher.call("GREEN", "Say", "two") == "TWO"
    assert [request for request, _ in node.seen] == ["two"]
    node.stop()
    time.sleep(0.3)
    with pytest.raises(NoneReachable, match=gone.endpoint):
        dispatcher.call("GREEN", "Say", "three")
    assert router.held == []


async def test_a_stopped_node_is_passed_on_a_loop(node):
    gone = Node()
    router = EndpointRouter([gone.endpoint, node.endpoint])
    async with AsyncGrpcTransport(stub=Stub) as transport:
        dispatcher = AsyncDispatcher(router, transport)
        assert await dispatcher.call("GREEN", "Say", "one") == "ONE"
        await asyncio.to_thread(gone.stop)
        await asyncio.sleep(0.1)
        assert await dispatcher.call("GREEN", "Say", "two") == "TWO"
        answers = [answer async for answer in dispatcher.stream("GREEN", "Count", "2")]
        assert answers == ["0", "1"]
    assert router.held == []


async def test_a_cancelled_call_is_cancelled_on_the_node():
    cancelled = asyncio.Event()
    started = asyncio.Event()

    async def say(request, context):
        started.set()
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    server = grpc.aio.server()
    server.add_generic_rpc_handlers((handlers(say, None),))
    endpoint = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    router = EndpointRouter([endpoint])
    async with AsyncGrpcTransport(stub=Stub) as transport:
        call = asyncio.ensure_future(AsyncDispatcher(router, transport).call("G", "Say", "x"))
        await started.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert router.held == []
        await asyncio.wait_for(cancelled.wait(), 5)
    await server.stop(None)


async def test_an_aio_node_refuses_a_lost_lease():
    async def say(request, context):
        assert lease_token(context) == "token-0"
        await refuse_lost_lease_async(context)

    server = grpc.aio.server()
    server.add_generic_rpc_handlers((handlers(say, None),))
    endpoint = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    async with AsyncGrpcTransport(stub=Stub) as transport:
        dispatcher = AsyncDispatcher(EndpointRouter([endpoint]), transport)
        with pytest.raises(NoneReachable, match="nothing was done"):
            await dispatcher.call("GREEN", "Say", "x")
    await server.stop(None)


def test_a_request_without_lease_has_no_token(node):
    with grpc.insecure_channel(node.endpoint) as channel:
        Stub(channel).Say("plain")
        Stub(channel).Say("bytes", metadata=((LEASE_KEY, "t"),))
    assert node.seen == [("plain", None), ("bytes", "t")]


def test_nothing_private_of_grpc_is_used():
    for file in Path(transport_grpc.__file__).parent.glob("*.py"):
        text = file.read_text()
        assert not re.search(r"\bgrpc\._|\bgrpc\.aio\._", text), file
        assert "cygrpc" not in text
