"""What code with threads does with a channel, with plain gRPC and through shmcoord alike."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import grpc
import pytest
from grpc_sessions import METADATA, notes, points
from grpc_worlds import FULL, KINDS, PATIENCE_S, Counting, Link, World, users
from helpers import wait_until

CANCELLED = grpc.StatusCode.CANCELLED
DEADLINE_EXCEEDED = grpc.StatusCode.DEADLINE_EXCEEDED
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
T = PATIENCE_S
#: Tries again soon where nobody listened.
SOON = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.min_reconnect_backoff_ms", 50)]


@pytest.fixture(params=KINDS if FULL else KINDS[:1])
def server(world: World, request: pytest.FixtureRequest) -> str:
    """A server that runs; its kind."""
    world.serve(request.param)
    return request.param


class Client:
    """Stubs of one channel, and shorter names."""

    def __init__(self, services: ModuleType, channel: grpc.Channel) -> None:
        self.channel = channel
        self.greeter = services.helloworld_pb2_grpc.GreeterStub(channel)
        self.guide = services.route_guide_pb2_grpc.RouteGuideStub(channel)
        self.hello = services.helloworld_pb2.HelloRequest
        self.services = services

    def all_kinds(self, **options: Any) -> dict[str, Any]:
        """A call of each kind; how it ended, by the name of its method."""
        ended = {"SayHello": self.greeter.SayHello.with_call(self.hello(name="you"), **options)[1]}
        _, call = self.guide.RecordRoute.with_call(iter(points(self.services)), **options)
        ended["RecordRoute"] = call
        for name, call in (
            ("ListFeatures", self.guide.ListFeatures(self.services.everywhere(), **options)),
            ("RouteChat", self.guide.RouteChat(iter(notes(self.services)), **options)),
        ):
            for _ in call:
                pass
            ended[name] = call
        assert {call.code() for call in ended.values()} == {grpc.StatusCode.OK}
        return ended


@pytest.fixture
def client(world: World, server: str, example_services: ModuleType) -> Client:
    return Client(example_services, world.channel())


# --- deadlines, waiting


def test_a_deadline_reaches_the_handler_and_ends_the_call(client: Client):
    left_s = client.greeter.SayHello(client.hello(name="left"), timeout=8.0).message
    assert 0.0 < float(left_s.removeprefix("Hello, ").removesuffix("!")) < 8.5
    began = time.monotonic()
    with pytest.raises(grpc.RpcError) as caught:
        client.greeter.SayHello(client.hello(name="sleep 5"), timeout=0.1)
    assert caught.value.code() is DEADLINE_EXCEEDED
    features = client.guide.RouteChat(iter(_note_forever(client)), timeout=0.1)
    with pytest.raises(grpc.RpcError) as caught:
        list(features)
    assert caught.value.code() is features.code() is DEADLINE_EXCEEDED
    assert time.monotonic() - began < 3.0


def _note_forever(client: Client) -> Any:
    """One note, then none until the call is over."""
    yield client.services.route_guide_pb2.RouteNote(message="sleep 5")


def test_a_deadline_that_has_passed(client: Client):
    with pytest.raises(grpc.RpcError) as caught:
        client.greeter.SayHello(client.hello(name="you"), timeout=-1.0)
    assert caught.value.code() is DEADLINE_EXCEEDED


def test_without_a_server_a_call_fails_at_once(
    world: World, grpc_links: dict[str, Link], example_services: ModuleType
):
    world.link = grpc_links["unix"]
    world.address = world.link.new_address()
    client = Client(example_services, world.channel())
    began = time.monotonic()
    with pytest.raises(grpc.RpcError) as caught:
        client.greeter.SayHello(client.hello(name="you"), timeout=T)
    assert caught.value.code() is UNAVAILABLE
    with pytest.raises(grpc.RpcError) as caught:
        list(client.guide.ListFeatures(example_services.everywhere(), timeout=T))
    assert caught.value.code() is UNAVAILABLE
    future = client.greeter.SayHello.future(client.hello(name="you"), timeout=T)
    assert isinstance(future.exception(), grpc.RpcError)
    assert future.code() is UNAVAILABLE
    assert time.monotonic() - began < 3.0


@pytest.mark.parametrize("kind", KINDS if FULL else KINDS[:1])
def test_wait_for_ready_waits_for_a_server(
    world: World, grpc_links: dict[str, Link], example_services: ModuleType, kind: str
):
    world.link = grpc_links["unix"]
    world.address = world.link.new_address()
    client = Client(example_services, world.channel(options=SOON))
    asked = {"wait_for_ready": True, "timeout": T}
    future = client.greeter.SayHello.future(client.hello(name="early"), **asked)
    features = client.guide.ListFeatures(example_services.everywhere(), **asked)
    with ThreadPoolExecutor(1) as threads:
        blocking = threads.submit(client.greeter.SayHello, client.hello(name="bird"), **asked)
        with pytest.raises(grpc.FutureTimeoutError):
            future.result(0.05)
        assert not future.done()
        assert features.is_active()
        world.serve(kind, address=world.address)
        assert future.result().message == "Hello, early!"
        assert len(list(features)) == len(example_services.FEATURES)
        assert blocking.result(T).message == "Hello, bird!"


def test_wait_for_ready_waits_no_longer_than_the_deadline(
    world: World, grpc_links: dict[str, Link], example_services: ModuleType
):
    world.link = grpc_links["unix"]
    world.address = world.link.new_address()
    client = Client(example_services, world.channel())
    with pytest.raises(grpc.RpcError) as caught:
        client.greeter.SayHello(client.hello(name="you"), timeout=0.1, wait_for_ready=True)
    assert caught.value.code() is DEADLINE_EXCEEDED


# --- compression, options, credentials


@pytest.mark.parametrize("kind", KINDS if FULL else KINDS[:1])
def test_compression(world: World, example_services: ModuleType, kind: str):
    """Seen by what goes over the wire, of the call and of the channel."""
    long = "x" * 100_000
    with contextlib.closing(Counting()) as wire:
        world.serve(kind, behind=wire)
        client = Client(example_services, world.channel())

        def sent(name: str, **options: Any) -> tuple[bool, bool]:
            """Whether the request and the reply were much shorter than the name."""
            before = wire.up, wire.down
            assert client.greeter.SayHello(client.hello(name=name), timeout=T, **options).message
            return wire.up - before[0] < 50_000, wire.down - before[1] < 50_000

        assert sent(long) == (False, False)
        assert sent(long, compression=grpc.Compression.Gzip) == (True, False)
        assert sent("gzip " + long) == (False, True)
        client = Client(example_services, world.channel(compression=grpc.Compression.Gzip))
        assert sent(long) == (True, False)


def test_options_of_the_channel(world: World, server: str, example_services: ModuleType):
    options = [("grpc.max_receive_message_length", 1000)]
    client = Client(example_services, world.channel(options=options))
    assert client.greeter.SayHello(client.hello(name="you"), timeout=T).message == "Hello, you!"
    with pytest.raises(grpc.RpcError) as caught:
        client.greeter.SayHello(client.hello(name="x" * 2000), timeout=T)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


class Badge(grpc.AuthMetadataPlugin):
    """Credentials of a call."""

    def __call__(self, context: Any, callback: Any) -> None:
        callback((("x-badge", context.method_name),), None)


def test_credentials_of_a_call(
    world: World, grpc_links: dict[str, Link], example_services: ModuleType
):
    world.link = grpc_links["tls"]
    world.serve("sync")
    client = Client(example_services, world.channel())
    ended = client.all_kinds(timeout=T, credentials=grpc.metadata_call_credentials(Badge()))
    badges = {dict(call.trailing_metadata())["x-badge"] for call in ended.values()}
    assert badges == {"SayHello", "RecordRoute", "ListFeatures", "RouteChat"}


# --- interceptors


class Stamp(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Adds to metadata, which the handler sends back; notes what it saw."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name = name
        self.log = log

    def _stamped(self, go_on: Any, details: Any, request: Any) -> Any:
        self.log.append(f"{self.name} {details.method.rpartition('/')[2]}")

        return go_on(_Details(details, (*(details.metadata or ()), ("x-by", self.name))), request)

    intercept_unary_unary = _stamped
    intercept_unary_stream = _stamped
    intercept_stream_unary = _stamped
    intercept_stream_stream = _stamped


class _Details(grpc.ClientCallDetails):
    def __init__(self, details: Any, metadata: Any) -> None:
        self.method, self.timeout = details.method, details.timeout
        self.metadata = metadata
        self.credentials, self.wait_for_ready = details.credentials, details.wait_for_ready
        self.compression = details.compression


def test_interceptors_of_the_client_outside_and_inside(
    world: World, server: str, example_services: ModuleType
):
    log: list[str] = []
    channel = world.channel(interceptors=(Stamp("third", log), Stamp("fourth", log)))
    channel = grpc.intercept_channel(channel, Stamp("first", log), Stamp("second", log))
    ended = Client(example_services, channel).all_kinds(timeout=T, metadata=METADATA)
    order = ["first", "second", "third", "fourth"]
    assert sorted(log) == sorted(f"{name} {method}" for method in ended for name in order)
    for method, call in ended.items():
        assert [line.split()[0] for line in log if line.endswith(method)] == order
        seen = call.trailing_metadata()
        assert [value for key, value in seen if key == "x-by"] == order
        assert [pair for pair in users(seen) if pair[0] != "x-by"] == sorted(METADATA)


class Retries(grpc.UnaryUnaryClientInterceptor):
    """A user's own: asks once more when the first answer is an error."""

    def intercept_unary_unary(self, go_on: Any, details: Any, request: Any) -> Any:
        first = go_on(details, request)
        if first.code() is grpc.StatusCode.INVALID_ARGUMENT:
            return go_on(details, type(request)(name="anybody"))
        return first


