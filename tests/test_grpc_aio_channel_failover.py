"""The aio channel: when a call goes to another node, and when it must not."""

from __future__ import annotations

import asyncio
import socket

import grpc
import grpc.aio
import pytest
from grpc_aio_nodes import Node, Stub, held, nothing_held

import shmcoord.grpc
from shmcoord import NoBackend
from shmcoord.dispatch import NoneReachable
from shmcoord.grpc import served_by


@pytest.fixture
def open_channel(segment):
    def make(**options):
        return shmcoord.grpc.aio.channel(segment, group="GREEN", **options)

    return make


class Pair:
    """Two nodes; the first call goes to `first`, since `second` has something to do."""

    def __init__(self, segment, **options):
        self.first = Node(segment, "A", **options)
        self.second = Node(segment, "B", **options)

    async def __aenter__(self):
        await self.first.start()
        await self.second.start()
        return self

    async def __aexit__(self, *exc):
        await self.first.stop()
        await self.second.stop()

    async def warm_up(self, stub):
        """Connect to both nodes, and hear of both that they adopt; then make the second busy."""
        calls = [stub.Say("hold") for _ in range(2)]
        await self.first.arrived.wait()
        await self.second.arrived.wait()
        for node in (self.first, self.second):
            node.let_go.set()
        await asyncio.gather(*calls)
        for node in (self.first, self.second):
            node.let_go.clear()
            node.arrived.clear()
            node.seen.clear()
            node.done.clear()
        self.second.work = self.second.node.request()


def lose_first(node):
    """Have the node refuse the first request that comes, as if its lease had been reaped."""
    adopt = node.node.adopt

    class Once:
        def __getattr__(self, name):
            return getattr(real, name)

        def adopt(self, token):
            node.node = real
            return adopt("1-0-0-0-0-0")  # raises LeaseLost

    real, node.node = node.node, Once()


@pytest.mark.parametrize("awaited", ["at once", "later", "by callback", "by code"])
async def test_a_refused_lease_leads_elsewhere(segment, open_channel, awaited):
    async with Pair(segment) as nodes, open_channel() as channel:
        stub = Stub(channel)
        await nodes.warm_up(stub)
        lose_first(nodes.first)
        call = stub.Say("x")
        assert served_by.get() == "A"
        if awaited == "later":
            while not nodes.second.done:
                await asyncio.sleep(0.005)
            await nothing_held_but(segment, 1)
        elif awaited == "by callback":
            ended = asyncio.get_running_loop().create_future()
            call.add_done_callback(ended.set_result)
            assert await ended is call
            assert call.done()
            assert nodes.second.done == {"Say": 1}
        elif awaited == "by code":
            assert await call.code() is grpc.StatusCode.OK
            assert call.done()
        assert await call == "B: x"
        assert served_by.get() == "B"
        assert (await call.trailing_metadata())["shmcoord-node"] == "B"
        assert nodes.first.seen == nodes.second.seen == {"Say": 1}
        assert nodes.first.done == {}


async def nothing_held_but(segment, count):
    while held(segment) > count:
        await asyncio.sleep(0.005)


async def test_a_call_that_nobody_awaits_moves_too(segment, open_channel):
    async with Pair(segment) as nodes, open_channel() as channel:
        stub = Stub(channel)
        await nodes.warm_up(stub)
        lose_first(nodes.first)
        stub.Say("x")
        while not nodes.second.done:
            await asyncio.sleep(0.005)
        assert nodes.second.done == {"Say": 1}


async def test_a_refused_stream_leads_elsewhere(segment, open_channel):
    async with Pair(segment) as nodes, open_channel() as channel:
        stub = Stub(channel)
        await nodes.warm_up(stub)
        lose_first(nodes.first)
        assert [word async for word in stub.Count(" 2")] == ["B 0", "B 1"]
        lose_first(nodes.first)
        call = stub.Count(" 2")
        assert [await call.read() for _ in range(3)] in (
            ["B 0", "B 1", grpc.aio.EOF],
            ["A 0", "A 1", grpc.aio.EOF],
        )


async def test_consumed_requests_are_not_sent_again(segment, open_channel):
    async with Pair(segment) as nodes, open_channel() as channel:
        stub = Stub(channel)
        await nodes.warm_up(stub)
        taken = []

        def requests():
            for word in ("a", "b"):
                taken.append(word)
                yield word

        lose_first(nodes.first)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Gather(requests())
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "shmcoord-lease-lost" in caught.value.trailing_metadata()
        assert not nodes.second.seen
        assert taken.count("a") == 1


async def test_a_stream_of_requests_moves_before_anything_was_written(segment, open_channel):
    async with Pair(segment) as nodes, open_channel() as channel:
        stub = Stub(channel)
        await nodes.warm_up(stub)
        lose_first(nodes.first)
        call = stub.Gather()
        while not nodes.second.seen:
            await asyncio.sleep(0.005)
        await call.write("a")
        await call.done_writing()
        assert await call == "B: a"


