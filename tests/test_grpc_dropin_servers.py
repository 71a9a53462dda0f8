"""What a user's server does, with plain gRPC and through shmcoord alike; and what it publishes."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_sessions import METADATA, notes, points
from grpc_worlds import FULL, KINDS, PATIENCE_S, Routed, World, node_in
from helpers import wait_until

from shmcoord import State

T = PATIENCE_S
OK = grpc.StatusCode.OK


def greet(services: ModuleType, channel: grpc.Channel, name: str = "you", **options: Any) -> Any:
    """A unary call; how it ended."""
    stub = services.helloworld_pb2_grpc.GreeterStub(channel)
    request = services.helloworld_pb2.HelloRequest(name=name)
    return stub.SayHello.with_call(request, timeout=T, **options)[1]


def all_kinds(services: ModuleType, channel: grpc.Channel, **options: Any) -> dict[str, Any]:
    """A call of each kind; how it ended, with an error or without."""
    guide = services.route_guide_pb2_grpc.RouteGuideStub(channel)
    calls = {
        "GetFeature": guide.GetFeature.future(points(services)[0], timeout=T, **options),
        "RecordRoute": guide.RecordRoute.future(iter(points(services)), timeout=T, **options),
        "ListFeatures": guide.ListFeatures(services.everywhere(), timeout=T, **options),
        "RouteChat": guide.RouteChat(iter(notes(services)), timeout=T, **options),
    }
    for name, call in calls.items():
        with contextlib.suppress(grpc.RpcError):
            call.result() if name in ("GetFeature", "RecordRoute") else list(call)
    return calls


# --- interceptors


class Log(grpc.ServerInterceptor):
    """A user's own: notes what comes in, and wraps the handler of some."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name = name
        self.log = log

    def intercept_service(self, go_on: Any, details: Any) -> Any:
        seen = dict(details.invocation_metadata)
        assert seen["x-trace"] == "7"
        self.log.append(f"{self.name} {details.method.rpartition('/')[2]}")
        return go_on(details)


class Deny(grpc.ServerInterceptor):
    """Answers what has no ticket itself, as gRPC's example of authentication does."""

    def __init__(self) -> None:
        def deny(request: Any, context: Any) -> None:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no ticket")

        self._denied = grpc.unary_unary_rpc_method_handler(deny)

    def intercept_service(self, go_on: Any, details: Any) -> Any:
        if "x-ticket" in dict(details.invocation_metadata):
            return go_on(details)
        return self._denied


class AioLog(grpc.aio.ServerInterceptor, Log):
    async def intercept_service(self, go_on: Any, details: Any) -> Any:
        result: Any = Log.intercept_service(self, go_on, details)
        return await result


class AioDeny(grpc.aio.ServerInterceptor):
    def __init__(self) -> None:
        async def deny(request: Any, context: Any) -> None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no ticket")

        self._denied = grpc.unary_unary_rpc_method_handler(deny)

    async def intercept_service(self, go_on: Any, details: Any) -> Any:
        if "x-ticket" in dict(details.invocation_metadata):
            return await go_on(details)
        return self._denied


@pytest.mark.parametrize("kind", KINDS)
def test_interceptors_of_the_server(world: World, example_services: ModuleType, kind: str):
    log: list[str] = []
    make: Any = {"sync": (Log, Deny), "aio": (AioLog, AioDeny)}[kind]
    world.serve(kind, interceptors=[make[0]("first", log), make[1](), make[0]("second", log)])
    channel = world.channel()
    with pytest.raises(grpc.RpcError) as caught:
        greet(example_services, channel, metadata=METADATA)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert caught.value.details() == "no ticket"
    assert log == ["first SayHello"]
    log.clear()
    let_in = (*METADATA, ("x-ticket", "1"))
    ended = all_kinds(example_services, channel, metadata=let_in)
    assert {call.code() for call in ended.values()} == {OK}
    assert sorted(log) == sorted(
        f"{name} {method}" for name in ("first", "second") for method in ended
    )
    for method in ended:
        assert [line.split()[0] for line in log if line.endswith(method)] == ["first", "second"]


# --- the end