def test_an_interceptor_may_call_twice(world: World, server: str, example_services: ModuleType):
    inside = Client(example_services, world.channel(interceptors=(Retries(),)))
    outside = Client(example_services, grpc.intercept_channel(world.channel(), Retries()))
    for client in (inside, outside):
        for name, said in (("", "Hello, anybody!"), ("you", "Hello, you!")):
            request = client.hello(name=name)
            assert client.greeter.SayHello(request, timeout=T).message == said
            assert client.greeter.SayHello.future(request, timeout=T).result().message == said


# --- futures, callbacks, cancellation


def test_a_future(client: Client):
    ended: list[Any] = []
    over = threading.Event()
    future = client.greeter.SayHello.future(client.hello(name="sleep 0.2"), timeout=T)
    future.add_done_callback(lambda of: (ended.append(of), over.set()))
    assert future.running()
    assert future.is_active()
    assert not future.cancelled()
    assert 0.0 < future.time_remaining() <= T
    with pytest.raises(grpc.FutureTimeoutError):
        future.result(0.01)
    with pytest.raises(grpc.FutureTimeoutError):
        future.exception(0.01)
    assert future.result(T).message == "Hello, sleep 0.2!"
    assert over.wait(T)
    assert ended == [future]
    assert future.done()
    assert not future.running()
    assert not future.is_active()
    assert future.exception() is None
    assert future.traceback() is None
    assert future.add_callback(lambda: None) is False
    late = threading.Event()
    future.add_done_callback(lambda of: late.set())
    assert late.wait(T)
    assert future.cancel() is False


