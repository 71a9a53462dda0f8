"""One client that does everything once, with threads and on an event loop; what it saw.

What is seen is compared between plain gRPC and shmcoord: replies, codes, details, metadata.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from types import ModuleType
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_worlds import PATIENCE_S, node_in, users

Seen = dict[str, Any]
METADATA = (("x-trace", "7"), ("x-raw-bin", b"\x00\xff\n"))
TOLD: dict[str, Any] = {"metadata": METADATA, "timeout": PATIENCE_S}


def points(services: ModuleType) -> list[Any]:
    """Of a route: two places, and one where nothing is."""
    known = [feature.location for feature in services.FEATURES[:2]]
    return [*known, services.place("", 1, 2).location]


def notes(services: ModuleType) -> list[Any]:
    """Of a chat: the third is told the first, the fourth the first and the third."""
    here, there = points(services)[:2]
    note = services.route_guide_pb2.RouteNote
    places = [(here, "first"), (there, "second"), (here, "third"), (here, "fourth")]
    return [note(location=place, message=message) for place, message in places]


def told(summary: Any) -> tuple[int, int, int]:
    """Points, places and metres of a route: all but how long it took."""
    return summary.point_count, summary.feature_count, summary.distance


def of_call(call: Any) -> Seen:
    """How a call ended; iterates nothing."""
    return {
        "code": call.code(),
        "details": call.details(),
        "initial": users(call.initial_metadata()),
        "trailing": users(call.trailing_metadata()),
        "node": node_in(call.trailing_metadata()),
    }


def sync_session(services: ModuleType, channel: grpc.Channel) -> dict[str, Seen]:
    hello = services.helloworld_pb2.HelloRequest
    greeter = services.helloworld_pb2_grpc.GreeterStub(channel)
    guide = services.route_guide_pb2_grpc.RouteGuideStub(channel)
    seen = {}
    reply, call = greeter.SayHello.with_call(hello(name="you"), **TOLD)
    seen["unary"] = {"reply": reply.message, **of_call(call)}
    reply = greeter.SayHello(hello(name="me"), timeout=PATIENCE_S)
    seen["blocking"] = {"reply": reply.message}
    future = greeter.SayHello.future(hello(name="future"), **TOLD)
    seen["future"] = {"reply": future.result().message, **of_call(future)}
    feature, call = guide.GetFeature.with_call(points(services)[1], **TOLD)
    seen["feature"] = {"reply": feature.name, **of_call(call)}
    call = guide.ListFeatures(services.everywhere(), **TOLD)
    seen["stream"] = {"reply": [feature.name for feature in call], **of_call(call)}
    summary, call = guide.RecordRoute.with_call(iter(points(services)), **TOLD)
    seen["client stream"] = {"reply": told(summary), **of_call(call)}
    summary = guide.RecordRoute(iter(points(services)), timeout=PATIENCE_S)
    seen["client stream, blocking"] = {"reply": told(summary)}
    future = guide.RecordRoute.future(iter(points(services)), **TOLD)
    seen["client stream, future"] = {"reply": told(future.result()), **of_call(future)}
    call = guide.RouteChat(iter(notes(services)), **TOLD)
    seen["both streams"] = {"reply": [note.message for note in call], **of_call(call)}
    for name, call_it in _failing(services, greeter, guide).items():
        with pytest.raises(grpc.RpcError) as caught:
            call_it()
        seen[name] = of_call(caught.value)
    for name in ("", "bug"):
        future = greeter.SayHello.future(hello(name=name), **TOLD)
        error = future.exception()
        seen[f"future of {name!r}"] = {**of_call(future), "is a": isinstance(error, grpc.RpcError)}
    return seen


def _failing(services: ModuleType, greeter: Any, guide: Any) -> dict[str, Callable[[], object]]:
    hello = services.helloworld_pb2.HelloRequest
    note = services.route_guide_pb2.RouteNote
    chat = [note(message="bug")]
    return {
        "abort": lambda: greeter.SayHello(hello(name=""), **TOLD),
        "abort, with_call": lambda: greeter.SayHello.with_call(hello(name=""), **TOLD),
        "exception": lambda: greeter.SayHello(hello(name="bug"), **TOLD),
        "not implemented": lambda: greeter.SayHelloAgain(hello(name="you"), **TOLD),
        "exception in a stream": lambda: list(guide.RouteChat(iter(chat), **TOLD)),
        "abort in a stream": lambda: list(guide.RouteChat(iter([note()]), **TOLD)),
    }


async def of_aio_call(call: Any) -> Seen:
    return {
        "code": await call.code(),
        "details": await call.details(),
        "initial": users(await call.initial_metadata()),
        "trailing": users(await call.trailing_metadata()),
        "node": node_in(await call.trailing_metadata()),
    }


async def _slowly(items: list[Any]) -> AsyncIterator[Any]:
    for item in items:
        await asyncio.sleep(0)
        yield item


async def aio_session(services: ModuleType, channel: grpc.aio.Channel) -> dict[str, Seen]:
    hello = services.helloworld_pb2.HelloRequest
    greeter = services.helloworld_pb2_grpc.GreeterStub(channel)
    guide = services.route_guide_pb2_grpc.RouteGuideStub(channel)
    seen = {}
    call = greeter.SayHello(hello(name="you"), **TOLD)
    seen["unary"] = {"reply": (await call).message, **await of_aio_call(call)}
    call = guide.GetFeature(points(services)[1], **TOLD)
    seen["feature"] = {"reply": (await call).name, **await of_aio_call(call)}
    call = guide.ListFeatures(services.everywhere(), **TOLD)
    names = [feature.name async for feature in call]
    seen["stream"] = {"reply": names, **await of_aio_call(call)}
    call = guide.ListFeatures(services.everywhere(), **TOLD)
    names = []
    while (feature := await call.read()) is not grpc.aio.EOF:
        names.append(feature.name)
    seen["stream, read"] = {"reply": names, **await of_aio_call(call)}
    for name, requests in (("", iter), (", of asyncio", _slowly)):
        call = guide.RecordRoute(requests(points(services)), **TOLD)
        seen[f"client stream{name}"] = {"reply": told(await call), **await of_aio_call(call)}
        call = guide.RouteChat(requests(notes(services)), **TOLD)
        messages = [note.message async for note in call]
        seen[f"both streams{name}"] = {"reply": messages, **await of_aio_call(call)}
    call = guide.RecordRoute(**TOLD)
    for point in points(services):
        await call.write(point)
    await call.done_writing()
    seen["client stream, write"] = {"reply": told(await call), **await of_aio_call(call)}
    call = guide.RouteChat(**TOLD)
    messages = []
    for number, note in enumerate(notes(services)):
        await call.write(note)
        messages += [(await call.read()).message for _ in range((0, 0, 1, 2)[number])]
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    seen["both streams, write"] = {"reply": messages, **await of_aio_call(call)}
    for name, call_it in _aio_failing(services, greeter, guide).items():
        call = call_it()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await (call if hasattr(call, "__await__") else _read(call))
        seen[name] = {**await of_aio_call(call), "raised": of_call(caught.value)}
    return seen


async def _read(call: Any) -> None:
    async for _ in call:
        pass


def _aio_failing(services: ModuleType, greeter: Any, guide: Any) -> dict[str, Callable[[], Any]]:
    hello = services.helloworld_pb2.HelloRequest
    note = services.route_guide_pb2.RouteNote
    chat = [note(message="bug")]
    return {
        "abort": lambda: greeter.SayHello(hello(name=""), **TOLD),
        "exception": lambda: greeter.SayHello(hello(name="bug"), **TOLD),
        "not implemented": lambda: greeter.SayHelloAgain(hello(name="you"), **TOLD),
        "exception in a stream": lambda: guide.RouteChat(iter(chat), **TOLD),
        "abort in a stream": lambda: guide.RouteChat(iter([note()]), **TOLD),
    }
