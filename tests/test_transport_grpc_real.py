"""Dispatchers, gRPC and nodes that are killed: what ran is not run again, and nothing leaks."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter

import grpc
import pytest
from helpers import wait_until

from shmcoord import AsyncDispatcher, Dispatcher, Health, Router
from shmcoord.transport import ConnectionLost
from shmcoord.transport.grpc import AsyncGrpcTransport, GrpcTransport

NODE = """
say_line = say  # the servicer below takes over the name
import asyncio, grpc, grpc.aio
from shmcoord.transport.grpc import lease_token, refuse_lost_lease_async

async def adopt(context):
    try:
        return node.adopt(lease_token(context))
    except LeaseLost:
        await refuse_lost_lease_async(context)

async def say(request, context):
    if request == "hold before":
        await asyncio.sleep(60)
    with await adopt(context):
        if request == "hold":
            await asyncio.sleep(60)
        return node.name.encode()

async def count(request, context):
    with await adopt(context):
        for number in range(int(request)):
            yield f"{node.name} {number}".encode()
        if request == "3":
            await asyncio.sleep(60)

async def main():
    global node
    server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    codec = {"request_deserializer": bytes.decode}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Node", {
        "Say": grpc.unary_unary_rpc_method_handler(say, **codec),
        "Count": grpc.unary_stream_rpc_method_handler(count, **codec),
    }),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    node = Segment.open(name).join(
        sys.argv[2], group="GREEN", endpoint=f"127.0.0.1:{port}", interval_s=0.05
    )
    say_line("joined")
    await asyncio.to_thread(hear)
    await server.stop(None)

asyncio.run(main())
"""


class Stub:
    def __init__(self, channel):
        codec = {"request_serializer": str.encode, "response_deserializer": bytes.decode}
        self.Say = channel.unary_unary("/test.Node/Say", **codec)
        self.Count = channel.unary_stream("/test.Node/Count", **codec)


@pytest.fixture
def nodes(name, segment, spawn):
    """Two processes that serve gRPC, by the name of their node."""
    children = {node: spawn(NODE, name, node) for node in "AB"}
    for child in children.values():
        assert child.hear() == "joined"
    return children


@pytest.fixture
def router(segment):
    with Router(segment) as router:
        yield router


def inflight(segment):
    return {status.node: status.inflight for status in segment.snapshot()}


def busy(segment):
    """The node that has a request, once there is one that it has adopted or reserved."""
    wait_until(lambda: any(inflight(segment).values()))
    return next(node for node, count in inflight(segment).items() if count)


def nothing_held(segment):
    segment.reap()
    return not any(inflight(segment).values())


@pytest.mark.parametrize("request_", ["hold", "hold before"])
def test_a_killed_nodes_request_runs_again_only_if_it_had_not_begun(
    segment, nodes, router, request_
):
    results = []
    with GrpcTransport(stub=Stub) as transport:
        dispatcher = Dispatcher(router, transport, adopts=True)
        for _ in range(4):
            dispatcher.call("GREEN", "Say", "warm up")
        before = {status.node: status.served for status in segment.snapshot()}

        def call():
            try:
                results.append(dispatcher.call("GREEN", "Say", request_, timeout_s=1.5))
            except grpc.RpcError as error:
                results.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        victim = busy(segment)
        time.sleep(0.2)
        nodes[victim].kill()
        thread.join()
    [result] = results
    [other] = set("AB") - {victim}
    if request_ == "hold":
        assert isinstance(result, ConnectionLost)
        assert segment.status(other).served == before[other]
    else:  # sent to the other node too, which holds it until the deadline
        assert result.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    wait_until(lambda: nothing_held(segment))


async def test_calls_go_on_while_nodes_are_killed(segment, nodes, router):
    counts = Counter()
    errors = []

    async def client(dispatcher):
        while not stop.is_set():
            try:
                counts[await dispatcher.call("GREEN", "Say", "x", timeout_s=5.0)] += 1
            except ConnectionLost as error:
                errors.append(error)

    stop = asyncio.Event()
    async with AsyncGrpcTransport(stub=Stub) as transport:
        dispatcher = AsyncDispatcher(router, transport, adopts=True)
        clients = [asyncio.ensure_future(client(dispatcher)) for _ in range(4)]
        await asyncio.sleep(0.3)
        assert set(counts) == {"A", "B"}
        await asyncio.to_thread(nodes["A"].kill)
        done = counts["B"]
        await asyncio.sleep(0.3)
        stop.set()
        await asyncio.gather(*clients)
    assert counts["B"] > done
    assert len(errors) <= 4, "at most what had been adopted"
    assert [s.health for s in segment.snapshot() if s.node == "A"] in ([], [Health.DEAD])
    await asyncio.to_thread(wait_until, lambda: nothing_held(segment))


async def test_a_stream_of_a_killed_node_fails_and_frees(segment, nodes, router):
    async with AsyncGrpcTransport(stub=Stub) as transport:
        dispatcher = AsyncDispatcher(router, transport, adopts=True)
        stream = dispatcher.stream("GREEN", "Count", "3", timeout_s=10.0)
        node, _, number = (await anext(stream)).partition(" ")
        assert (node, number) == (stream.node, "0")
        await asyncio.to_thread(nodes[node].kill)
        with pytest.raises(ConnectionLost):
            [_ async for _ in stream]
        [other] = set("AB") - {node}
        answers = [answer async for answer in dispatcher.stream("GREEN", "Count", "2")]
        assert answers == [f"{other} 0", f"{other} 1"]
    await asyncio.to_thread(wait_until, lambda: nothing_held(segment))


async def test_a_stream_that_is_given_up_ends_on_the_node(segment, nodes, router):
    async with AsyncGrpcTransport(stub=Stub) as transport:
        dispatcher = AsyncDispatcher(router, transport, adopts=True)
        async for _ in dispatcher.stream("GREEN", "Count", "3", timeout_s=30.0):
            assert sum(inflight(segment).values()) == 1
            break
        await asyncio.to_thread(wait_until, lambda: not any(inflight(segment).values()))
        call = asyncio.ensure_future(dispatcher.call("GREEN", "Say", "hold", timeout_s=30.0))
        await asyncio.to_thread(busy, segment)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await asyncio.to_thread(wait_until, lambda: not any(inflight(segment).values()))
