"""What code on an event loop does with a channel, with plain gRPC and through shmcoord alike."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from types import ModuleType
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_sessions import METADATA, notes, points
from grpc_worlds import FULL, KINDS, PATIENCE_S, Counting, Link, World, users

CANCELLED = grpc.StatusCode.CANCELLED
DEADLINE_EXCEEDED = grpc.StatusCode.DEADLINE_EXCEEDED
OK = grpc.StatusCode.OK
READY = grpc.ChannelConnectivity.READY
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
T = PATIENCE_S
#: Tries again soon where nobody listened.
SOON = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.min_reconnect_backoff_ms", 50)]


class Client:
    """Stubs of one channel, and shorter names."""

    def __init__(self, services: ModuleType, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.greeter = services.helloworld_pb2_grpc.GreeterStub(channel)
        self.guide = services.route_guide_pb2_grpc.RouteGuideStub(channel)
        self.services = services

    def hello(self, name: str, **options: Any) -> Any:
        return self.greeter.SayHello(
            self.services.helloworld_pb2.HelloRequest(name=name), **{"timeout": T, **options}
        )

    def places(self, **options: Any) -> Any:
        return self.guide.ListFeatures(self.services.everywhere(), **{"timeout": T, **options})

    async def all_kinds(self, **options: Any) -> dict[str, Any]:
        """A call of each kind, all at once; how it ended, by the name of its method."""
        options = {"timeout": T, **options}
        calls = {
            "SayHello": self.hello("you", **options),
            "RecordRoute": self.guide.RecordRoute(iter(points(self.services)), **options),
            "ListFeatures": self.places(**options),
            "RouteChat": self.guide.RouteChat(iter(notes(self.services)), **options),
        }
        await asyncio.gather(*(ended(call) for call in calls.values()))
        assert {await call.code() for call in calls.values()} == {OK}
        return calls


async def ended(call: Any) -> grpc.StatusCode:
    """Read a call to its end."""
    with contextlib.suppress(grpc.aio.AioRpcError):
        if hasattr(call, "__await__"):
            await call
        else:
            async for _ in call:
                pass
    return await call.code()


@pytest.fixture(params=KINDS if FULL else KINDS[1:])
def server(world: World, request: pytest.FixtureRequest) -> str:
    """A server that runs; its kind."""
    world.serve(request.param)
    return request.param


Work = Callable[[Client], Coroutine[Any, Any, None]]


@pytest.fixture
def client(world: World, example_services: ModuleType) -> Callable[..., None]:
    """`client(work, **options)` runs `work` with stubs of a channel, on the loop."""

    def run(work: Work, **options: Any) -> None:
        world.with_channel(lambda channel: work(Client(example_services, channel)), **options)

    return run


@pytest.fixture
def unserved(world: World, grpc_links: dict[str, Link]) -> World:
    """Nobody listens at the address that clients know."""
    world.link = grpc_links["unix"]
    world.address = world.link.new_address()
    return world


# --- deadlines, waiting


def test_a_deadline_reaches_the_handler_and_ends_the_call(server: str, client: Callable):
    async def work(client: Client) -> None:
        left_s = (await client.hello("left", timeout=8.0)).message
        assert 0.0 < float(left_s.removeprefix("Hello, ").removesuffix("!")) < 8.5
        began = time.monotonic()
        call = client.hello("sleep 5", timeout=0.1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is await call.code() is DEADLINE_EXCEEDED
        slow = client.services.route_guide_pb2.RouteNote(message="sleep 5")
        call = client.guide.RouteChat(iter([slow]), timeout=0.1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is await call.code() is DEADLINE_EXCEEDED
        assert time.monotonic() - began < 3.0

    client(work)


def test_without_a_server_a_call_fails_at_once(unserved: World, client: Callable):
    async def work(client: Client) -> None:
        began = time.monotonic()
        for call in (client.hello("you"), client.places()):
            assert await ended(call) is UNAVAILABLE
        assert time.monotonic() - began < 3.0

    client(work)


@pytest.mark.parametrize("kind", KINDS if FULL else KINDS[1:])
def test_wait_for_ready_waits_for_a_server(unserved: World, client: Callable, kind: str):
    async def work(client: Client) -> None:
        reply = asyncio.ensure_future(ended(client.hello("you", wait_for_ready=True)))
        places = client.places(wait_for_ready=True)
        assert not (await asyncio.wait([reply], timeout=0.05))[0]
        assert not places.done()
        # Elsewhere: the server of an event loop starts on this one.
        serving = asyncio.to_thread(unserved.serve, kind, address=unserved.address)
        await serving
        assert await reply is OK
        assert len([place async for place in places]) == len(client.services.FEATURES)

    client(work, options=SOON)


def test_wait_for_ready_waits_no_longer_than_the_deadline(unserved: World, client: Callable):
    async def work(client: Client) -> None:
        call = client.hello("you", wait_for_ready=True, timeout=0.1)
        assert await ended(call) is DEADLINE_EXCEEDED

    client(work)


# --- compression, options, credentials


@pytest.mark.parametrize("kind", KINDS if FULL else KINDS[1:])
def test_compression(world: World, client: Callable, kind: str):
    """Seen by what goes over the wire, of the call and of the channel."""
    long = "x" * 100_000
    with contextlib.closing(Counting()) as wire:
        world.serve(kind, behind=wire)

        async def sent(client: Client, name: str, **options: Any) -> tuple[bool, bool]:
            """Whether the request and the reply were much shorter than the name."""
            before = wire.up, wire.down
            assert await ended(client.hello(name, **options)) is OK
            return wire.up - before[0] < 50_000, wire.down - before[1] < 50_000

        async def of_calls(client: Client) -> None:
            assert await sent(client, long) == (False, False)
            assert await sent(client, long, compression=grpc.Compression.Gzip) == (True, False)
            assert await sent(client, "gzip " + long) == (False, True)

        async def of_the_channel(client: Client) -> None:
            assert await sent(client, long) == (True, False)

        client(of_calls)
        client(of_the_channel, compression=grpc.Compression.Gzip)


def test_options_of_the_channel(server: str, client: Callable):
    async def work(client: Client) -> None:
        assert await ended(client.hello("you")) is OK
        assert await ended(client.hello("x" * 2000)) is grpc.StatusCode.RESOURCE_EXHAUSTED

    client(work, options=[("grpc.max_receive_message_length", 1000)])


class Badge(grpc.AuthMetadataPlugin):
    """Credentials of a call."""

    def __call__(self, context: Any, callback: Any) -> None:
        callback((("x-badge", context.method_name),), None)


def test_credentials_of_a_call(world: World, grpc_links: dict[str, Link], client: Callable):
    world.link = grpc_links["tls"]
    world.serve("aio")

    async def work(client: Client) -> None:
        calls = await client.all_kinds(credentials=grpc.metadata_call_credentials(Badge()))
        badges = {dict(await call.trailing_metadata())["x-badge"] for call in calls.values()}
        assert badges == {"SayHello", "RecordRoute", "ListFeatures", "RouteChat"}

    client(work)


# --- interceptors


class Stamp:
    """Adds to metadata, which the handler sends back; notes what it saw."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name = name
        self.log = log

    async def stamped(self, go_on: Any, details: Any, request: Any) -> Any:
        method = details.method.decode() if isinstance(details.method, bytes) else details.method
        self.log.append(f"{self.name} {method.rpartition('/')[2]}")
        metadata = grpc.aio.Metadata(*(details.metadata or ()), ("x-by", self.name))
        details = grpc.aio.ClientCallDetails(
            method=details.method,
            timeout=details.timeout,
            metadata=metadata,
            credentials=details.credentials,
            wait_for_ready=details.wait_for_ready,
        )
        return await go_on(details, request)