def test_a_future_that_fails(client: Client):
    future = client.greeter.SayHello.future(client.hello(name=""), timeout=T)
    with pytest.raises(grpc.RpcError) as caught:
        future.result()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert future.exception() is not None
    assert future.traceback() is not None
    assert future.details() == "a name is needed"
    assert not future.cancelled()


def test_a_future_is_cancelled(client: Client):
    ended = threading.Event()
    future = client.greeter.SayHello.future(client.hello(name="sleep 5"), timeout=T)
    assert future.add_callback(ended.set) is True
    assert future.cancel() is True
    assert ended.wait(T)
    assert future.cancelled()
    assert future.done()
    assert future.code() is CANCELLED
    for ask in (future.result, future.exception, future.traceback):
        with pytest.raises(grpc.FutureCancelledError):
            ask()


def test_a_stream_is_cancelled_half_read(client: Client):
    ended = threading.Event()
    call = client.guide.RouteChat(_notes_then_silence(client, ended), timeout=T)
    assert call.add_callback(ended.set) is True
    assert call.is_active()
    assert next(call).message == "first"
    assert call.initial_metadata() is not None
    assert call.cancel() is not None
    with pytest.raises(grpc.RpcError) as caught:
        next(call)
    assert caught.value.code() is call.code() is CANCELLED
    assert ended.wait(T)
    assert not call.is_active()
    assert call.add_callback(lambda: None) is False


def _notes_then_silence(client: Client, over: threading.Event) -> Any:
    yield from notes(client.services)[:3]
    over.wait(T)


def test_a_stream_is_a_future_too(client: Client):
    call = client.guide.ListFeatures(client.services.everywhere(), timeout=T)
    ended: list[Any] = []
    over = threading.Event()
    call.add_done_callback(lambda of: (ended.append(of), over.set()))
    assert len(list(call)) == len(client.services.FEATURES)
    assert over.wait(T)
    assert ended == [call]
    assert call.done()
    assert not call.cancelled()
    assert call.exception() is None


