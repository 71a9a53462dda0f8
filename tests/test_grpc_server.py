"""The threaded gRPC server that is a node: real servers on loopback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from grpc_helpers import Method, path, service, trailing
from helpers import wait_until

import shmcoord.grpc
from shmcoord import Segment
from shmcoord.grpc._common import NODE_KEY, served_by

Start = Callable[..., tuple[Any, grpc.Channel]]


@pytest.fixture
def start(segment: Segment) -> Iterator[Start]:
    """Starts servers with one service, each with a channel to it."""
    open_things: list[Any] = []

    def begin(workers: int = 2, /, **options: Any) -> tuple[Any, grpc.Channel]:
        methods = options.pop("methods")
        options = {"node": "B", "segment": segment.name, "group": "GREEN", **options}
        server = shmcoord.grpc.server(workers, **options)
        server.add_generic_rpc_handlers((service(**methods),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        open_things.append((server, channel))
        return server, channel

    yield begin
    for server, channel in open_things:
        channel.close()
        server.stop(None)


def echo(request: bytes, context: Any) -> bytes:
    return request


def test_a_served_call_is_counted_and_names_its_node(start: Start, segment: Segment) -> None:
    seen = []

    def answer(request: bytes, context: Any) -> bytes:
        status = segment.status("B")
        seen.append((status.inflight, status.waiting, served_by.get()))
        return request

    server, channel = start(methods={"Echo": Method(answer)})
    response, call = channel.unary_unary(path("Echo")).with_call(b"hello")
    assert response == b"hello"
    assert trailing(call)[NODE_KEY] == "B"
    assert seen == [(1, 0, "B")]
    wait_until(lambda: server.node.served == 1)
    status = segment.status("B")
    assert (status.served, status.failed, status.inflight, status.waiting) == (1, 0, 0, 0)
    assert status.endpoint == server.endpoint
    assert served_by.get() is None


def test_all_four_kinds(start: Start, segment: Segment) -> None:
    def total(requests: Iterator[bytes], context: Any) -> bytes:
        return b"".join(requests)

    def each(request: bytes, context: Any) -> Iterator[bytes]:
        for byte in request:
            yield bytes([byte])

    def back(requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        context.set_trailing_metadata((("mine", "kept"),))
        yield from requests

    server, channel = start(
        methods={
            "Echo": Method(echo),
            "Total": Method(total, True, False),
            "Each": Method(each, False, True),
            "Back": Method(back, True, True),
        }
    )
    assert channel.unary_unary(path("Echo"))(b"abc") == b"abc"
    assert channel.stream_unary(path("Total"))(iter([b"a", b"b"])) == b"ab"
    stream = channel.unary_stream(path("Each"))(b"abc")
    assert list(stream) == [b"a", b"b", b"c"]
    assert trailing(stream)[NODE_KEY] == "B"
    both = channel.stream_stream(path("Back"))(iter([b"x", b"y"]))
    assert list(both) == [b"x", b"y"]
    assert trailing(both)[NODE_KEY] == "B"
    assert trailing(both)["mine"] == "kept"
    wait_until(lambda: server.node.served == 4)
    assert server.node.inflight == 0
    assert segment.status("B").failed == 0