# One class for each kind: gRPC registers an object for the first kind that it is of.
class StampUnaryUnary(Stamp, grpc.aio.UnaryUnaryClientInterceptor):
    intercept_unary_unary = Stamp.stamped


class StampUnaryStream(Stamp, grpc.aio.UnaryStreamClientInterceptor):
    intercept_unary_stream = Stamp.stamped


class StampStreamUnary(Stamp, grpc.aio.StreamUnaryClientInterceptor):
    intercept_stream_unary = Stamp.stamped


class StampStreamStream(Stamp, grpc.aio.StreamStreamClientInterceptor):
    intercept_stream_stream = Stamp.stamped


def test_interceptors_of_the_client(server: str, client: Callable):
    log: list[str] = []
    kinds = (StampUnaryUnary, StampUnaryStream, StampStreamUnary, StampStreamStream)

    async def work(client: Client) -> None:
        calls = await client.all_kinds(metadata=METADATA)
        assert sorted(log) == sorted(f"{name} {method}" for method in calls for name in "12")
        for method, call in calls.items():
            assert [line[0] for line in log if line.endswith(method)] == ["1", "2"]
            seen = list(await call.trailing_metadata())
            assert [value for key, value in seen if key == "x-by"] == ["1", "2"]
            assert [pair for pair in users(seen) if pair[0] != "x-by"] == sorted(METADATA)

    client(work, interceptors=[kind(name, log) for name in "12" for kind in kinds])