def test_a_request_iterator_that_raises(client: Client):
    def broken() -> Any:
        yield from notes(client.services)[:3]
        raise ValueError("no more notes")

    with pytest.raises(grpc.RpcError) as caught:
        list(client.guide.RouteChat(broken(), timeout=T))
    assert caught.value.code() is grpc.StatusCode.UNKNOWN
    with pytest.raises(grpc.RpcError) as caught:
        client.guide.RecordRoute((point / 0 for point in (1, 2)), timeout=T)
    assert caught.value.code() is grpc.StatusCode.UNKNOWN


def test_a_request_that_cannot_be_serialized(client: Client):
    with pytest.raises(grpc.RpcError) as caught:
        client.greeter.SayHello(object(), timeout=T)
    assert caught.value.code() is grpc.StatusCode.INTERNAL


# --- the channel


def test_the_with_block_closes_the_channel(world: World, server: str, example_services: ModuleType):
    with world.channel() as channel:
        client = Client(example_services, channel)
        waiting = client.greeter.SayHello.future(client.hello(name="sleep 5"), timeout=T)
    with pytest.raises(grpc.RpcError) as caught:
        waiting.result(T)
    assert caught.value.code() is waiting.code() is CANCELLED
    with pytest.raises(ValueError, match=r"[Cc]losed"):
        client.greeter.SayHello(client.hello(name="you"))
    with pytest.raises(ValueError, match=r"[Cc]losed"):
        client.guide.ListFeatures(example_services.everywhere())
    channel.close()


@contextlib.contextmanager
def until_nobody_watches(world: World) -> Iterator[None]:
    """Leave when the threads that gRPC began inside have ended.

    One that watches a channel of gRPC ends up to 0.2 s after nobody wants to know any more, and
    raises where the channel is closed before. Through shmcoord it need not be waited for.
    """
    if world.name != "plain":
        yield
        return

    def watching() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if "(_run)" in thread.name}

    before = watching()
    yield
    wait_until(lambda: watching() <= before)


def test_connectivity(world: World, client: Client):
    with until_nobody_watches(world):
        connectivity(client)


def connectivity(client: Client) -> None:
    states: list[grpc.ChannelConnectivity] = []
    seen = states.append
    client.channel.subscribe(seen, try_to_connect=True)
    grpc.channel_ready_future(client.channel).result(T)
    wait_until(lambda: grpc.ChannelConnectivity.READY in states)
    # Through shmcoord the channel to the node may have begun to connect when it is asked.
    assert states[0] in (grpc.ChannelConnectivity.IDLE, grpc.ChannelConnectivity.CONNECTING)
    client.channel.unsubscribe(seen)
    assert client.greeter.SayHello(client.hello(name="you"), timeout=T).message == "Hello, you!"


def test_channel_ready_waits_for_a_server(world: World, grpc_links: dict[str, Link]):
    world.link = grpc_links["unix"]
    world.address = world.link.new_address()
    channel = world.channel(options=SOON)
    with until_nobody_watches(world):
        ready = grpc.channel_ready_future(channel)
        with pytest.raises(grpc.FutureTimeoutError):
            ready.result(0.1)
        world.serve("aio", address=world.address)
        ready.result(T)


def test_methods_without_a_stub(client: Client):
    """As code does that knows only names and bytes."""
    raw = client.hello(name="raw").SerializeToString()
    method = client.channel.unary_unary("/helloworld.Greeter/SayHello")
    assert client.services.helloworld_pb2.HelloReply.FromString(method(raw, timeout=T)).message == (
        "Hello, raw!"
    )
    method = client.channel.unary_stream(
        "/routeguide.RouteGuide/ListFeatures",
        request_serializer=lambda rectangle: rectangle.SerializeToString(),
        response_deserializer=None,
    )
    read = [
        client.services.route_guide_pb2.Feature.FromString(feature).name
        for feature in method(client.services.everywhere(), timeout=T)
    ]
    assert read == [feature.name for feature in client.services.FEATURES]


def test_threads_share_a_channel(client: Client):
    def work(number: int) -> int:
        for turn in range(10):
            name = f"{number}.{turn}"
            reply = client.greeter.SayHello(client.hello(name=name), timeout=T)
            assert reply.message == f"Hello, {name}!"
            client.all_kinds(timeout=T)
        return number

    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(work, range(6))) == list(range(6))
