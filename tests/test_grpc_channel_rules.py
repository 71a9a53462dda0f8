"""What a channel is told when it is made: that nodes adopt leases, and who hears of decisions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_cluster import GROUP, Cluster, Stub, none_held
from grpc_status import rpc_status

import shmcoord.grpc
from shmcoord import Decision, Lease, NoneReachable, Router, Saturated


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


@both
@pytest.mark.parametrize("character", ["x", "\N{LATIN SMALL LETTER E WITH ACUTE}"])
def test_a_long_reason_is_the_same_in_message_and_details(
    ask: Callable[..., list[Any]],
    cluster: Cluster,
    character: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else `grpc_status` refuses the rich status."""
    monkeypatch.setattr(shmcoord.grpc._refusal, "_MESSAGE_CHARACTERS", 400)
    nodes = [
        cluster.segment.join(
            f"{number} " + 57 // len(character.encode()) * character,
            group=GROUP,
            endpoint="127.0.0.1:1",
            interval_s=3600,
        )
        for number in range(12)
    ]
    for node in nodes:
        node.drain()
    [error] = ask(cluster, lambda stub: [lambda: stub.Say("x", timeout=10)])
    assert len(str(error.__cause__)) > 400 == len(error.details())
    status = rpc_status.from_call(error)
    assert status.message == error.details()
    assert status.details[0].Is(ErrorInfo.DESCRIPTOR)


@both
@pytest.mark.parametrize("timeout", [0, -1])
@pytest.mark.parametrize("capacity", [None, 0, 1], ids=["nobody", "full", "free"])
@pytest.mark.parametrize("wait", [None, True])
def test_a_call_without_time_has_exceeded_its_deadline(
    ask: Callable[..., list[Any]],
    cluster: Cluster,
    timeout: float,
    capacity: int | None,
    wait: bool | None,
) -> None:
    """As in gRPC, whatever the nodes are doing."""
    node = cluster.add(capacity=1) if capacity is not None else None
    with Router(cluster.name) as router:
        held = router.acquire(GROUP) if capacity == 0 else None
        results = ask(
            cluster,
            lambda stub: [
                lambda: stub.Say("x", timeout=timeout, wait_for_ready=wait),
                lambda: stub.Count("2", timeout=timeout, wait_for_ready=wait),
            ],
        )
    assert [error.code() for error in results] == [grpc.StatusCode.DEADLINE_EXCEEDED] * 2
    assert held is None or not held.released
    assert node is None or not node.seen


@both
def test_time_that_passes_while_all_are_full_says_so_and_when_to_try_again(
    ask: Callable[..., list[Any]], cluster: Cluster
) -> None:
    cluster.add(capacity=1)
    with Router(cluster.name) as router, router.acquire(GROUP):
        results = ask(
            cluster,
            lambda stub: [
                lambda: stub.Say("x", timeout=0.05),
                lambda: stub.Say("x", timeout=0.05, wait_for_ready=True),
                lambda: stub.Count("2", timeout=0.05),
                lambda: stub.Say("x"),
            ],
            max_wait_s=0.05,
        )
    assert [error.code() for error in results] == [grpc.StatusCode.RESOURCE_EXHAUSTED] * 4
    assert all(isinstance(error.__cause__, Saturated) for error in results)


@both
def test_who_waits_for_a_node_without_a_deadline_waits_no_longer_than_is_allowed(
    ask: Callable[..., list[Any]], cluster: Cluster
) -> None:
    began = time.monotonic()
    results = ask(
        cluster,
        lambda stub: [
            lambda: stub.Say("x", wait_for_ready=True),
            lambda: stub.Count("2", wait_for_ready=True),
        ],
        max_wait_s=0.1,
    )
    assert [error.code() for error in results] == [grpc.StatusCode.UNAVAILABLE] * 2
    assert 0.19 < time.monotonic() - began < 5.0