def slow(services: ModuleType, channel: grpc.Channel, seconds: float) -> Any:
    """A stream in progress, that ends so much later."""
    guide = services.route_guide_pb2_grpc.RouteGuideStub(channel)
    note = services.route_guide_pb2.RouteNote(message=f"sleep {seconds}")
    call = guide.RouteChat(iter([note]), timeout=T)
    call.initial_metadata()
    return call


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_stops_lets_calls_end(world: World, example_services: ModuleType, kind: str):
    """`stop(grace)`: who is in ends, who comes is refused."""
    world.serve(kind)
    channel = world.channel()
    call = slow(example_services, channel, 0.4)
    stopped = threading.Thread(target=world.stop, args=(5.0,))
    began = time.monotonic()
    stopped.start()
    assert list(call) == []
    assert call.code() is OK
    stopped.join(T)
    assert time.monotonic() - began < 4.0
    with pytest.raises(grpc.RpcError) as caught:
        greet(example_services, channel)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_stops_ends_calls_after_its_grace(
    world: World, example_services: ModuleType, kind: str
):
    world.serve(kind)
    call = slow(example_services, world.channel(), 9.0)
    began = time.monotonic()
    world.stop(0.2)
    with pytest.raises(grpc.RpcError):
        list(call)
    assert time.monotonic() - began < 4.0


# --- what is published


@pytest.fixture
def routed(new_world: Callable[..., Routed]) -> Routed:
    return new_world("shmcoord")


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_publishes_what_it_does(routed: Routed, example_services: ModuleType, kind: str):
    """One call of each kind is in progress; then all have ended, two of them badly."""
    features = [example_services.place("sleep 9", 410000000, -740000000)]
    begun = threading.Event()

    class Greeter(example_services.Greeter):
        def SayHello(self, request: Any, context: Any) -> Any:  # noqa: N802
            begun.set()
            return super().SayHello(request, context)

    class AioGreeter(example_services.AioGreeter):
        async def SayHello(self, request: Any, context: Any) -> Any:  # noqa: N802
            begun.set()
            return await super().SayHello(request, context)

    greeter, guide_of = {
        "sync": (Greeter, example_services.RouteGuide),
        "aio": (AioGreeter, example_services.AioRouteGuide),
    }[kind]
    routed.serve(kind, workers=4, servicers=(greeter(), guide_of(features)))
    status = routed.segment.status("B")
    assert (status.state, status.queue, status.served) == (State.IDLE, 0, 0)
    channel = routed.channel()
    stub = example_services.helloworld_pb2_grpc.GreeterStub(channel)
    guide = example_services.route_guide_pb2_grpc.RouteGuideStub(channel)
    go_on = threading.Event()

    def held(items: list[Any]) -> Any:
        yield from items
        go_on.wait(T)

    calls = [
        stub.SayHello.future(
            example_services.helloworld_pb2.HelloRequest(name="sleep 9"), timeout=T
        ),
        guide.ListFeatures(example_services.everywhere(), timeout=T),
        guide.RecordRoute.future(held(points(example_services)), timeout=T),
        guide.RouteChat(held(notes(example_services)), timeout=T),
    ]
    # The handlers of those that will be cancelled have begun.
    assert begun.wait(T)
    calls[1].initial_metadata()
    status = routed.segment.status("B")
    assert (status.state, status.queue, status.served) == (State.BUSY, 4, 0)
    for call in calls[:2]:
        call.cancel()
    go_on.set()
    assert calls[2].result().point_count == 3
    assert len(list(calls[3])) == 3
    # The counters follow the end of the call at once, but not in one step with it.
    wait_until(lambda: routed.segment.status("B").served == 4)
    status = routed.segment.status("B")
    assert (status.state, status.queue, status.failed) == (State.IDLE, 0, 0)
    with pytest.raises(grpc.RpcError):
        greet(example_services, channel, "bug")
    wait_until(lambda: routed.segment.status("B").served == 5)
    assert routed.segment.status("B").failed == 1


