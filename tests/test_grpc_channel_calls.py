"""Calls that return at once: what their objects do while they wait, run, end, and are dropped."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import grpc.experimental
import pytest
from grpc_cluster import GROUP, SERVICE, Cluster, Node, Stub, close_soon, none_held
from helpers import wait_until

import shmcoord.grpc


@pytest.fixture
def cluster(name: str) -> Iterator[Cluster]:
    cluster = Cluster(name)
    yield cluster
    cluster.close()


@pytest.fixture
def channel(cluster: Cluster) -> Iterator[grpc.Channel]:
    channel = shmcoord.grpc.channel(cluster.name, group=GROUP)
    yield channel
    close_soon(channel)


@pytest.fixture
def stub(channel: grpc.Channel) -> Stub:
    return Stub(channel)


@pytest.fixture
def node(cluster: Cluster, stub: Stub) -> Node:
    """A node of capacity 1 that is connected."""
    node = cluster.add(capacity=1)
    assert stub.Say("warm") == "WARM"
    assert node.entered.acquire(timeout=5)
    wait_until(lambda: cluster.held() == 0)
    return node


BEGIN: dict[str, Callable[[Stub, str], Any]] = {
    "future": lambda stub, request: stub.Say.future(request),
    "stream": lambda stub, request: stub.Count("1+" if request == "hold" else "2"),
    "gather": lambda stub, request: stub.Gather.future(iter([request])),
    "chat": lambda stub, request: stub.Chat(iter([request])),
}
each_kind = pytest.mark.parametrize("kind", BEGIN)


@each_kind
def test_the_whole_interface(kind: str, stub: Stub, node: Node) -> None:
    call = BEGIN[kind](stub, "ok")
    for kind_of in (grpc.Call, grpc.Future, grpc.RpcError):
        assert isinstance(call, kind_of)
    assert iter(call) is call
    if kind in ("stream", "chat"):
        assert list(call) == {"stream": ["0", "1"], "chat": ["OK"]}[kind]
    else:
        assert call.result(5) == {"future": "OK", "gather": "ok"}[kind]
    assert call.code() is grpc.StatusCode.OK
    assert call.details() == ""
    assert ("shmcoord-node", "B") in call.trailing_metadata()
    assert all(len(pair) == 2 for pair in call.initial_metadata())
    assert call.exception() is None
    assert call.traceback() is None
    assert call.done()
    assert not call.running()
    assert not call.is_active()
    assert not call.cancelled()
    assert not call.cancel()
    assert call.time_remaining() is None
    assert not call.add_callback(lambda: None)
    assert "OK" in str(call)


@each_kind
def test_waiting_does_not_block(kind: str, cluster: Cluster, stub: Stub, node: Node) -> None:
    held = stub.Say.future("hold")
    assert node.entered.acquire(timeout=5)
    began = time.monotonic()
    call = BEGIN[kind](stub, "ok")
    assert time.monotonic() - began < 0.2
    assert not call.done()
    assert call.running()
    assert call.is_active()
    assert "object" in repr(call)
    with pytest.raises(grpc.FutureTimeoutError):
        call.result(timeout=0.05)
    with pytest.raises(grpc.FutureTimeoutError):
        call.exception(timeout=0)
    with pytest.raises(grpc.FutureTimeoutError):
        call.traceback(timeout=0)
    assert len(node.seen) == 2
    node.release.set()
    assert held.result(5) == "HOLD"
    if kind in ("stream", "chat"):
        assert len(list(call)) in (1, 2)
    else:
        assert call.result(5) in ("OK", "ok")
    none_held(cluster)


def test_those_who_wait_need_one_thread(cluster: Cluster, stub: Stub, node: Node) -> None:
    held = stub.Say.future("hold")
    assert node.entered.acquire(timeout=5)
    calls = [stub.Say.future("x")]
    before = threading.active_count()
    calls += [stub.Say.future("x") for _ in range(50)]
    assert threading.active_count() <= before
    node.release.set()
    assert [call.result(10) for call in calls] == ["X"] * 51
    assert held.result() == "HOLD"
    none_held(cluster)


@each_kind
def test_cancelling_while_it_waits(kind: str, cluster: Cluster, stub: Stub, node: Node) -> None:
    held = stub.Say.future("hold")
    assert node.entered.acquire(timeout=5)
    call = BEGIN[kind](stub, "ok")
    ended = threading.Event()
    assert call.add_callback(ended.set)
    assert call.cancel()
    assert ended.wait(5)
    assert call.cancelled()
    assert call.done()
    assert not call.cancel()
    assert call.code() is grpc.StatusCode.CANCELLED
    assert call.details() == "Locally cancelled by application!"
    with pytest.raises(grpc.FutureCancelledError):
        call.result()
    with pytest.raises(grpc.FutureCancelledError):
        call.exception()
    with pytest.raises(grpc.RpcError) as caught:
        next(call)
    assert caught.value is call
    node.release.set()
    assert held.result(5) == "HOLD"
    none_held(cluster)
    assert stub.Say("x") == "X"
    assert node.seen == ["warm", "hold", "x"]


@each_kind
def test_cancelling_while_it_runs(kind: str, cluster: Cluster, stub: Stub, node: Node) -> None:
    release = threading.Event()

    def requests() -> Iterator[str]:
        yield "a"
        release.wait(10)

    call = (
        getattr(stub.Gather, "future", None)(requests())
        if kind == "gather"
        else stub.Chat(requests())
        if kind == "chat"
        else BEGIN[kind](stub, "hold")
    )
    assert node.entered.acquire(timeout=5)
    ended = threading.Event()
    call.add_done_callback(lambda which: ended.set() if which is call else None)
    canceller = threading.Thread(target=call.cancel)
    canceller.start()
    assert ended.wait(5)
    canceller.join()
    release.set()
    assert call.cancelled()
    assert call.code() is grpc.StatusCode.CANCELLED
    with pytest.raises(grpc.FutureCancelledError):
        call.result()
    none_held(cluster)


def test_a_call_that_was_cancelled_is_not_begun(cluster: Cluster, stub: Stub, node: Node) -> None:
    held = stub.Say.future("hold")
    assert node.entered.acquire(timeout=5)
    call = stub.Say.future("x")
    assert call.cancel()
    node.release.set()
    held.result(5)
    none_held(cluster)
    core = stub.Say._core  # a node that was found at that moment
    lease = core.acquire(GROUP, 5.0)
    call._flight.launch(lease, core.pool.take(node.endpoint))
    assert cluster.held() == 0
    assert node.seen == ["warm", "hold"]
    assert not core.links[node.endpoint].users


def test_a_reader_is_woken_by_a_cancellation(cluster: Cluster, stub: Stub, node: Node) -> None:
    stream = stub.Count("1+")
    assert next(stream) == "0"
    timer = threading.Timer(0.05, stream.cancel)
    timer.start()
    with pytest.raises(grpc.RpcError) as caught:
        next(stream)
    timer.join()
    assert caught.value.code() is grpc.StatusCode.CANCELLED
    none_held(cluster)


def test_callbacks(
    cluster: Cluster, stub: Stub, node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    call = stub.Say.future("hold")
    assert node.entered.acquire(timeout=5)
    told: list[object] = []
    last = threading.Event()

    def fail(_: object) -> None:
        raise RuntimeError("a user's fault")

    call.add_done_callback(told.append)
    call.add_done_callback(fail)
    assert call.add_callback(lambda: told.append("end"))
    assert call.add_callback(last.set)
    assert told == []
    with caplog.at_level(logging.ERROR, "shmcoord.grpc"):
        node.release.set()
        assert last.wait(5)
    assert told == [call, "end"]
    assert "a user's fault" in caplog.text
    call.add_done_callback(told.append)
    assert told == [call, "end", call]
    assert not call.add_callback(last.set)


def test_the_lease_is_held_until_the_end_and_no_longer(
    cluster: Cluster, stub: Stub, node: Node
) -> None:
    stream = stub.Count("2+")
    assert next(stream) == "0"
    assert next(stream) == "1"
    assert cluster.held() == 1
    node.release.set()
    with pytest.raises(StopIteration):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)
    assert not stream.is_active()
    assert stream.code() is grpc.StatusCode.OK
    none_held(cluster)


def test_a_node_that_does_not_adopt_is_released_by_the_client_alone(
    cluster: Cluster, stub: Stub
) -> None:
    node = cluster.add(adopts=False)
    assert list(stub.Count("2")) == ["0", "1"]
    assert cluster.held() == 0
    stream = stub.Count("1+")
    assert next(stream) == "0"
    assert cluster.held() == 1
    node.release.set()
    assert list(stream) == []
    assert cluster.held() == 0
    assert stub.Say("x") == "X"
    assert cluster.held() == 0
    future = stub.Say.future("x")
    assert future.result(5) == "X"
    assert cluster.held() == 0


@each_kind
def test_what_is_dropped_is_cancelled(kind: str, cluster: Cluster, stub: Stub, node: Node) -> None:
    release = threading.Event()

    def requests() -> Iterator[str]:
        yield "a"
        release.wait(10)

    call = (
        stub.Gather.future(requests())
        if kind == "gather"
        else stub.Chat(requests())
        if kind == "chat"
        else BEGIN[kind](stub, "hold")
    )
    assert node.entered.acquire(timeout=5)
    assert cluster.held() == 1
    gc.collect()
    assert cluster.held() == 1
    gc.disable()  # no cycle may keep it
    try:
        del call
        assert node.ended.acquire(timeout=5)
        assert node.ended.acquire(timeout=5)  # the first was the warm-up's
        none_held(cluster)
    finally:
        gc.enable()
        release.set()


def test_a_stream_left_early_is_cancelled(cluster: Cluster, stub: Stub, node: Node) -> None:
    for response in stub.Count("2+"):
        assert response == "0"
        break
    none_held(cluster)


def test_what_is_dropped_while_it_waits_goes_nowhere(
    cluster: Cluster, stub: Stub, node: Node
) -> None:
    held = stub.Say.future("hold")
    assert node.entered.acquire(timeout=5)
    stub.Say.future("dropped")
    gc.collect()
    node.release.set()
    held.result(5)
    none_held(cluster)
    assert stub.Say("x") == "X"
    assert node.seen == ["warm", "hold", "x"]


def test_a_call_with_a_done_callback_is_not_dropped(
    cluster: Cluster, stub: Stub, node: Node
) -> None:
    held = stub.Say.future("hold")
    assert node.entered.acquire(timeout=5)
    results: list[str] = []
    for word in "ab":  # they wait, then run; nobody but the callback has them
        stub.Say.future(word).add_done_callback(lambda call: results.append(call.result()))
    gc.collect()
    node.release.set()
    held.result(5)
    wait_until(lambda: len(results) == 2)
    assert sorted(results) == ["A", "B"]  # a node frees its lease before it answers
    none_held(cluster)


def test_initial_metadata_is_waited_for(cluster: Cluster, stub: Stub, node: Node) -> None:
    held = stub.Say.future("hold")
    assert node.entered.acquire(timeout=5)
    stream = stub.Count("1+")
    node_releases = threading.Timer(0.1, node.release.set)
    node_releases.start()
    assert ("first", "B") in stream.initial_metadata()
    assert list(stream) == ["0"]
    node_releases.join()
    held.result(5)


def test_deadlines_of_those_who_wait(cluster: Cluster, stub: Stub, node: Node) -> None:
    held = stub.Say.future("hold", timeout=30)
    assert node.entered.acquire(timeout=5)
    assert 25 < held.time_remaining() <= 30
    began = time.monotonic()
    calls = [stub.Say.future("x", timeout=0.15), stub.Count("1", timeout=0.15)]
    for call in calls:
        assert call.exception(5) is call
        assert call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert isinstance(call.__cause__, shmcoord.Saturated)
    assert 0.1 < time.monotonic() - began < 2
    assert calls[0].traceback() is not None
    with pytest.raises(grpc.RpcError) as caught:
        calls[0].result()
    assert caught.value is calls[0]
    node.release.set()
    assert held.result() == "HOLD"
    none_held(cluster)


def test_the_deadline_counts_from_the_call_not_from_its_start(
    cluster: Cluster, stub: Stub, node: Node
) -> None:
    held = stub.Say.future("hold")
    assert node.entered.acquire(timeout=5)
    stream = stub.Count("1+", timeout=0.5)
    began = time.monotonic()
    timer = threading.Timer(0.3, lambda: (node.release.set(), node.release.clear()))
    timer.start()
    with pytest.raises(grpc.RpcError) as caught:
        list(stream)
    timer.join()
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert 0.4 < time.monotonic() - began < 0.75
    node.release.set()
    held.result(5)


def test_a_serializer_that_fails(cluster: Cluster, channel: grpc.Channel, node: Node) -> None:
    def fail(_: object) -> bytes:
        raise RuntimeError("no bytes")

    for kind, begin in (("unary_unary", "future"), ("unary_stream", "__call__")):
        call = getattr(channel, kind)(f"/{SERVICE}/Say", fail, bytes.decode)
        with pytest.raises(grpc.RpcError) as caught:
            getattr(call, begin)("x")
        assert caught.value.code() is grpc.StatusCode.INTERNAL
    stub = Stub(channel)
    held = stub.Say.future("hold")
    assert node.entered.acquire(timeout=5)
    late = channel.unary_unary(f"/{SERVICE}/Say", fail, bytes.decode).future("x")
    node.release.set()
    assert late.code() is grpc.StatusCode.INTERNAL
    assert late.details() == "Exception serializing request!"
    held.result(5)

    def break_off() -> Iterator[str]:
        yield "a"
        raise RuntimeError("no more requests")

    assert stub.Chat(break_off()).code() is grpc.StatusCode.UNKNOWN
    assert stub.Gather.future(break_off()).code() is grpc.StatusCode.UNKNOWN
    with pytest.raises(grpc.RpcError):
        stub.Gather(break_off())
    none_held(cluster)


def test_streams_that_one_thread_pumps(cluster: Cluster) -> None:
    node = cluster.add()
    options = ((grpc.experimental.ChannelOptions.SingleThreadedUnaryStream, 1),)
    with shmcoord.grpc.channel(cluster.name, group=GROUP, options=options) as channel:
        stub = Stub(channel)
        stub.Say("x")
        stream = stub.Count("2")
        with pytest.raises(grpc.experimental.UsageError):
            stream.code()
        assert list(stream) == ["0", "1"]
        assert stream.code() is grpc.StatusCode.OK
        none_held(cluster)
        stream = stub.Count("1+")
        assert next(stream) == "0"
        del stream
        none_held(cluster)
        stream = stub.Count("NOT_FOUND")
        with pytest.raises(grpc.RpcError) as caught:
            next(stream)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert len(node.seen) == 4


# --- streams that interceptors replace by bare iterators


class Generators(grpc.UnaryStreamClientInterceptor, grpc.StreamStreamClientInterceptor):  # type: ignore[misc]
    """What many interceptors do with a stream."""

    def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
        yield from continuation(details, request)

    intercept_stream_stream = intercept_unary_stream


class Maps(Generators):
    """Some do not delegate."""

    def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
        return map(str, continuation(details, request))

    intercept_stream_stream = intercept_unary_stream


@pytest.fixture(params=["generator", "map", "opentelemetry"])
def bare(request: pytest.FixtureRequest, cluster: Cluster) -> Iterator[Stub]:
    interceptors = {"generator": [Generators()], "map": [Maps()], "opentelemetry": []}
    undo: Callable[[], object] = lambda: None  # noqa: E731
    if request.param == "opentelemetry":
        otel = pytest.importorskip("opentelemetry.instrumentation.grpc")
        instrumentor = otel.GrpcInstrumentorClient()
        instrumentor.instrument()
        undo = instrumentor.uninstrument
    try:
        channel = shmcoord.grpc.channel(
            cluster.name, group=GROUP, interceptors=interceptors[request.param]
        )
        yield Stub(channel)
        close_soon(channel)
    finally:
        undo()


def test_bare_streams_are_released_at_their_end(cluster: Cluster, bare: Stub) -> None:
    node = cluster.add(adopts=False)
    assert bare.Say("warm") == "WARM"
    stream = bare.Count("2")
    assert next(stream) == "0"
    assert cluster.held() == 1
    assert list(stream) == ["1"]
    assert cluster.held() == 0
    assert stream.code() is grpc.StatusCode.OK
    assert stream.exception() is None
    assert list(bare.Chat(iter("ab"))) == ["A", "B"]
    none_held(cluster)
    assert len(node.seen) == 3


def test_bare_streams_are_released_after_an_error(cluster: Cluster, bare: Stub) -> None:
    cluster.add(adopts=False)
    bare.Say("warm")
    stream = bare.Count("NOT_FOUND")
    with pytest.raises(grpc.RpcError) as caught:
        next(stream)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert cluster.held() == 0
    assert stream.code() is grpc.StatusCode.NOT_FOUND
    assert stream.details() == "said NOT_FOUND"
    stream = bare.Count("1+", timeout=0.2)
    with pytest.raises(grpc.RpcError) as caught:
        list(stream)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert cluster.held() == 0


def test_bare_streams_are_released_when_dropped(cluster: Cluster, bare: Stub) -> None:
    node = cluster.add(adopts=False)
    bare.Say("warm")
    stream = bare.Count("1+")
    assert cluster.held() == 1
    del stream  # before it began
    none_held(cluster)
    stream = bare.Count("1+")
    assert next(stream) == "0"
    del stream
    none_held(cluster)
    stream = bare.Chat(iter("ab"))
    assert next(stream) == "A"
    del stream
    none_held(cluster)
    wait_until(lambda: node.ended.acquire(blocking=False))


def test_bare_streams_can_be_cancelled(cluster: Cluster, bare: Stub) -> None:
    cluster.add(adopts=False)
    bare.Say("warm")
    stream = bare.Count("1+")
    ended = threading.Event()
    stream.add_callback(ended.set)
    assert next(stream) == "0"
    assert stream.cancel()
    assert ended.wait(5)
    with pytest.raises(grpc.RpcError) as caught:
        next(stream)
    assert caught.value.code() is grpc.StatusCode.CANCELLED
    assert stream.cancelled()
    none_held(cluster)


def test_a_bare_stream_that_delegates_tells_its_metadata_and_wakes_its_reader(
    cluster: Cluster,
) -> None:
    cluster.add()
    with shmcoord.grpc.channel(cluster.name, group=GROUP, interceptors=[Generators()]) as channel:
        stream = Stub(channel).Count("2+")
        assert ("first", "B") in stream.initial_metadata()
        assert [next(stream), next(stream)] == ["0", "1"]
        timer = threading.Timer(0.05, stream.cancel)
        timer.start()
        with pytest.raises(grpc.RpcError) as caught:
            next(stream)
        assert caught.value.code() is grpc.StatusCode.CANCELLED
        timer.join()
        stream = Stub(channel).Count("1")
        assert list(stream) == ["0"]
        assert ("shmcoord-node", "B") in stream.trailing_metadata()
    none_held(cluster)
