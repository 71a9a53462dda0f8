"""Typed code as a user has it, with generated stubs and both plug-ins; only mypy reads it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import grpc
import grpc.aio
import route_guide_pb2 as places
from helloworld_pb2 import HelloReply, HelloRequest
from helloworld_pb2_grpc import (
    GreeterAsyncStub,
    GreeterServicer,
    GreeterStub,
    add_GreeterServicer_to_server,
)
from route_guide_pb2_grpc import RouteGuideStub

import shmcoord
import shmcoord.grpc
from shmcoord import Router, Segment

REQUEST = HelloRequest(name="you")
HERE = places.Point(latitude=1, longitude=2)


class Greeter(GreeterServicer):
    def SayHello(self, request: HelloRequest, context: grpc.ServicerContext) -> HelloReply:  # noqa: N802
        node: str | None = shmcoord.grpc.served_by.get()
        return HelloReply(message=f"Hello, {request.name}, from {node}!")

    SayHelloAgain = SayHello


class AioGreeter(GreeterServicer):
    async def SayHello(  # noqa: N802
        self,
        request: HelloRequest,
        context: grpc.aio.ServicerContext[HelloRequest, HelloReply],
    ) -> HelloReply:
        await context.send_initial_metadata((("x-seen", "yes"),))
        return HelloReply(message=f"Hello, {request.name}!")

    SayHelloAgain = SayHello


def serve(segment: Segment) -> None:
    server: grpc.Server = shmcoord.grpc.server(
        executor_workers=8, node="B", segment=segment.name, group="GREEN"
    )
    add_GreeterServicer_to_server(Greeter(), server)
    port: int = server.add_insecure_port("127.0.0.1:0")
    assert port
    server.start()
    server.stop(grace=5.0).wait()


async def aio_serve() -> None:
    server: grpc.aio.Server = shmcoord.grpc.aio.server(node="D", segment="shm_host1", group="GREEN")
    add_GreeterServicer_to_server(AioGreeter(), server)
    server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(b"", b"")]))
    await server.start()
    await server.wait_for_termination()


def notes() -> Iterator[places.RouteNote]:
    yield places.RouteNote(location=HERE, message="first")


def ask() -> list[str]:
    with shmcoord.grpc.channel(
        "shm_host1",
        group="GREEN",
        credentials=grpc.ssl_channel_credentials(),
        options=(("grpc.max_receive_message_length", 1 << 20),),
        idempotent=("/helloworld.Greeter/SayHello",),
        max_wait_s=10.0,
    ) as channel:
        greeter = GreeterStub(channel)
        reply: HelloReply = greeter.SayHello(REQUEST, timeout=1.0, wait_for_ready=True)
        said = [reply.message]
        reply, call = greeter.SayHello.with_call(REQUEST, metadata=(("shmcoord-key", "you"),))
        code: grpc.StatusCode = call.code()
        said += [reply.message, code.name]
        future = greeter.SayHello.future(REQUEST)
        future.add_done_callback(lambda of: None)
        said.append(future.result(timeout=1.0).message)
        guide = RouteGuideStub(channel)
        said += [feature.name for feature in guide.ListFeatures(places.Rectangle(lo=HERE, hi=HERE))]
        said += [note.message for note in guide.RouteChat(notes())]
        summary: places.RouteSummary = guide.RecordRoute(iter([HERE]))
        said.append(str(summary.distance))
    with (
        Router("shm_host1", "shm_host2") as router,
        shmcoord.grpc.channel(group="GREEN", router=router) as channel,
    ):
        said.append(GreeterStub(channel).SayHello(REQUEST).message)
        grpc.channel_ready_future(channel).result(timeout=1.0)
    return said


async def aio_notes() -> AsyncIterator[places.RouteNote]:
    yield places.RouteNote(location=HERE, message="first")


async def aio_ask() -> list[str]:
    async with shmcoord.grpc.aio.channel("shm_host1", group="GREEN") as channel:
        greeter: GreeterAsyncStub = GreeterStub(channel)
        reply: HelloReply = await greeter.SayHello(REQUEST, timeout=1.0)
        said = [reply.message]
        call = greeter.SayHello(REQUEST)
        code: grpc.StatusCode = await call.code()
        said.append(code.name)
        guide = RouteGuideStub(channel)
        async for feature in guide.ListFeatures(places.Rectangle(lo=HERE, hi=HERE)):
            said.append(feature.name)
        async for note in guide.RouteChat(aio_notes()):
            said.append(note.message)
        summary = await guide.RecordRoute(iter([HERE]))
        said.append(str(summary.distance))
        state: grpc.ChannelConnectivity = channel.get_state(try_to_connect=True)
        said.append(state.name)
    return said


def main() -> None:
    print([*ask(), *asyncio.run(aio_ask())])  # noqa: T201