class Retries(grpc.aio.UnaryUnaryClientInterceptor):
    """A user's own: asks once more when the first answer is an error."""

    async def intercept_unary_unary(self, go_on: Any, details: Any, request: Any) -> Any:
        first = await go_on(details, request)
        if await first.code() is grpc.StatusCode.INVALID_ARGUMENT:
            return await go_on(details, type(request)(name="anybody"))
        return first


def test_an_interceptor_may_call_twice(server: str, client: Callable):
    async def work(client: Client) -> None:
        assert (await client.hello("")).message == "Hello, anybody!"
        assert (await client.hello("you")).message == "Hello, you!"

    client(work, interceptors=[Retries()])


# --- calls, callbacks, cancellation


def test_a_unary_call(server: str, client: Callable):
    async def work(client: Client) -> None:
        over: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        call = client.hello("sleep 0.1", metadata=METADATA)
        assert isinstance(call, grpc.aio.UnaryUnaryCall)
        call.add_done_callback(over.set_result)
        assert not call.done()
        assert not call.cancelled()
        await call.wait_for_connection()
        assert 0.0 < call.time_remaining() <= T
        assert users(await call.initial_metadata()) == sorted(METADATA)
        assert (await call).message == "Hello, sleep 0.1!"
        assert (await call).message == "Hello, sleep 0.1!"
        assert await over is call
        assert call.done()
        assert not call.cancel()
        assert not call.cancelled()
        late = asyncio.get_running_loop().create_future()
        call.add_done_callback(late.set_result)
        assert await late is call

    client(work)


def test_a_unary_call_is_cancelled(server: str, client: Callable):
    async def work(client: Client) -> None:
        # At once, a turn of the loop later, and when the handler must be at it.
        for later_s in (None, 0.0, 0.05):
            over = asyncio.get_running_loop().create_future()
            call = client.hello("sleep 5")
            call.add_done_callback(over.set_result)
            if later_s is not None:
                await asyncio.sleep(later_s)
            assert call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert call.done()
            assert call.cancelled()
            assert await call.code() is CANCELLED
            assert await over is call
            assert not call.cancel()

    client(work)


def test_the_task_that_awaits_a_call_is_cancelled(server: str, client: Callable):
    async def work(client: Client) -> None:
        call = client.hello("sleep 5")
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(call, 0.1)
        assert call.cancelled()
        assert await call.code() is CANCELLED

    client(work)


def test_a_stream_is_cancelled_half_read(server: str, client: Callable):
    async def work(client: Client) -> None:
        over = asyncio.get_running_loop().create_future()

        async def silence() -> AsyncIterator[Any]:
            for note in notes(client.services)[:3]:
                yield note
            await asyncio.wait([over])

        call = client.guide.RouteChat(silence(), timeout=T)
        assert isinstance(call, grpc.aio.StreamStreamCall)
        call.add_done_callback(over.set_result)
        assert (await call.read()).message == "first"
        assert call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call.read()
        assert await call.code() is CANCELLED
        assert await over is call
        call = client.places()
        assert isinstance(call, grpc.aio.UnaryStreamCall)
        async for _ in call:
            break
        call.cancel()
        assert call.cancelled()

    client(work)


def test_writing_is_done_in_order(server: str, client: Callable):
    async def work(client: Client) -> None:
        call = client.guide.RecordRoute(timeout=T)
        assert isinstance(call, grpc.aio.StreamUnaryCall)
        for point in points(client.services) * 50:
            await call.write(point)
        await call.done_writing()
        with pytest.raises(asyncio.InvalidStateError):
            await call.write(points(client.services)[0])
        assert (await call).point_count == 50 * len(points(client.services))

    client(work)


