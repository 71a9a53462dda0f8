"""One case of test_grpc_otel.py, in a process of its own: what it instruments is global.

    python tests/grpc_otel_case.py sync aio SEGMENT FOLDER

A client of the first kind asks a server of the second one, first with plain gRPC, then through
shmcoord, all instrumented by OpenTelemetry. Prints JSON: for both, the replies and the spans.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import grpc.aio
import grpc_protos
from grpc_sessions import notes, points
from grpc_worlds import PATIENCE_S, Link, LoopThread, Routed, World
from helpers import wait_until
from opentelemetry import trace
from opentelemetry.instrumentation.grpc import (
    GrpcAioInstrumentorClient,
    GrpcAioInstrumentorServer,
    GrpcInstrumentorClient,
    GrpcInstrumentorServer,
)
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import shmcoord

CALLS = 5


def threads(services: ModuleType, channel: grpc.Channel) -> dict[str, Any]:
    """A call of each kind, and one that fails; the replies."""
    greeter = services.helloworld_pb2_grpc.GreeterStub(channel)
    guide = services.route_guide_pb2_grpc.RouteGuideStub(channel)
    hello, patience = services.helloworld_pb2.HelloRequest, {"timeout": PATIENCE_S}
    said: dict[str, Any] = {
        "SayHello": greeter.SayHello(hello(name="you"), **patience).message,
        "RecordRoute": guide.RecordRoute(iter(points(services)), **patience).point_count,
        "ListFeatures": [f.name for f in guide.ListFeatures(services.everywhere(), **patience)],
        "RouteChat": [n.message for n in guide.RouteChat(iter(notes(services)), **patience)],
    }
    try:
        greeter.SayHello(hello(name=""), **patience)
    except grpc.RpcError as error:
        said["error"] = str(error.code())
    return said


async def loop(services: ModuleType, channel: grpc.aio.Channel) -> dict[str, Any]:
    greeter = services.helloworld_pb2_grpc.GreeterStub(channel)
    guide = services.route_guide_pb2_grpc.RouteGuideStub(channel)
    hello, patience = services.helloworld_pb2.HelloRequest, {"timeout": PATIENCE_S}
    features = guide.ListFeatures(services.everywhere(), **patience)
    chat = guide.RouteChat(iter(notes(services)), **patience)
    said: dict[str, Any] = {
        "SayHello": (await greeter.SayHello(hello(name="you"), **patience)).message,
        "RecordRoute": (await guide.RecordRoute(iter(points(services)), **patience)).point_count,
        "ListFeatures": [feature.name async for feature in features],
        "RouteChat": [note.message async for note in chat],
    }
    try:
        await greeter.SayHello(hello(name=""), **patience)
    except grpc.aio.AioRpcError as error:
        said["error"] = str(error.code())
    return said


def described(span: ReadableSpan) -> dict[str, Any]:
    return {
        "name": span.name,
        "kind": span.kind.name,
        "trace": span.context.trace_id,
        "id": span.context.span_id,
        "parent": span.parent.span_id if span.parent else None,
        "status": span.status.status_code.name,
        "attributes": {key: str(value) for key, value in (span.attributes or {}).items()},
    }


def main(client: str, server: str, segment_name: str, folder: str) -> None:
    grpc_protos.importable()
    import grpc_services

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    for instrumentor in (
        GrpcInstrumentorClient(),
        GrpcInstrumentorServer(),
        GrpcAioInstrumentorClient(),
        GrpcAioInstrumentorServer(),
    ):
        instrumentor.instrument()

    loop_thread = LoopThread()
    found: dict[str, Any] = {}
    with shmcoord.Segment.open(segment_name, slots=8, leases=16) as segment:
        parts = (grpc_services, loop_thread, Link("tcp", Path(folder)))
        for world in (World(*parts), Routed(*parts, segment)):
            world.serve(server)
            if client == "sync":
                said = threads(grpc_services, world.channel())
            else:
                said = world.with_channel(lambda channel: loop(grpc_services, channel))
            # The server's spans end a moment after the client has its reply.
            wait_until(lambda: len(exporter.get_finished_spans()) >= 2 * CALLS)
            held = ""
            if isinstance(world, Routed):
                wait_until(lambda world=world: not world.held())
                held = world.held()
                found["counted"] = segment.status("B").served
            world.close()
            spans = list(map(described, exporter.get_finished_spans()))
            found[world.name] = {"said": said, "spans": spans, "held": held}
            exporter.clear()
    loop_thread.close()
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
