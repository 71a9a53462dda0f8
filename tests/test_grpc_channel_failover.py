"""Where a call goes when a node fails, what it never does, and what the caller is told."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from grpc_cluster import GROUP, METHODS, Cluster, Node, Stub, close_soon, none_held
from grpc_status import rpc_status
from helpers import wait_until

import shmcoord.grpc
from shmcoord import NoBackend, NoneReachable, Saturated
from shmcoord.grpc import served_by


@pytest.fixture
def cluster(name: str) -> Iterator[Cluster]:
    cluster = Cluster(name)
    yield cluster
    cluster.close()


@pytest.fixture
def make(cluster: Cluster) -> Iterator[Callable[..., Stub]]:
    """Makes channels that are closed with the test, and returns their stubs."""
    channels: list[grpc.Channel] = []

    def make(**options: Any) -> Stub:
        channels.append(shmcoord.grpc.channel(cluster.name, group=GROUP, **options))
        return Stub(channels[-1])

    yield make
    for channel in channels:
        close_soon(channel)


UNARY: dict[str, Callable[..., Any]] = {
    "blocking": lambda stub, request, **options: stub.Say(request, **options),
    "with_call": lambda stub, request, **options: stub.Say.with_call(request, **options)[0],
    "future": lambda stub, request, **options: stub.Say.future(request, **options).result(10),
}
ALL: dict[str, Callable[..., Any]] = {
    **UNARY,
    "stream": lambda stub, request, **options: list(stub.Count("1", **options)),
    "gather": lambda stub, request, **options: stub.Gather(iter("a"), **options),
    "gather future": lambda stub, request, **options: stub.Gather.future(
        iter("a"), **options
    ).result(10),
    "chat": lambda stub, request, **options: list(stub.Chat(iter("a"), **options)),
}
each_way = pytest.mark.parametrize("way", ALL)
each_unary = pytest.mark.parametrize("way", UNARY)


# --- before anything was sent


@each_way
def test_a_node_that_does_not_listen_is_passed(
    way: str, cluster: Cluster, make: Callable[..., Stub]
) -> None:
    stub = make(policy="round-robin")
    cluster.add("B", listens=False)
    cluster.add("C")
    for _ in range(3):
        assert ALL[way](stub, "x", timeout=10)
        assert served_by.get() == "C"
    none_held(cluster)


@each_way
def test_nobody_reachable(way: str, cluster: Cluster, make: Callable[..., Stub]) -> None:
    stub = make()
    for name in "BC":
        cluster.add(name, listens=False)
    with pytest.raises(grpc.RpcError) as caught:
        ALL[way](stub, "x", timeout=10)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert isinstance(error.__cause__, NoneReachable)
    assert [attempt.node for attempt in error.__cause__.tried] in (["B", "C"], ["C", "B"])
    assert "does not accept the connection" in error.details()
    none_held(cluster)


def test_a_peer_that_never_speaks_costs_the_bound(
    cluster: Cluster, make: Callable[..., Stub]
) -> None:
    stub = make(connect_timeout_s=0.2, policy="round-robin")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        endpoint = f"127.0.0.1:{silent.getsockname()[1]}"
        with cluster.segment.join("A", group=GROUP, endpoint=endpoint):
            with pytest.raises(grpc.RpcError) as caught:
                stub.Say("x")
            assert "no connection" in (caught.value.details() or "")
            began = time.monotonic()
            assert stub.Say.future("x", timeout=0.05).code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert time.monotonic() - began < 0.5
            cluster.add("B")
            began = time.monotonic()
            assert [stub.Say("x"), stub.Say("x")] == ["X", "X"]
            assert time.monotonic() - began < 1
    none_held(cluster)


@each_way
def test_a_node_that_died_is_passed(way: str, cluster: Cluster, make: Callable[..., Stub]) -> None:
    stub = make(idempotent=METHODS, policy="round-robin")
    nodes = [cluster.add(name) for name in "BC"]
    for _ in range(4):
        ALL[way](stub, "x")
    assert all(node.seen for node in nodes)
    nodes[0].stop()
    wait_until(lambda: nodes[0].endpoint not in stub.Say._core.links)
    for _ in range(4):
        assert ALL[way](stub, "x")
        assert served_by.get() == "C"
    none_held(cluster)


# --- after a refused lease


@pytest.mark.parametrize("way", [*UNARY, "stream"])
def test_a_lost_lease_leads_elsewhere(
    way: str, cluster: Cluster, make: Callable[..., Stub]
) -> None:
    stub = make()
    for name in "BC":
        cluster.add(name)
    for _ in range(10):
        stub.Say("warm")
    seen = [len(node.seen) for node in cluster.nodes]
    loser, other = cluster.nodes
    for node in cluster.nodes:
        node.loses = 1
    # Whichever is first refuses, and so does the second: then there is nobody.
    with pytest.raises(grpc.RpcError) as caught:
        ALL[way](stub, "x")
    assert isinstance(caught.value.__cause__, NoneReachable)
    assert [loser.loses, other.loses] == [0, 0]
    assert [len(node.seen) for node in cluster.nodes] == seen
    wait_until(lambda: cluster.held() == 0)
    stub = make()  # one for which no node is marked as unreachable
    loser.loses = other.loses = 1
    with pytest.raises(grpc.RpcError):
        ALL[way](stub, "x")
    loser.loses = 1
    stub = make()
    for _ in range(20):
        if ALL[way](stub, "x") and not loser.loses:
            break
    assert not loser.loses
    assert served_by.get() == "C"
    none_held(cluster)


@pytest.mark.parametrize("way", ["gather", "gather future", "chat"])
def test_an_iterator_is_not_given_to_two_calls(
    way: str, cluster: Cluster, make: Callable[..., Stub]
) -> None:
    stub = make(idempotent=METHODS)
    for name in "BC":
        cluster.add(name, loses=1)
    with pytest.raises(grpc.RpcError) as caught:
        ALL[way](stub, "x")
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert sorted(node.loses for node in cluster.nodes) == [0, 1]
    none_held(cluster)


# --- after UNAVAILABLE


@each_unary
def test_unavailable_is_passed_on_where_it_proves_nothing(
    way: str, cluster: Cluster, make: Callable[..., Stub]
) -> None:
    stub = make()
    for name in "BC":
        cluster.add(name, adopts=False)
    for request in ("UNAVAILABLE", "before"):
        with pytest.raises(grpc.RpcError) as caught:
            UNARY[way](stub, request)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert type(caught.value).__module__.startswith("grpc.")  # as it came
    assert sum(len(node.seen) for node in cluster.nodes) == 2
    none_held(cluster)


@each_unary
def test_an_idempotent_request_is_repeated(
    way: str, cluster: Cluster, make: Callable[..., Stub]
) -> None:
    stub = make(idempotent=METHODS)
    for name in "BC":
        cluster.add(name, adopts=False)
    with pytest.raises(grpc.RpcError) as caught:
        UNARY[way](stub, "UNAVAILABLE")
    assert isinstance(caught.value.__cause__, NoneReachable)
    assert [node.seen for node in cluster.nodes] == [["UNAVAILABLE"]] * 2
    none_held(cluster)


@pytest.mark.parametrize("way", [*UNARY, "stream"])
def test_a_node_known_to_adopt_had_not_begun_if_the_lease_could_be_freed(
    way: str, cluster: Cluster, make: Callable[..., Stub]
) -> None:
    def call(stub: Stub, request: str) -> Any:
        return list(stub.Count(request)) if way == "stream" else UNARY[way](stub, request)

    stub = make()
    for name in "BC":
        cluster.add(name)
    with pytest.raises(grpc.RpcError) as caught:
        call(stub, "before")  # nothing is known of this node yet
    assert caught.value.__cause__ is None
    assert sum(len(node.seen) for node in cluster.nodes) == 1
    stub = make(policy="round-robin")
    for _ in range(4):
        assert call(stub, "1") in ("1", ["0"])
    before = [len(node.seen) for node in cluster.nodes]
    with pytest.raises(grpc.RpcError) as caught:
        call(stub, "before")
    assert isinstance(caught.value.__cause__, NoneReachable)
    assert [len(node.seen) - n for node, n in zip(cluster.nodes, before, strict=True)] == [1, 1]
    # The same code from a handler, which has adopted the lease: it was executed.
    stub = make(policy="round-robin")  # for this one nobody is marked as unreachable
    for _ in range(4):
        call(stub, "1")
    with pytest.raises(grpc.RpcError) as caught:
        call(stub, "UNAVAILABLE")
    assert caught.value.__cause__ is None
    assert caught.value.details() == "said UNAVAILABLE"
    assert sum(node.seen.count("UNAVAILABLE") for node in cluster.nodes) == 1
    none_held(cluster)


def test_a_stream_is_not_repeated_after_its_first_response(
    cluster: Cluster, make: Callable[..., Stub]
) -> None:
    stub = make(idempotent=METHODS)
    for name in "BC":
        cluster.add(name)
    stream = stub.Count("2!")
    assert [next(stream), next(stream)] == ["0", "1"]
    with pytest.raises(grpc.RpcError) as caught:
        next(stream)
    assert caught.value.details() == "in the middle"
    assert sum(len(node.seen) for node in cluster.nodes) == 1
    none_held(cluster)


def test_a_stream_that_goes_elsewhere_while_nobody_reads(
    cluster: Cluster, make: Callable[..., Stub]
) -> None:
    """gRPC's thread finds out, not the reader; code(), callbacks and metadata are the second's."""
    stub = make()
    other = cluster.add("C")
    stub.Say("warm")
    busy = stub.Count("1+")
    assert next(busy) == "0"
    refusing = cluster.add("B")
    stub.Say("warm")  # by the idle one
    wait_until(lambda: cluster.held() == 1)
    refusing.loses = 1
    ended = threading.Event()
    stream = stub.Count("1+")
    assert stream.add_callback(ended.set)
    wait_until(lambda: len(other.seen) == 3)
    assert not refusing.loses
    assert ("first", "C") in stream.initial_metadata()
    assert not ended.is_set()
    assert next(stream) == "0"
    other.release.set()
    assert stream.code() is grpc.StatusCode.OK
    assert ended.wait(5)
    assert list(busy) == []
    none_held(cluster)


def test_metadata_of_a_call_that_goes_elsewhere_is_the_second_nodes(
    cluster: Cluster, make: Callable[..., Stub]
) -> None:
    stub = make()
    cluster.add("C")
    stub.Say("warm")
    busy = stub.Count("1+")
    assert next(busy) == "0"
    refusing = cluster.add("B")
    stub.Say("warm")  # by the idle one
    wait_until(lambda: cluster.held() == 1)
    refusing.loses = 1
    stream = stub.Count("1")
    assert ("first", "C") in stream.initial_metadata()
    assert not refusing.loses
    assert list(stream) == ["0"]


def test_cancelling_ends_the_search(cluster: Cluster, make: Callable[..., Stub]) -> None:
    stub = make(idempotent=METHODS)
    node = cluster.add(capacity=1)
    stub.Say("warm")
    node.loses = 1
    held = stub.Count("1")  # refused; then it waits for any node, since it is excluded here
    assert held.exception() is held
    assert held.code() is grpc.StatusCode.UNAVAILABLE
    call = stub.Say.future("hold")
    wait_until(lambda: "hold" in node.seen)
    assert call.cancel()
    assert node.seen.count("hold") == 1
    none_held(cluster)


def test_the_budget_of_retries_is_kept(
    cluster: Cluster, make: Callable[..., Stub], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = make()
    cluster.add("B", listens=False)
    cluster.add("C", listens=False)
    budget = stub.Say._core.rules.budget
    while budget.spend():
        pass
    with pytest.raises(grpc.RpcError, match="budget") as caught:
        stub.Say("x")
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    future = stub.Say.future("x")
    assert "budget" in future.details()
    none_held(cluster)


# --- refusals


@each_way
def test_no_node_is_unavailable_at_once(
    way: str, cluster: Cluster, make: Callable[..., Stub]
) -> None:
    stub = make()
    began = time.monotonic()
    with pytest.raises(grpc.RpcError) as caught:
        ALL[way](stub, "x", timeout=10)
    assert time.monotonic() - began < 0.5
    error: Any = caught.value
    assert isinstance(error, grpc.Call)
    assert isinstance(error, grpc.Future)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert isinstance(error.__cause__, NoBackend)
    assert "has one joined" in error.details()
    assert not error.is_active()
    assert error.done()
    assert error.exception() is error
    assert not error.cancelled()
    assert not error.add_callback(lambda: None)
    told: list[object] = []
    error.add_done_callback(told.append)
    assert told == [error]
    assert "UNAVAILABLE" in str(error)
    status = rpc_status.from_call(error)
    info = ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.reason == "NO_BACKEND"


@each_way
def test_saturated_says_when_to_try_again(
    way: str, cluster: Cluster, make: Callable[..., Stub]
) -> None:
    stub = make(max_wait_s=0.1)
    node = cluster.add(capacity=1)
    stub.Say("warm")  # so that there is a latency
    held = stub.Say.future("hold")
    wait_until(lambda: "hold" in node.seen)
    for options in ({}, {"timeout": 0.1}):
        began = time.monotonic()
        with pytest.raises(grpc.RpcError) as caught:
            ALL[way](stub, "x", **options)
        assert 0.08 < time.monotonic() - began < 1.0
        error: Any = caught.value
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert isinstance(error.__cause__, Saturated)
        trailing = dict(error.trailing_metadata())
        assert int(trailing["grpc-retry-pushback-ms"]) >= 1
        status = rpc_status.from_call(error)
        info, retry = ErrorInfo(), RetryInfo()
        assert status.details[0].Unpack(info)
        assert info.metadata["node.B"] == "BUSY, queue 1 of 1"
        assert status.details[1].Unpack(retry)
        assert retry.retry_delay.ToTimedelta().total_seconds() > 0
    node.release.set()
    held.result(5)
    none_held(cluster)


# --- waiting for any node


@each_way
def test_wait_for_ready_waits_for_a_node_that_joins(
    way: str, cluster: Cluster, make: Callable[..., Stub]
) -> None:
    stub = make()
    times: list[float] = []

    def call() -> None:
        assert ALL[way](stub, "x", timeout=10, wait_for_ready=True)
        times.append(time.monotonic())

    caller = threading.Thread(target=call)
    cpu = time.process_time()
    caller.start()
    time.sleep(0.15)
    assert caller.is_alive()
    assert time.process_time() - cpu < 0.1  # nobody spins
    cluster.add()
    joined = time.monotonic()
    caller.join(5)
    assert times[0] - joined < 0.3
    none_held(cluster)


@each_way
def test_wait_for_ready_ends_at_the_deadline(
    way: str, cluster: Cluster, make: Callable[..., Stub]
) -> None:
    stub = make()
    cluster.add("B", listens=False)
    for _ in range(2):
        began = time.monotonic()
        with pytest.raises(grpc.RpcError) as caught:
            ALL[way](stub, "x", timeout=0.2, wait_for_ready=True)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert 0.15 < time.monotonic() - began < 1.0
    none_held(cluster)


def test_wait_for_ready_does_not_wait_on_a_dead_endpoint(
    cluster: Cluster, make: Callable[..., Stub]
) -> None:
    stub = make()
    dead = cluster.add("B")
    assert stub.Say("x", wait_for_ready=True) == "X"
    dead.stop()
    wait_until(lambda: not stub.Say._core.links)
    waits = stub.Say.future("x", wait_for_ready=True)
    time.sleep(0.1)
    assert not waits.done()
    cluster.add("C")
    assert waits.result(5) == "X"
    assert stub.Say("x", wait_for_ready=True, timeout=5) == "X"
    assert served_by.get() == "C"


@each_unary
def test_waiting_for_a_node_ends_with_the_first_sending(
    way: str, cluster: Cluster, make: Callable[..., Stub]
) -> None:
    """Or an idempotent request that always fails would be executed until the deadline."""
    stub = make(idempotent=METHODS)
    for name in "BC":
        cluster.add(name)
    with pytest.raises(grpc.RpcError) as caught:
        UNARY[way](stub, "UNAVAILABLE", wait_for_ready=True, timeout=20)
    assert isinstance(caught.value.__cause__, NoneReachable)
    assert [node.seen for node in cluster.nodes] == [["UNAVAILABLE"]] * 2


@each_way
def test_the_node_itself_is_not_waited_for(
    way: str, cluster: Cluster, make: Callable[..., Stub]
) -> None:
    """If the connection ends at that moment, waiting would be for a dead endpoint."""
    told: list[Any] = []

    class Looks(
        grpc.UnaryUnaryClientInterceptor,  # type: ignore[misc]
        grpc.UnaryStreamClientInterceptor,  # type: ignore[misc]
        grpc.StreamUnaryClientInterceptor,  # type: ignore[misc]
        grpc.StreamStreamClientInterceptor,  # type: ignore[misc]
    ):
        def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
            told.append(details.wait_for_ready)
            return continuation(details, request)

        intercept_unary_stream = intercept_unary_unary
        intercept_stream_unary = intercept_unary_unary
        intercept_stream_stream = intercept_unary_unary

    stub = make(interceptors=[Looks()])
    cluster.add()
    for wait in (True, True, False, None):
        assert ALL[way](stub, "x", wait_for_ready=wait)
    assert told == [False, False, False, None]
    none_held(cluster)


def test_a_node_that_listens_late_is_tried_again(
    cluster: Cluster, make: Callable[..., Stub]
) -> None:
    stub = make()
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
    joined = cluster.segment.join("A", group=GROUP, endpoint=f"127.0.0.1:{port}")
    budget = stub.Say._core.rules.budget
    while budget.spend():  # connecting is no load: it needs no budget
        pass
    waits = stub.Say.future("x", wait_for_ready=True, timeout=20)
    time.sleep(0.2)
    assert not waits.done()
    late = Node(cluster.segment, "late", address=f"127.0.0.1:{port}", adopts=False)
    late.node.leave()
    assert waits.result(10) == "X"
    late.stop()
    joined.leave()


@each_way
def test_each_request_earns_retries(way: str, cluster: Cluster, make: Callable[..., Stub]) -> None:
    stub = make()
    cluster.add()
    budget = stub.Say._core.rules.budget
    while budget.spend():
        pass
    before = budget.left
    for _ in range(20):
        ALL[way](stub, "x")
    wait_until(lambda: budget.left - before == pytest.approx(4.0, abs=0.11))