def test_reading_is_either_or(server: str, client: Callable):
    async def work(client: Client) -> None:
        call = client.places()
        assert (await call.read()).name
        with pytest.raises(grpc.aio.UsageError):
            async for _ in call:
                pass
        call.cancel()
        call = client.guide.RouteChat(iter(notes(client.services)), timeout=T)
        with pytest.raises(grpc.aio.UsageError):
            await call.write(notes(client.services)[0])
        call.cancel()

    client(work)


def test_a_request_iterator_that_raises(server: str, client: Callable):
    async def broken(client: Client) -> AsyncIterator[Any]:
        for note in notes(client.services)[:3]:
            yield note
        raise ValueError("no more notes")

    async def work(client: Client) -> None:
        call = client.guide.RouteChat(broken(client), timeout=T)
        with pytest.raises(asyncio.CancelledError):
            async for _ in call:
                pass
        assert await call.code() is CANCELLED

    client(work)


# --- the channel


def slow(client: Client, seconds: float = 5.0) -> Any:
    """A stream that sends its initial metadata at once and ends so much later."""
    note = client.services.route_guide_pb2.RouteNote(message=f"sleep {seconds}")
    return client.guide.RouteChat(iter([note]), timeout=T)


def test_a_channel_that_was_closed(
    world: World, server: str, example_services: ModuleType, client: Callable
):
    kept = []

    async def work(client: Client) -> None:
        assert await ended(client.hello("you")) is OK
        kept.extend([client, slow(client)])
        await kept[1].initial_metadata()

    client(work)
    client, call = kept

    async def afterwards() -> None:
        with pytest.raises(asyncio.CancelledError):
            await call.read()
        assert await call.code() is CANCELLED
        with pytest.raises(grpc.aio.UsageError, match=r"[Cc]losed"):
            await client.hello("you")
        await client.channel.close()

    world.loop.run(afterwards())


def test_closing_with_grace_lets_calls_end(server: str, client: Callable):
    async def work(client: Client) -> None:
        calls = slow(client, 0.2), slow(client, 5.0)
        for call in calls:
            await call.initial_metadata()
        began = time.monotonic()
        await client.channel.close(grace=0.6)
        assert time.monotonic() - began < 3.0
        assert await ended(calls[0]) is OK
        with pytest.raises(asyncio.CancelledError):
            await calls[1].read()

    client(work)


def test_connectivity(server: str, client: Callable):
    async def work(client: Client) -> None:
        channel = client.channel
        state = channel.get_state(try_to_connect=True)
        if state is not READY:  # it may have taken no time
            assert state in (grpc.ChannelConnectivity.IDLE, grpc.ChannelConnectivity.CONNECTING)
            await asyncio.wait_for(channel.wait_for_state_change(state), T)
        await asyncio.wait_for(channel.channel_ready(), T)
        assert channel.get_state() is READY
        assert await ended(client.hello("you")) is OK

    client(work)


def test_channel_ready_waits_for_a_server(unserved: World, client: Callable):
    async def work(client: Client) -> None:
        ready = asyncio.ensure_future(client.channel.channel_ready())
        assert not (await asyncio.wait([ready], timeout=0.1))[0]
        await asyncio.to_thread(unserved.serve, "sync", address=unserved.address)
        await asyncio.wait_for(ready, T)

    client(work, options=SOON)


def test_methods_without_a_stub(server: str, client: Callable):
    """As code does that knows only names and bytes."""

    async def work(client: Client) -> None:
        pb2 = client.services.helloworld_pb2
        method = client.channel.unary_unary("/helloworld.Greeter/SayHello")
        raw = await method(pb2.HelloRequest(name="raw").SerializeToString(), timeout=T)
        assert pb2.HelloReply.FromString(raw).message == "Hello, raw!"

    client(work)


def test_many_calls_at_once(server: str, client: Callable):
    async def work(client: Client) -> None:
        names = [str(number) for number in range(100)]
        calls = [client.hello(name) for name in names]
        more = [client.all_kinds() for _ in range(20)]
        replies = await asyncio.gather(*calls)
        assert [reply.message for reply in replies] == [f"Hello, {name}!" for name in names]
        await asyncio.gather(*more)

    client(work)