@pytest.mark.parametrize(
    "kinds", [(one, other) for one in KINDS for other in KINDS] if FULL else [KINDS]
)
@pytest.mark.parametrize("channel", KINDS)
def test_calls_go_to_the_node_that_is_free(
    routed: Routed, example_services: ModuleType, channel: str, kinds: tuple[str, str]
):
    """One node of two has something to do: the other one is asked, whichever it is."""
    for name, kind in zip("BD", kinds, strict=True):
        routed.serve(kind, name)
    note = example_services.route_guide_pb2.RouteNote(message="sleep 9")
    asked: list[tuple[str, Counter]] = []

    def busy() -> str:
        """The node that has something to do; waits until it is only that one.

        A node ends a call a moment after the client has its status.
        """
        wait_until(lambda: sum(one.queue for one in routed.segment.snapshot()) == 1)
        return next(one.node for one in routed.segment.snapshot() if one.queue)

    def one_of_each(open_channel: Any) -> Iterator[Any]:
        """A call of each kind, one after the other."""
        guide = example_services.route_guide_pb2_grpc.RouteGuideStub(open_channel)
        if isinstance(open_channel, grpc.Channel):
            yield guide.GetFeature.with_call(points(example_services)[0], timeout=T)[1]
            yield guide.RecordRoute.with_call(iter(points(example_services)), timeout=T)[1]
        else:
            yield guide.GetFeature(points(example_services)[0], timeout=T)
            yield guide.RecordRoute(iter(points(example_services)), timeout=T)
        for begin in (
            lambda: guide.ListFeatures(example_services.everywhere(), timeout=T),
            lambda: guide.RouteChat(iter(notes(example_services)), timeout=T),
        ):
            call = begin()
            if isinstance(open_channel, grpc.Channel):
                list(call)
            yield call

    def threads(open_channel: grpc.Channel) -> None:
        guide = example_services.route_guide_pb2_grpc.RouteGuideStub(open_channel)
        idle = Counter(served_by(greet(example_services, open_channel)) for _ in range(40))
        assert set(idle) == {"B", "D"}
        call = guide.RouteChat(iter([note]), timeout=T)
        wait_until(lambda: routed.held())
        nodes: Counter = Counter()
        for _ in range(5):
            for one in one_of_each(open_channel):
                busy()
                nodes[served_by(one)] += 1
        asked.append((busy(), nodes))
        call.cancel()

    async def loop(open_channel: grpc.aio.Channel) -> None:
        guide = example_services.route_guide_pb2_grpc.RouteGuideStub(open_channel)
        call = guide.RouteChat(iter([note]), timeout=T)
        await call.initial_metadata()
        nodes: Counter = Counter()
        for _ in range(5):
            for one in one_of_each(open_channel):
                if not hasattr(one, "__await__"):
                    async for _ in one:
                        pass
                assert await one.code() is OK
                while len([one for one in routed.segment.snapshot() if one.queue]) > 1:
                    await asyncio.sleep(0.001)
                nodes[node_in(await one.trailing_metadata())] += 1
        asked.append((busy(), nodes))
        call.cancel()

    if channel == "sync":
        threads(routed.channel())
    else:
        routed.with_channel(loop)
    [(occupied, nodes)] = asked
    assert nodes == {"D" if occupied == "B" else "B": 20}


def served_by(call: Any) -> str | None:
    assert call.code() is OK
    node = node_in(call.trailing_metadata())
    assert node is None or isinstance(node, str)
    return node


def test_a_node_that_drains_gets_nothing(routed: Routed, example_services: ModuleType):
    for name, kind in zip("BD", KINDS, strict=True):
        routed.serve(kind, name)
    routed.servers["B"].node.drain()
    channel = routed.channel()
    assert {served_by(greet(example_services, channel)) for _ in range(20)} == {"D"}
    routed.servers["B"].node.resume()
    routed.servers["D"].node.drain()
    assert {served_by(greet(example_services, channel)) for _ in range(20)} == {"B"}


def test_more_calls_than_capacity_wait(routed: Routed, example_services: ModuleType):
    """Nothing is refused while somebody may still have the time."""
    routed.serve("sync", workers=2)
    channel = routed.channel()
    stub = example_services.helloworld_pb2_grpc.GreeterStub(channel)
    request = example_services.helloworld_pb2.HelloRequest(name="sleep 0.02")
    futures = [stub.SayHello.future(request, timeout=T) for _ in range(20)]
    assert {future.result().message for future in futures} == {"Hello, sleep 0.02!"}
    wait_until(lambda: routed.segment.status("B").served == 20)
