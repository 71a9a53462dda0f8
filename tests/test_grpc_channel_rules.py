"""What a channel is told when it is made: that nodes adopt leases, and who hears of decisions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from grpc_cluster import GROUP, Cluster, Stub, none_held

import shmcoord.grpc
from shmcoord import Decision, Lease, NoneReachable


@pytest.fixture
def cluster(name: str) -> Iterator[Cluster]:
    cluster = Cluster(name)
    yield cluster
    cluster.close()


def on_a_thread(
    cluster: Cluster, use: Callable[[Stub], list[Callable[[], Any]]], **options: Any
) -> list[Any]:
    """What the calls of a plain channel return or raise."""
    with shmcoord.grpc.channel(cluster.name, group=GROUP, **options) as channel:
        return [_result(call) for call in use(Stub(channel))]


def on_a_loop(
    cluster: Cluster, use: Callable[[Stub], list[Callable[[], Any]]], **options: Any
) -> list[Any]:
    """The same of a channel of an event loop."""

    async def calls() -> list[Any]:
        async with shmcoord.grpc.aio.channel(cluster.name, group=GROUP, **options) as channel:
            results = []
            for call in use(Stub(channel)):
                try:
                    started = call()
                    results.append(
                        await started
                        if hasattr(started, "__await__")
                        else [response async for response in started]
                    )
                except Exception as error:  # noqa: BLE001 - it is looked at
                    results.append(error)
            return results

    return asyncio.run(calls())


def _result(call: Callable[[], Any]) -> Any:
    try:
        result = call()
        return result if isinstance(result, str) else list(result)
    except Exception as error:  # noqa: BLE001 - it is looked at
        return error


both = pytest.mark.parametrize("ask", [on_a_thread, on_a_loop])


@both
@pytest.mark.parametrize("adopts", [False, True])
def test_nodes_that_are_said_to_adopt_had_not_begun(
    ask: Callable[..., list[Any]], adopts: bool, cluster: Cluster
) -> None:
    """Nobody has answered yet, so the channel cannot have learned it."""
    nodes = [cluster.add(name, tells=False) for name in "BC"]
    [error] = ask(cluster, lambda stub: [lambda: stub.Say("before", timeout=10)], adopts=adopts)
    assert isinstance(error, grpc.RpcError)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert sum(len(node.seen) for node in nodes) == 1 + adopts
    assert isinstance(error.__cause__, NoneReachable) is adopts
    none_held(cluster)


@both
def test_each_decision_is_told_before_the_sending(
    ask: Callable[..., list[Any]], cluster: Cluster
) -> None:
    [node] = [cluster.add("B")]
    told: list[tuple[str, str, int]] = []

    def tell(decision: Decision, lease: Lease) -> None:
        assert decision.chosen is not None
        told.append((decision.chosen.node, lease.node, len(node.seen)))

    results = ask(
        cluster,
        lambda stub: [
            lambda: stub.Say("x", timeout=10),
            lambda: stub.Count("2", timeout=10),
            lambda: stub.Say("y", timeout=10),
        ],
        on_decision=tell,
    )
    assert results == ["X", ["0", "1"], "Y"]
    assert told == [("B", "B", 0), ("B", "B", 1), ("B", "B", 2)]


@both
def test_an_error_of_who_is_told_ends_the_call(
    ask: Callable[..., list[Any]], cluster: Cluster
) -> None:
    node = cluster.add("B")

    def refuse(decision: Decision, lease: Lease) -> None:
        raise LookupError("not this one")

    results = ask(
        cluster,
        lambda stub: [lambda: stub.Say("x", timeout=10), lambda: stub.Count("2", timeout=10)],
        on_decision=refuse,
    )
    assert all(isinstance(error, Exception) and "not this one" in str(error) for error in results)
    assert not node.seen
    none_held(cluster)
