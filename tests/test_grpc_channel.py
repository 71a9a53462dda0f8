"""The channel by load: all four kinds of call, with all their arguments, as grpcio's own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from grpc_cluster import GROUP, SERVICE, Cluster, Stub, close_soon, none_held
from helpers import wait_until

import shmcoord.grpc
from shmcoord import Router, Segment
from shmcoord.grpc import served_by


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


def test_all_kinds_of_call(cluster: Cluster, stub: Stub) -> None:
    node = cluster.add()
    assert stub.Say("hello", timeout=10) == "HELLO"
    assert stub.Say.future("hello").result(timeout=10) == "HELLO"
    response, call = stub.Say.with_call("hello")
    assert response == "HELLO"
    assert call.code() is grpc.StatusCode.OK
    assert list(stub.Count("3")) == ["0", "1", "2"]
    assert stub.Gather(iter("abc")) == "a+b+c"
    assert stub.Gather.future(iter("abc")).result() == "a+b+c"
    response, call = stub.Gather.with_call(iter("abc"))
    assert (response, call.code()) == ("a+b+c", grpc.StatusCode.OK)
    assert list(stub.Chat(iter("abc"))) == ["A", "B", "C"]
    assert len(node.seen) == 8
    assert all("shmcoord-lease" in metadata for metadata in node.metadata)
    none_held(cluster)


def test_calls_are_the_classes_that_grpcio_has(channel: grpc.Channel) -> None:
    stub = Stub(channel)
    assert isinstance(channel, grpc.Channel)
    assert isinstance(stub.Say, grpc.UnaryUnaryMultiCallable)
    assert isinstance(stub.Count, grpc.UnaryStreamMultiCallable)
    assert isinstance(stub.Gather, grpc.StreamUnaryMultiCallable)
    assert isinstance(stub.Chat, grpc.StreamStreamMultiCallable)


def test_arguments_have_the_names_and_places_that_grpcio_gives_them(
    cluster: Cluster, stub: Stub
) -> None:
    cluster.add()
    rest = {
        "timeout": 10,
        "metadata": (("a", "b"),),
        "credentials": None,
        "wait_for_ready": True,
        "compression": grpc.Compression.Gzip,
    }
    assert stub.Say(request="a", **rest) == "A"
    assert stub.Say.with_call(request="a", **rest)[0] == "A"
    assert stub.Say.future(request="a", **rest).result() == "A"
    assert list(stub.Count(request="1", **rest)) == ["0"]
    assert stub.Gather(request_iterator=iter("ab"), **rest) == "a+b"
    assert stub.Gather.with_call(request_iterator=iter("ab"), **rest)[0] == "a+b"
    assert stub.Gather.future(request_iterator=iter("ab"), **rest).result() == "a+b"
    assert list(stub.Chat(request_iterator=iter("ab"), **rest)) == ["A", "B"]
    places = tuple(rest.values())
    assert stub.Say("a", *places) == "A"
    assert stub.Gather(iter("a"), *places) == "a"
    assert list(stub.Count("1", *places)) == ["0"]
    assert list(stub.Chat(iter("a"), *places)) == ["A"]


def test_metadata_reaches_the_node_and_ours_is_taken_out(cluster: Cluster, stub: Stub) -> None:
    node = cluster.add(capacity=4)
    metadata = [("word", "x"), ("shmcoord-cost", "3"), ("shmcoord-key", "k"), ("raw-bin", b"\0")]
    assert stub.Say("hello", metadata=metadata) == "HELLO"
    sent = node.metadata[-1]
    assert sent["word"] == "x"
    assert sent["raw-bin"] == b"\0"
    assert "shmcoord-cost" not in sent
    assert "shmcoord-key" not in sent
    held = stub.Say.future("hold", metadata=metadata)
    assert node.entered.acquire(timeout=5)
    assert node.entered.acquire(timeout=5)
    assert cluster.segment.status("B").inflight == 3
    node.release.set()
    assert held.result(5) == "HOLD"
    with pytest.raises(ValueError, match="shmcoord-cost must be a whole number, not 'many'"):
        stub.Say("hello", metadata=(("shmcoord-cost", "many"),))
    with pytest.raises(ValueError, match="cost must be between 1"):
        stub.Say("hello", metadata=(("shmcoord-cost", "0"),))


def test_the_same_key_goes_to_the_same_node(cluster: Cluster) -> None:
    nodes = [cluster.add(name) for name in "BCDE"]
    with shmcoord.grpc.channel(cluster.name, group=GROUP, policy="affinity") as channel:
        stub = Stub(channel)
        for _ in range(8):
            stub.Say("hello", metadata=(("shmcoord-key", "one key"),))
    assert sorted(len(node.seen) for node in nodes) == [0, 0, 0, 8]


def test_load_decides(cluster: Cluster, stub: Stub) -> None:
    busy, idle = cluster.add("B"), cluster.add("C")
    held = [stub.Say.future("hold") for _ in range(2)]
    wait_until(lambda: len(busy.seen) + len(idle.seen) == 2)
    assert (len(busy.seen), len(idle.seen)) == (1, 1)
    busy.release.set()
    wait_until(lambda: sum(call.done() for call in held) == 1)
    wait_until(lambda: cluster.segment.status("B").queue == 0)
    for _ in range(5):
        assert stub.Say("x") == "X"
    assert len(busy.seen) == 6
    idle.release.set()


def test_served_by_names_the_node_of_the_last_call(cluster: Cluster, stub: Stub) -> None:
    cluster.add("B", capacity=1)
    stub.Say("x")
    assert served_by.get() == "B"
    cluster.add("C", capacity=1)
    nodes = set()
    for _ in range(30):  # both idle: chance decides
        stub.Say("x")
        nodes.add(served_by.get())
        if len(nodes) == 2:
            break
    assert nodes == {"B", "C"}
    held = stub.Say.future("hold")
    first = served_by.get()
    stub.Say("x")
    assert {first, served_by.get()} == {"B", "C"}
    for node in cluster.nodes:
        node.release.set()
    held.result(5)


def test_a_call_that_waited_also_names_its_node(cluster: Cluster, stub: Stub) -> None:
    node = cluster.add("B", capacity=1)
    held = stub.Say.future("hold")
    waits, stream = stub.Say.future("x"), stub.Count("1")
    served_by.set(None)
    node.release.set()
    assert waits.result(5) == "X"
    assert served_by.get() == "B"
    served_by.set(None)
    assert next(stream) == "0"
    assert served_by.get() == "B"
    held.result(5)


def test_a_router_of_ones_own_stays_open(cluster: Cluster) -> None:
    cluster.add()
    with Router(cluster.name) as router:
        with shmcoord.grpc.channel(group=GROUP, router=router) as channel:
            assert Stub(channel).Say("x") == "X"
        assert not router.closed
        router.acquire(GROUP).release()


def test_segments_may_be_open_ones(cluster: Cluster) -> None:
    cluster.add()
    with (
        Segment.open(cluster.name) as segment,
        shmcoord.grpc.channel(segment, group=GROUP) as channel,
    ):
        assert Stub(channel).Say("x") == "X"


def test_wrong_arguments(cluster: Cluster) -> None:
    with pytest.raises(TypeError, match="either"):
        shmcoord.grpc.channel(group=GROUP)
    with Router(cluster.name) as router, pytest.raises(TypeError, match="either"):
        shmcoord.grpc.channel(cluster.name, group=GROUP, router=router)
    with pytest.raises(TypeError, match="several methods"):
        shmcoord.grpc.channel(cluster.name, group=GROUP, idempotent="/a/b")
    with pytest.raises(ValueError, match="full name"):
        shmcoord.grpc.channel(cluster.name, group=GROUP, idempotent=["Say"])
    with pytest.raises(ValueError, match="negative"):
        shmcoord.grpc.channel(cluster.name, group=GROUP, max_wait_s=-1)


def test_unix_sockets(cluster: Cluster, stub: Stub, tmp_path: object) -> None:
    node = cluster.add(address=f"unix:{tmp_path}/socket")
    assert stub.Say("x") == "X"
    assert node.peers[0].startswith("unix:")


def test_options_and_compression_reach_the_channels(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.add()
    made = []
    real = grpc.insecure_channel

    def insecure_channel(*args: object) -> grpc.Channel:
        made.append(args)
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(grpc, "insecure_channel", insecure_channel)
    with shmcoord.grpc.channel(
        cluster.name,
        group=GROUP,
        options=(("grpc.max_send_message_length", 100),),
        compression=grpc.Compression.Gzip,
    ) as channel:
        stub = Stub(channel)
        assert stub.Say("x") == "X"
        with pytest.raises(grpc.RpcError) as caught:
            stub.Say("x" * 200)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    [(endpoint, options, compression)] = made
    assert endpoint == cluster.nodes[0].endpoint
    assert ("grpc.max_send_message_length", 100) in options
    assert compression is grpc.Compression.Gzip
    none_held(cluster)


def test_a_closed_channel_refuses(cluster: Cluster) -> None:
    cluster.add()
    channel = shmcoord.grpc.channel(cluster.name, group=GROUP)
    stub = Stub(channel)
    assert stub.Say("x") == "X"
    channel.close()
    channel.close()
    calls: list[Callable[[], object]] = [
        lambda: stub.Say("x"),
        lambda: stub.Say.with_call("x"),
        lambda: stub.Say.future("x"),
        lambda: stub.Count("1"),
        lambda: stub.Gather(iter("a")),
        lambda: stub.Chat(iter("a")),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="Cannot invoke RPC on closed channel!"):
            call()
    assert cluster.held() == 0


def test_closing_cancels_what_is_under_way(cluster: Cluster) -> None:
    node = cluster.add(capacity=3)
    channel = shmcoord.grpc.channel(cluster.name, group=GROUP)
    stub = Stub(channel)
    errors: list[grpc.RpcError] = []

    def block() -> None:
        try:
            stub.Say("hold")
        except grpc.RpcError as error:
            errors.append(error)

    blocked = threading.Thread(target=block)
    blocked.start()
    future, stream = stub.Say.future("hold"), stub.Count("1+")
    assert next(stream) == "0"
    for _ in range(3):
        assert node.entered.acquire(timeout=5)
    waits, waiting = stub.Say.future("x"), threading.Thread(target=block)
    waiting.start()
    time.sleep(0.05)
    began = time.monotonic()
    channel.close()
    assert time.monotonic() - began < 2
    blocked.join(5)
    waiting.join(5)
    assert [error.code() for error in errors] == [grpc.StatusCode.CANCELLED] * 2
    assert future.code() is grpc.StatusCode.CANCELLED
    assert waits.code() is grpc.StatusCode.CANCELLED
    assert waits.details() == "Channel closed!"
    with pytest.raises(grpc.RpcError):
        next(stream)
    none_held(cluster)


def test_who_drops_channel_and_stub_gives_all_back(cluster: Cluster) -> None:
    cluster.add()
    stub = Stub(shmcoord.grpc.channel(cluster.name, group=GROUP))
    assert stub.Say("x") == "X"  # the channel itself is gone
    watchers = [t for t in threading.enumerate() if t.name == "shmcoord-close"]
    core = stub.Say._core
    pool, router = core.pool, core.router
    assert pool.open_links() == 1
    del stub, core
    wait_until(lambda: router.closed and pool.open_links() == 0)
    for thread in watchers:
        thread.join(5)


def test_a_stub_for_each_call_leaves_nothing(cluster: Cluster, channel: grpc.Channel) -> None:
    cluster.add()
    for _ in range(20):
        assert Stub(channel).Say("x") == "X"
        assert list(Stub(channel).Count("1")) == ["0"]
    [link] = channel._core.pool.links()  # type: ignore[attr-defined]
    wait_until(lambda: len(link.methods) == 0)


def test_a_method_is_made_once_for_each_link(cluster: Cluster, stub: Stub) -> None:
    cluster.add()
    for _ in range(3):
        stub.Say("x")
        stub.Say.future("x").result()
    [link] = stub.Say._core.pool.links()
    assert len(link.methods) == 1


def test_a_serializer_that_fails_is_grpcios_error(cluster: Cluster, channel: grpc.Channel) -> None:
    cluster.add()

    def fail(_: object) -> bytes:
        raise RuntimeError("no bytes")

    for kind in ("unary_unary", "stream_unary"):
        call = getattr(channel, kind)(f"/{SERVICE}/Say", fail, bytes.decode)
        with pytest.raises(grpc.RpcError) as caught:
            call("x" if kind == "unary_unary" else iter("x"))
        assert caught.value.code() is grpc.StatusCode.INTERNAL
    call = channel.unary_unary(f"/{SERVICE}/Say", str.encode, fail)
    with pytest.raises(grpc.RpcError) as caught:
        call("x")
    assert caught.value.details() == "Exception deserializing response!"
    none_held(cluster)


def test_deadlines(cluster: Cluster, stub: Stub) -> None:
    cluster.add()
    stub.Say("x")
    for timeout in (0.1, 0, -1):
        with pytest.raises(grpc.RpcError) as caught:
            stub.Say("hold", timeout=timeout)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert stub.Say.future("hold", timeout=timeout).code() is caught.value.code()
        stream = stub.Count("1+", timeout=timeout)
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    none_held(cluster)


def test_an_error_is_grpcios_own(cluster: Cluster, stub: Stub) -> None:
    cluster.add()
    with pytest.raises(grpc.RpcError) as caught:
        stub.Say("NOT_FOUND")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert caught.value.details() == "said NOT_FOUND"
    assert ("shmcoord-node", "B") in caught.value.trailing_metadata()
    assert type(caught.value).__module__.startswith("grpc.")
    none_held(cluster)


def test_many_threads(cluster: Cluster, stub: Stub) -> None:
    for name in "BC":
        cluster.add(name, capacity=2)
    wrong: list[object] = []

    def work(number: int) -> None:
        for n in range(20):
            response = stub.Say(f"r{number}.{n}", timeout=20)
            if response != f"R{number}.{n}":
                wrong.append(response)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong
    assert sum(len(node.seen) for node in cluster.nodes) == 160
    none_held(cluster)


def test_interceptors_outside_see_each_call_once(cluster: Cluster, channel: grpc.Channel) -> None:
    cluster.add("B", listens=False)
    cluster.add("C")
    seen: list[str] = []

    class Notes(
        grpc.UnaryUnaryClientInterceptor,  # type: ignore[misc]
        grpc.UnaryStreamClientInterceptor,  # type: ignore[misc]
        grpc.StreamUnaryClientInterceptor,  # type: ignore[misc]
        grpc.StreamStreamClientInterceptor,  # type: ignore[misc]
    ):
        def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
            seen.append(details.method)
            return continuation(details, request)

        intercept_unary_stream = intercept_unary_unary
        intercept_stream_unary = intercept_unary_unary
        intercept_stream_stream = intercept_unary_unary

    stub = Stub(grpc.intercept_channel(channel, Notes()))
    assert stub.Say("x") == "X"
    assert stub.Say.future("x").result(5) == "X"
    assert stub.Gather(iter("ab")) == "a+b"
    assert list(stub.Count("1")) == ["0"]
    assert list(stub.Chat(iter("a"))) == ["A"]
    assert [name.rpartition("/")[2] for name in seen] == ["Say", "Say", "Gather", "Count", "Chat"]
    none_held(cluster)


def test_the_current_span_tells_the_node(cluster: Cluster, stub: Stub) -> None:
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    cluster.add()
    tracer = sdk.TracerProvider().get_tracer("test")
    calls: list[Callable[[], object]] = [
        lambda: stub.Say("x"),
        lambda: stub.Say.future("x").result(),
        lambda: list(stub.Count("1")),
    ]
    for call in calls:
        with tracer.start_as_current_span("work") as span:
            call()
        assert span.attributes["shmcoord.node"] == "B"
        assert span.attributes["shmcoord.group"] == GROUP
        assert 0 <= span.attributes["shmcoord.waited_s"] < 5
    held = stub.Say.future("x")  # none is recorded: nothing fails
    assert held.result(5) == "X"
