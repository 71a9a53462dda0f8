"""The aio channel: waiting for capacity and for nodes, connectivity, and the end of a channel."""

from __future__ import annotations

import asyncio
import socket
import time

import grpc
import grpc.aio
import pytest
from grpc_aio_nodes import Node, Stub, held, nothing_held

import shmcoord.grpc

State = grpc.ChannelConnectivity


@pytest.fixture
def open_channel(segment):
    def make(**options):
        return shmcoord.grpc.aio.channel(segment, group="GREEN", **options)

    return make


@pytest.fixture
def closed_port():
    """A port on which nobody listens, and on which nobody else will."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{sock.getsockname()[1]}"


# --- capacity


async def test_calls_wait_for_capacity_in_order(segment, open_channel):
    async with Node(segment, capacity=1) as node, open_channel() as channel:
        stub = Stub(channel)
        await stub.Say("x")
        node.arrived.clear()
        first = stub.Say("hold")
        await node.arrived.wait()
        order = []
        waiting = []
        for index in range(10):
            call = stub.Say(str(index))
            call.add_done_callback(lambda call, index=index: order.append(index))
            waiting.append(call)
        assert not any(call.done() for call in waiting)
        assert node.seen["Say"] == 2
        node.let_go.set()
        assert await first == "A: hold"
        assert await asyncio.gather(*waiting) == [f"A: {index}" for index in range(10)]
        assert order == list(range(10))
        await nothing_held(segment)


async def test_max_wait_bounds_the_wait(segment, open_channel):
    async with Node(segment, capacity=1) as node, open_channel(max_wait_s=0.1) as channel:
        stub = Stub(channel)
        first = stub.Say("hold")
        await node.arrived.wait()
        began = time.monotonic()
        assert await stub.Say("x").code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert 0.09 < time.monotonic() - began < 2.0
        with_deadline = stub.Say("y", timeout=5.0)
        await asyncio.sleep(0.2)
        assert not with_deadline.done()
        node.let_go.set()
        assert await with_deadline == "A: y"
        await first


async def test_cancelling_calls_that_wait(segment, open_channel):
    async with Node(segment, capacity=1) as node, open_channel() as channel:
        stub = Stub(channel)
        first = stub.Say("hold")
        await node.arrived.wait()
        calls = [stub.Say("x"), stub.Count(" 1"), stub.Gather(iter("x")), stub.Chat()]
        for call in calls:
            told = []
            call.add_done_callback(told.append)
            code = asyncio.ensure_future(call.code())
            await asyncio.sleep(0)
            assert call.cancel()
            assert not call.cancel()
            assert call.cancelled()
            assert call.done()
            assert told == [call]
            assert await code is grpc.StatusCode.CANCELLED
            assert await call.details() == "Locally cancelled by application!"
            with pytest.raises(asyncio.CancelledError):
                await (call if hasattr(call, "__await__") else call.read())
        task = asyncio.ensure_future(stub.Say("y"))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        node.let_go.set()
        assert await first == "A: hold"
        assert node.seen == {"Say": 1}
        assert not channel._routes.waiting
        await nothing_held(segment)


# --- nodes


@pytest.mark.parametrize("ghost", [False, True])
async def test_a_node_that_joins_late_is_found(segment, open_channel, closed_port, ghost):
    """Also where the only node there is does not answer."""
    dead = segment.join("dead", group="GREEN", endpoint=closed_port) if ghost else None
    async with open_channel() as channel:
        stub = Stub(channel)
        assert await stub.Say("x").code() is grpc.StatusCode.UNAVAILABLE
        calls = [
            stub.Say("x", wait_for_ready=True, timeout=10.0),
            stub.Say("x", wait_for_ready=True),
            stub.Gather(iter("ab"), wait_for_ready=True),
        ]
        await asyncio.sleep(0.2)
        assert not any(call.done() for call in calls)
        node = await Node(segment).start(join=False)
        before = time.process_time()
        await asyncio.sleep(0.3)
        assert time.process_time() - before < 0.2, "it is a busy loop"
        node.join()
        joined = time.monotonic()
        assert await asyncio.gather(*calls) == ["A: x", "A: x", "A: a+b"]
        assert time.monotonic() - joined < 0.5
        await node.stop()
        await nothing_held(segment)
    if dead is not None:
        dead.leave()


@pytest.mark.parametrize("ghost", [False, True])
async def test_waiting_for_a_node_ends_with_the_deadline(segment, open_channel, closed_port, ghost):
    dead = segment.join("dead", group="GREEN", endpoint=closed_port) if ghost else None
    async with open_channel(max_wait_s=0.3) as channel:
        stub = Stub(channel)
        left = channel._routes.router.retry_budget().left
        began = time.monotonic()
        call = stub.Say("x", wait_for_ready=True, timeout=0.2)
        assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert 0.19 < time.monotonic() - began < 1.0
        began = time.monotonic()
        call = stub.Count(" 1", wait_for_ready=True)
        assert await call.code() is grpc.StatusCode.UNAVAILABLE
        assert 0.29 < time.monotonic() - began < 1.5
        assert channel._routes.router.retry_budget().left >= left
        await nothing_held(segment)
    if dead is not None:
        dead.leave()


async def test_a_node_whose_port_opens_late(segment, open_channel, tmp_path):
    """It has joined before it serves: the same node is tried again."""
    address = f"unix:{tmp_path}/node"
    early = segment.join("A", group="GREEN", endpoint=address, interval_s=0.05)
    async with open_channel() as channel:
        call = Stub(channel).Say("x", wait_for_ready=True, timeout=10.0)
        await asyncio.sleep(0.3)
        assert not call.done()
        server = await Node(segment, address=address).start(join=False)
        server.node = early
        assert await call == "A: x"
        await server.server.stop(None)
    early.leave()


async def test_the_time_for_a_connection_is_bounded(segment, open_channel):
    """A node that accepts and says nothing: no connection comes of it."""

    writers = []

    async def say_nothing(reader, writer):
        writers.append(writer)

    silent = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    endpoint = f"127.0.0.1:{silent.sockets[0].getsockname()[1]}"
    mute = segment.join("mute", group="GREEN", endpoint=endpoint, interval_s=0.05)
    async with open_channel(connect_timeout_s=0.15) as channel:
        stub = Stub(channel)
        began = time.monotonic()
        call = stub.Say("x")
        assert await call.code() is grpc.StatusCode.UNAVAILABLE
        assert "within 0.15 s" in await call.details()
        assert 0.14 < time.monotonic() - began < 1.0
        call = stub.Say("x", timeout=0.05)
        assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        task = asyncio.ensure_future(stub.Say("x"))
        while not held(segment):
            await asyncio.sleep(0.005)
        task.cancel()  # while it connects
        with pytest.raises(asyncio.CancelledError):
            await task
        await nothing_held(segment)
        assert all(link.calls == 0 for link in channel._routes.links._open)
    mute.leave()
    silent.close()
    for writer in writers:  # gRPC goes on with its handshake for a while
        writer.close()
    await silent.wait_closed()


# --- connectivity


async def test_connectivity(segment, open_channel):
    channel = open_channel()
    assert channel.get_state() is State.TRANSIENT_FAILURE  # nobody is there
    ready = asyncio.ensure_future(channel.channel_ready())
    changed = asyncio.ensure_future(channel.wait_for_state_change(State.TRANSIENT_FAILURE))
    await asyncio.sleep(0.05)
    assert not ready.done()
    assert not changed.done()
    async with Node(segment, "A") as node:
        await asyncio.wait_for(ready, 5)
        await asyncio.wait_for(changed, 5)
        assert channel.get_state() is State.READY
        async with Node(segment, "B"):
            assert channel.get_state() is State.READY  # any will do
            changed = asyncio.ensure_future(channel.wait_for_state_change(State.READY))
            await node.stop()
            await asyncio.wait_for(changed, 5)
            assert channel.get_state() in (State.IDLE, State.CONNECTING)
            assert channel.get_state(try_to_connect=True) is not State.TRANSIENT_FAILURE
            await asyncio.wait_for(channel.channel_ready(), 5)
    await channel.close()
    assert channel.get_state() is State.SHUTDOWN
    with pytest.raises(grpc.aio.UsageError):
        await channel.wait_for_state_change(State.SHUTDOWN)
    with pytest.raises(grpc.aio.UsageError):
        await channel.channel_ready()


async def test_a_port_that_is_closed_is_a_transient_failure(segment, open_channel, closed_port):
    with segment.join("dead", group="GREEN", endpoint=closed_port):
        async with open_channel() as channel:
            assert channel.get_state() is State.IDLE
            assert channel.get_state(try_to_connect=True) is not State.READY
            states = set()
            for _ in range(200):
                states.add(channel.get_state())
                await asyncio.sleep(0.002)
            assert State.TRANSIENT_FAILURE in states


# --- the end


async def test_closing_cancels_what_is_under_way(segment, open_channel):
    async with Node(segment, capacity=2) as node:
        channel = open_channel()
        stub = Stub(channel)
        calls = [stub.Say("hold"), stub.Count("then hold 1")]
        await calls[1].read()
        while node.done.total() < 2:
            await asyncio.sleep(0.005)
        calls.append(stub.Say("x"))  # waits for capacity
        watching = asyncio.ensure_future(channel.wait_for_state_change(State.READY))
        await asyncio.sleep(0)
        await channel.close()
        assert all(call.cancelled() for call in calls)
        with pytest.raises(asyncio.CancelledError):
            await calls[0]
        await asyncio.wait_for(watching, 5)
        await asyncio.wait_for(node.cancelled.wait(), 5)
        await nothing_held(segment)
        for attempt in (stub.Say, stub.Count, stub.Gather, stub.Chat):
            with pytest.raises(grpc.aio.UsageError, match="closed"):
                attempt("x")
        await channel.close()


async def test_closing_with_grace_lets_calls_end(segment, open_channel):
    async with Node(segment, capacity=1) as node:
        channel = open_channel()
        stub = Stub(channel)
        calls = [stub.Say("hold"), stub.Say("x")]  # the second waits for the first
        await node.arrived.wait()
        with pytest.raises(ValueError, match="non-negative"):
            await channel.close(-1)
        closing = asyncio.ensure_future(channel.close(5.0))
        await asyncio.sleep(0.05)
        assert not closing.done()
        with pytest.raises(grpc.aio.UsageError):
            stub.Say("late")
        node.let_go.set()
        await asyncio.wait_for(closing, 3.0)
        assert [await call for call in calls] == ["A: hold", "A: x"]


async def test_grace_ends(segment, open_channel):
    async with Node(segment):
        channel = open_channel()
        call = Stub(channel).Say("hold")
        while not held(segment):
            await asyncio.sleep(0.005)
        began = time.monotonic()
        await channel.close(0.1)
        assert 0.09 < time.monotonic() - began < 1.0
        assert call.cancelled()
        await nothing_held(segment)
