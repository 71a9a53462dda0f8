"""Closing a channel of an event loop: no call goes on behind it."""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio
import pytest
from grpc_aio_nodes import Node, Stub, held, nothing_held

import shmcoord.grpc
from shmcoord import Router
from shmcoord.transport._grpc_aio_links import AioLink


async def test_who_waits_for_capacity_is_told(segment):
    """On a router that others share, and go on to use."""
    async with Node(segment, capacity=1) as node:
        with Router(segment) as router:
            ours = shmcoord.grpc.aio.channel(router=router, group="GREEN")
            others = shmcoord.grpc.aio.channel(router=router, group="GREEN")
            first = Stub(others).Say("hold")
            await node.arrived.wait()
            waits = [Stub(ours).Say("x"), Stub(ours).Count("1")]
            also_waits = Stub(others).Say("y")
            await asyncio.sleep(0.02)
            await ours.close()
            for call in waits:
                assert call.done()
                assert call.cancelled()
                assert await call.code() is grpc.StatusCode.CANCELLED
            with pytest.raises(asyncio.CancelledError):
                await waits[0]
            assert not router.closed
            assert not also_waits.done()
            node.let_go.set()
            assert await also_waits == "A: y"
            assert await first == "A: hold"
            await others.close()
    assert not held(segment)


@pytest.mark.parametrize("why", ["the connection broke", "the lease was lost"])
async def test_a_call_does_not_move_while_the_channel_closes(segment, monkeypatch, why):
    async with Node(segment, "A") as first, Node(segment, "B") as second:
        channel = shmcoord.grpc.aio.channel(
            segment, group="GREEN", idempotent=["/test.Work/Say"], connect_timeout_s=5.0
        )
        stub = Stub(channel)
        calls = [stub.Say("hold") for _ in range(2)]  # connects to both
        await first.arrived.wait()
        await second.arrived.wait()
        for node in (first, second):
            node.let_go.set()
        await asyncio.gather(*calls)
        for node in (first, second):
            node.arrived.clear()
            node.let_go.clear()
        work = second.node.request()  # so that the next call goes to the first
        words = "hold" if why == "the connection broke" else "refuse when let go"
        call = stub.Say(words)
        await first.arrived.wait()
        close = AioLink.close

        async def close_after_the_end(link):
            """The call under way fails by itself, before its link is closed."""
            monkeypatch.setattr(AioLink, "close", close)
            ended = asyncio.ensure_future(call._real.code())
            if why == "the connection broke":
                await first.server.stop(None)
            else:
                first.let_go.set()
            await ended
            await close(link)

        monkeypatch.setattr(AioLink, "close", close_after_the_end)
        seen = second.seen["Say"]
        await channel.close()
        work.end()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(call, 5)
        assert call.cancelled()
        assert await call.code() is grpc.StatusCode.CANCELLED
        assert second.seen["Say"] == seen
        assert len(channel._routes.links) == 0
        await nothing_held(segment)


async def test_closed_links_make_no_new_one(segment):
    channel = shmcoord.grpc.aio.channel(segment, group="GREEN")
    links = channel._routes.links
    await channel.close()
    for make in (links.take, links.renew):
        with pytest.raises(RuntimeError, match="closed"):
            make("127.0.0.1:1")
    assert len(links) == 0
