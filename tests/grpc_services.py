"""The services of gRPC's examples, as users write them: nothing here knows of shmcoord.

Needs generated code: use the fixture `example_services`. `Greeter` and `RouteGuide` are for servers
with threads, `AioGreeter` and `AioRouteGuide` for event loops; they answer alike.

Each handler sends metadata whose keys begin with "x-" back, as initial and as trailing metadata.
Names that `Greeter` takes as orders:

    "":         INVALID_ARGUMENT, with details.
    "bug":      the handler raises an exception that is none of gRPC's.
    "sleep 2":  the answer takes so many seconds, or until the caller has gone away.
    "left":     the answer is the time that is left to the call, in seconds, or "None".
    "gzip ...": the answer is compressed.

`ListFeatures` obeys the names of features, and `RouteChat` notes, in all but the last.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence

import grpc
import grpc.aio
import helloworld_pb2
import helloworld_pb2_grpc
import route_guide_pb2
import route_guide_pb2_grpc
from helloworld_pb2 import HelloReply, HelloRequest
from route_guide_pb2 import Feature, Point, Rectangle, RouteNote, RouteSummary

__all__ = [
    "FEATURES",
    "AioGreeter",
    "AioRouteGuide",
    "Greeter",
    "RouteGuide",
    "everywhere",
    "helloworld_pb2",
    "helloworld_pb2_grpc",
    "place",
    "route_guide_pb2",
    "route_guide_pb2_grpc",
]

Metadata = tuple[tuple[str, str | bytes], ...]


def place(name: str, latitude: int, longitude: int) -> Feature:
    return Feature(name=name, location=Point(latitude=latitude, longitude=longitude))


FEATURES = (
    place("Harbour", 407838351, -746143763),
    place("Old mill", 408122808, -743999179),
    place("Bridge", 413628156, -749015468),
    place("Station", 419999544, -740371136),
    place("Library", 414008389, -743951297),
    place("Lighthouse", 419611318, -746524769),
    place("Market", 406109563, -742186778),
)


def everywhere() -> Rectangle:
    """All places are inside."""
    return Rectangle(
        lo=Point(latitude=400000000, longitude=-750000000),
        hi=Point(latitude=420000000, longitude=-730000000),
    )


def _inside(rectangle: Rectangle, point: Point) -> bool:
    lo, hi = rectangle.lo, rectangle.hi
    return min(lo.latitude, hi.latitude) <= point.latitude <= max(lo.latitude, hi.latitude) and min(
        lo.longitude, hi.longitude
    ) <= point.longitude <= max(lo.longitude, hi.longitude)


def _metres(start: Point, end: Point) -> float:
    """The great circle between two points, by the haversine formula."""
    latitudes = [math.radians(point.latitude / 1e7) for point in (start, end)]
    longitudes = [math.radians(point.longitude / 1e7) for point in (start, end)]
    half = math.sin((latitudes[1] - latitudes[0]) / 2) ** 2
    half += (
        math.cos(latitudes[0])
        * math.cos(latitudes[1])
        * math.sin((longitudes[1] - longitudes[0]) / 2) ** 2
    )
    return 2 * 6_371_000 * math.asin(math.sqrt(half))


class _Route:
    """Adds up points."""

    def __init__(self, features: Sequence[Feature]) -> None:
        self._names = {_key(feature.location): feature.name for feature in features}
        self._began = time.monotonic()
        self._last: Point | None = None
        self._metres = 0.0
        self._summary = RouteSummary()

    def add(self, point: Point) -> None:
        self._summary.point_count += 1
        self._summary.feature_count += _key(point) in self._names
        if self._last is not None:
            self._metres += _metres(self._last, point)
        self._last = point

    def summary(self) -> RouteSummary:
        self._summary.distance = int(self._metres)
        self._summary.elapsed_time = int(time.monotonic() - self._began)
        return self._summary


def _key(point: Point) -> tuple[int, int]:
    return point.latitude, point.longitude


def _mine(metadata: Iterable[tuple[str, str | bytes]] | None) -> Metadata:
    return tuple((key, value) for key, value in metadata or () if key.startswith("x-"))


# --- for servers with threads


def _greet(context: grpc.ServicerContext) -> None:
    echo = _mine(context.invocation_metadata())
    context.send_initial_metadata(echo)
    context.set_trailing_metadata(echo)


def _obey(name: str, context: grpc.ServicerContext) -> str:
    """Do what a name orders; what is to be answered."""
    order, _, rest = name.partition(" ")
    if not name:
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a name is needed")
    if order == "bug":
        raise RuntimeError("a bug of the handler")
    if order == "sleep":
        ended = threading.Event()
        if context.add_callback(ended.set):
            ended.wait(float(rest))
    if order == "left":
        return str(context.time_remaining())
    return name


class Greeter(helloworld_pb2_grpc.GreeterServicer):
    def SayHello(self, request: HelloRequest, context: grpc.ServicerContext) -> HelloReply:  # noqa: N802
        if request.name.startswith("gzip "):
            context.set_compression(grpc.Compression.Gzip)
        _greet(context)
        return HelloReply(message=f"Hello, {_obey(request.name, context)}!")


class RouteGuide(route_guide_pb2_grpc.RouteGuideServicer):
    def __init__(self, features: Sequence[Feature] = FEATURES) -> None:
        self._features = features

    def GetFeature(self, request: Point, context: grpc.ServicerContext) -> Feature:  # noqa: N802
        _greet(context)
        for feature in self._features:
            if feature.location == request:
                return feature
        return Feature(name="", location=request)

    def ListFeatures(  # noqa: N802
        self, request: Rectangle, context: grpc.ServicerContext
    ) -> Iterator[Feature]:
        _greet(context)
        for feature in self._features:
            if _inside(request, feature.location):
                _obey(feature.name, context)
                yield feature

    def RecordRoute(  # noqa: N802
        self, request_iterator: Iterator[Point], context: grpc.ServicerContext
    ) -> RouteSummary:
        _greet(context)
        route = _Route(self._features)
        for point in request_iterator:
            route.add(point)
        return route.summary()

    def RouteChat(  # noqa: N802
        self, request_iterator: Iterator[RouteNote], context: grpc.ServicerContext
    ) -> Iterator[RouteNote]:
        _greet(context)
        notes: list[RouteNote] = []
        for note in request_iterator:
            _obey(note.message, context)
            yield from (earlier for earlier in notes if earlier.location == note.location)
            notes.append(note)


# --- for event loops


async def _aio_greet(context: grpc.aio.ServicerContext) -> None:
    echo = _mine(context.invocation_metadata())
    await context.send_initial_metadata(echo)
    context.set_trailing_metadata(echo)


async def _aio_obey(name: str, context: grpc.aio.ServicerContext) -> str:
    order, _, rest = name.partition(" ")
    if not name:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a name is needed")
    if order == "bug":
        raise RuntimeError("a bug of the handler")
    if order == "sleep":
        await asyncio.sleep(float(rest))
    if order == "left":
        return str(context.time_remaining())
    return name


class AioGreeter(helloworld_pb2_grpc.GreeterServicer):
    async def SayHello(  # noqa: N802
        self, request: HelloRequest, context: grpc.aio.ServicerContext
    ) -> HelloReply:
        if request.name.startswith("gzip "):
            context.set_compression(grpc.Compression.Gzip)
        await _aio_greet(context)
        return HelloReply(message=f"Hello, {await _aio_obey(request.name, context)}!")


class AioRouteGuide(route_guide_pb2_grpc.RouteGuideServicer):
    def __init__(self, features: Sequence[Feature] = FEATURES) -> None:
        self._features = features

    async def GetFeature(  # noqa: N802
        self, request: Point, context: grpc.aio.ServicerContext
    ) -> Feature:
        await _aio_greet(context)
        for feature in self._features:
            if feature.location == request:
                return feature
        return Feature(name="", location=request)

    async def ListFeatures(  # noqa: N802
        self, request: Rectangle, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[Feature]:
        await _aio_greet(context)
        for feature in self._features:
            if _inside(request, feature.location):
                await _aio_obey(feature.name, context)
                yield feature

    async def RecordRoute(  # noqa: N802
        self, request_iterator: AsyncIterator[Point], context: grpc.aio.ServicerContext
    ) -> RouteSummary:
        await _aio_greet(context)
        route = _Route(self._features)
        async for point in request_iterator:
            route.add(point)
        return route.summary()

    async def RouteChat(  # noqa: N802
        self, request_iterator: AsyncIterator[RouteNote], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[RouteNote]:
        await _aio_greet(context)
        notes: list[RouteNote] = []
        async for note in request_iterator:
            await _aio_obey(note.message, context)
            for earlier in notes:
                if earlier.location == note.location:
                    yield earlier
            notes.append(note)
