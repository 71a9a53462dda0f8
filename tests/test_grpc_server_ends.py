"""The beginning and the end of gRPC servers that are nodes, where something is in their way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_helpers import Method, path, service
from grpc_worlds import LoopThread

import shmcoord.grpc
from shmcoord import NodeExists, Segment, State

T = 10.0


def echo(request: bytes, context: Any) -> bytes:
    return request


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    """An event loop in a thread."""
    loop = LoopThread()
    yield loop
    loop.close()


@pytest.mark.parametrize("kind", ["sync", "aio"])
def test_a_plug_whose_join_failed_may_start_again(
    segment: Segment, loop: LoopThread, kind: str
) -> None:
    first = segment.join("B", group="GREEN", endpoint="127.0.0.1:1")
    make = shmcoord.grpc.instrument if kind == "sync" else shmcoord.grpc.aio.instrument
    plug = make(node="B", segment=segment.name, group="GREEN")
    options: dict[str, Any] = {
        "handlers": [*plug.handlers, service(Echo=Method(echo))],
        "interceptors": [plug.interceptor],
    }

    async def begin_aio() -> tuple[Any, int]:
        server = grpc.aio.server(**options)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, port

    if kind == "sync":
        server = grpc.server(plug.executor(), **options)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
    else:
        server, port = loop.run(begin_aio())
    try:
        with pytest.raises(NodeExists):
            plug.start(f"127.0.0.1:{port}")
        assert not plug.joined
        first.leave()
        plug.start(f"127.0.0.1:{port}")
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            assert channel.unary_unary(path("Echo"))(b"x", timeout=T) == b"x"
        assert segment.status("B").state is State.IDLE
        plug.stop()
        with pytest.raises(ValueError, match="stopped before"):
            plug.start(f"127.0.0.1:{port}")
    finally:
        plug.stop()
        if kind == "sync":
            server.stop(None).wait(T)
        else:
            loop.run(server.stop(None))