@pytest.mark.parametrize("kind", ["Say", "Count"])
@pytest.mark.parametrize("known", [True, False], ids=["adopts", "unknown"])
async def test_a_broken_connection_before_the_node_adopted(segment, open_channel, kind, known):
    """UNAVAILABLE proves nothing by itself: only with a lease that had not been adopted."""
    async with Pair(segment, tells=known) as nodes, open_channel() as channel:
        stub = Stub(channel)
        await nodes.warm_up(stub)
        call = stub.Say("hold before") if kind == "Say" else stub.Count("hold before 1")
        await nodes.first.arrived.wait()
        nodes.second.let_go.set()
        stopping = asyncio.ensure_future(nodes.first.server.stop(None))
        try:
            if known:
                if kind == "Say":
                    assert await call == "B: hold before"
                else:
                    assert await call.read() == "B 0"
            else:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await (call if kind == "Say" else call.read())
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
                assert not nodes.second.seen
        finally:
            await stopping


async def test_a_broken_connection_after_the_node_adopted(segment, open_channel):
    async with Pair(segment) as nodes, open_channel() as channel:
        stub = Stub(channel)
        await nodes.warm_up(stub)
        call = stub.Say("hold")
        await nodes.first.arrived.wait()
        nodes.second.let_go.set()
        stopping = asyncio.ensure_future(nodes.first.server.stop(None))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert not nodes.second.seen, "it was executed on the first"
        await stopping


async def test_an_idempotent_method_is_made_again(segment, open_channel):
    async with Pair(segment) as nodes, open_channel(idempotent=["/test.Work/Say"]) as channel:
        stub = Stub(channel)
        await nodes.warm_up(stub)
        call = stub.Say("hold")
        await nodes.first.arrived.wait()
        nodes.second.let_go.set()
        stopping = asyncio.ensure_future(nodes.first.server.stop(None))
        assert await call == "B: hold"
        await stopping


async def test_a_stream_that_breaks_in_the_middle_does_not_move(segment, open_channel):
    async with (
        Pair(segment) as nodes,
        open_channel(idempotent=["/test.Work/Count"]) as channel,
    ):
        stub = Stub(channel)
        await nodes.warm_up(stub)
        call = stub.Count("then fail 2")
        assert [await anext(call), await anext(call)] == ["A 0", "A 1"]
        with pytest.raises(grpc.aio.AioRpcError, match="in the middle"):
            await anext(call)
        assert not nodes.second.seen


async def test_who_has_seen_the_initial_metadata_stays(segment, open_channel):
    async with Pair(segment) as nodes, open_channel(idempotent=["/test.Work/Count"]) as channel:
        stub = Stub(channel)
        await nodes.warm_up(stub)
        call = stub.Count("greet 1")
        await call.initial_metadata()
        stopping = asyncio.ensure_future(nodes.first.server.stop(None))
        assert await call.code() is grpc.StatusCode.UNAVAILABLE
        assert not nodes.second.seen
        await stopping


@pytest.fixture
def closed_port():
    """A port on which nobody listens, and on which nobody else will."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{sock.getsockname()[1]}"


async def test_a_node_that_does_not_accept_connections(segment, open_channel, closed_port):
    ghost = segment.join("ghost", group="GREEN", endpoint=closed_port, interval_s=0.05)
    async with open_channel() as channel:
        stub = Stub(channel)
        calls = [stub.Say("x"), stub.Count(" 1"), stub.Gather(iter("x")), stub.Chat(iter("x"))]
        for call in calls:
            assert await call.code() is grpc.StatusCode.UNAVAILABLE
            assert "does not accept the connection" in await call.details()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await calls[0]
        assert isinstance(caught.value.__cause__, NoneReachable)
        assert isinstance(caught.value.__cause__, NoBackend)
        async with Node(segment, "A"):
            for _ in range(5):
                assert await stub.Say("x") == "A: x"
                assert await stub.Gather(iter("ab")) == "A: a+b"
        await nothing_held(segment)
    ghost.leave()


async def test_the_last_refusal_names_what_was_tried(segment, open_channel):
    async with Node(segment, "A") as node, open_channel() as channel:
        stub = Stub(channel)
        await stub.Say("x")
        call = stub.Say("lose")
        told = []
        call.add_done_callback(told.append)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert f"tried: A at {node.endpoint}" in caught.value.details()
        assert told == [call]
        assert await call.code() is grpc.StatusCode.UNAVAILABLE
        await nothing_held(segment)


async def test_the_retry_budget_is_shared_and_ends(segment, open_channel):
    async with Node(segment, "A"), Node(segment, "B"), open_channel() as channel:
        stub = Stub(channel)
        await stub.Say("x")
        details = [await stub.Say("lose").details() for _ in range(200)]
        assert "no eligible node" in details[0]
        assert "retry budget" in details[-1]
        await nothing_held(segment)


async def test_a_node_that_came_back_is_used_at_once(segment, open_channel):
    node = await Node(segment, "A").start()
    async with open_channel() as channel:
        stub = Stub(channel)
        assert await stub.Say("x") == "A: x"
        await node.stop()
        assert await stub.Say("x").code() is grpc.StatusCode.UNAVAILABLE
        async with Node(segment, "A", address=node.endpoint):
            assert await stub.Say("y") == "A: y"
        assert len(channel._routes.links) <= 1
