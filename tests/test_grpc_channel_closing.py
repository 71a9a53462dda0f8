"""Closing a channel: who waits is told at once, and nothing stays open."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from grpc_cluster import GROUP, Cluster, Stub, close_soon, none_held
from helpers import wait_until

import shmcoord.grpc
from shmcoord import Router
from shmcoord.waiting import WaitQueue


@pytest.fixture
def cluster(name: str) -> Iterator[Cluster]:
    cluster = Cluster(name)
    yield cluster
    cluster.close()


def _waiting(router: Router) -> int:
    """How many callers are in the queues of a router."""
    queues = [thing for thing in gc.get_referents(router) if isinstance(thing, WaitQueue)]
    return sum(queue.ahead(GROUP) for queue in queues)


@pytest.mark.parametrize("how", ["plain", "with_call", "stream of requests"])
def test_who_blocks_for_capacity_is_told(cluster: Cluster, how: str) -> None:
    node = cluster.add(capacity=1)
    with Router(cluster.name) as router, ThreadPoolExecutor(2) as threads:
        ours = shmcoord.grpc.channel(router=router, group=GROUP)
        others = shmcoord.grpc.channel(router=router, group=GROUP)
        held = Stub(others).Say.future("hold")
        assert node.entered.acquire(timeout=5)

        def blocked() -> Any:
            stub = Stub(ours)
            if how == "with_call":
                return stub.Say.with_call("x")
            return stub.Gather(iter("x")) if how == "stream of requests" else stub.Say("x")

        waits = threads.submit(blocked)
        also_waits = threads.submit(lambda: Stub(others).Say("y"))
        wait_until(lambda: _waiting(router) == 2)
        ours.close()
        try:
            with pytest.raises(grpc.RpcError) as caught:
                waits.result(1)
        except TimeoutError:
            node.release.set()
            raise
        assert caught.value.code() is grpc.StatusCode.CANCELLED
        assert caught.value.details() == "Channel closed!"
        assert not router.closed
        assert not also_waits.done()
        node.release.set()
        assert also_waits.result(5) == "Y"
        assert held.result(5) == "HOLD"
        none_held(cluster)
        close_soon(others)


@pytest.mark.parametrize("ends", ["before the response is there", "while the link is given back"])
def test_a_link_that_ends_during_the_last_step_of_a_call_is_closed(
    cluster: Cluster, ends: str
) -> None:
    """The call gives the link back in two steps, and gRPC's thread may come in between."""
    node = cluster.add()
    with shmcoord.grpc.channel(cluster.name, group=GROUP) as channel:
        stub = Stub(channel)
        stub.Say("warm")
        pool: Any = channel._core.pool  # type: ignore[attr-defined]
        [link] = pool.links()

        class Users(list[None]):
            def pop(self, *index: Any) -> None:
                if ends == "while the link is given back":
                    link._on_state(grpc.ChannelConnectivity.IDLE)
                super().pop()

        link.users = Users()
        if ends == "before the response is there":
            held = threading.Thread(target=stub.Say, args=("hold",))
            held.start()
            wait_until(lambda: "hold" in node.seen)
            link._on_state(grpc.ChannelConnectivity.IDLE)
            assert pool.open_links() == 1
            node.release.set()
            held.join()
        else:
            stub.Say("x")
        assert not link.users
        assert pool.open_links() == 0
