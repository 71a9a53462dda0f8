"""The beginning and the end of gRPC servers that are nodes, where something is in their way."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_helpers import Method, path, service, trailing
from grpc_worlds import LoopThread
from helpers import wait_until

import shmcoord.grpc
from shmcoord import NodeExists, Segment, State
from shmcoord.grpc._common import NODE_KEY

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
        # The answer may be here before the handler's thread has ended the request.
        wait_until(lambda: segment.status("B").state is State.IDLE)
        plug.stop()
        assert segment.snapshot() == ()
        with pytest.raises(ValueError, match="stopped before"):
            plug.start(f"127.0.0.1:{port}")
    finally:
        plug.stop()
        if kind == "sync":
            server.stop(None).wait(T)
        else:
            loop.run(server.stop(None))


class Ends:
    """Servers of one kind, begun and ended from a test without a loop."""

    def __init__(self, loop: LoopThread, segment: Segment, kind: str) -> None:
        self._loop = loop
        self._segment = segment
        self._kind = kind

    def begin(self, node: str, address: str = "127.0.0.1:0", **options: Any) -> tuple[Any, int]:
        """A server with the method Echo, and its port."""
        place = {"node": node, "segment": self._segment.name, "group": "GREEN", **options}
        handlers = [service(Echo=Method(echo))]
        if self._kind == "sync":
            server = shmcoord.grpc.server(2, handlers=handlers, **place)
            port = server.add_insecure_port(address)
            server.start()
            return server, port
        return self._loop.run(self._begin(handlers, place, address))

    def end(self, server: Any, grace: float | None = None) -> None:
        """Stop it."""
        if self._kind == "sync":
            assert server.stop(grace).wait(T)
        else:
            self._loop.run(server.stop(grace))

    async def _begin(self, handlers: Any, place: Any, address: str) -> tuple[Any, int]:
        server = shmcoord.grpc.aio.server(handlers=handlers, **place)
        port = server.add_insecure_port(address)
        await server.start()
        return server, port


@pytest.fixture(params=["sync", "aio"])
def ends(request: pytest.FixtureRequest, loop: LoopThread, segment: Segment) -> Ends:
    """Servers of either kind."""
    return Ends(loop, segment, request.param)


def is_served(endpoint: str) -> bool:
    """Whether a call there is answered, on a connection of its own."""
    # Without this, gRPC lends a connection that is there.
    with grpc.insecure_channel(endpoint, options=[("grpc.use_local_subchannel_pool", 1)]) as own:
        return own.unary_unary(path("Echo"))(b"x", timeout=T) == b"x"


def watching(
    channel: grpc.Channel,
    until: contextlib.ExitStack,
    states: list[grpc.ChannelConnectivity] | None = None,
) -> list[grpc.ChannelConnectivity]:
    """What a channel says of its state, until the stack is left: before the channel is closed.

    gRPC looks at the state in a thread, five times a second, which a close alone would end with an
    exception that nobody catches.
    """
    told = [] if states is None else states

    def unwatch() -> None:
        channel.unsubscribe(told.append)
        time.sleep(0.25)

    channel.subscribe(told.append)
    until.callback(unwatch)
    return told


def test_stopping_leaves_other_sockets_of_the_same_port_alone(ends: Ends) -> None:
    """Of other servers on other addresses, connected and not; and of another protocol."""
    server, port = ends.begin("A")
    other, _ = ends.begin("B", f"127.0.0.2:{port}")
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
        socket.create_server(("127.0.0.3", port)) as listener,
        socket.create_connection(("127.0.0.3", port)) as client,
        grpc.insecure_channel(f"127.0.0.2:{port}") as channel,
    ):
        datagrams.bind(("127.0.0.1", port))
        datagrams.settimeout(T)
        accepted, _ = listener.accept()
        with accepted, contextlib.ExitStack() as accepted_by:
            accepted.settimeout(T)
            call = channel.unary_unary(path("Echo"))
            assert call(b"x", timeout=T) == b"x"
            states = watching(channel, accepted_by)
            ends.end(server)
            client.sendall(b"still")
            assert accepted.recv(5) == b"still"
            datagrams.sendto(b"there", ("127.0.0.1", port))
            assert datagrams.recv(5) == b"there"
            with socket.create_connection(("127.0.0.3", port), T):
                pass
            assert call(b"x", timeout=T) == b"x"
            assert is_served(f"127.0.0.2:{port}")
            assert set(states) <= {grpc.ChannelConnectivity.READY}
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), T):
        pass
    ends.end(other)


def test_stopping_leaves_a_server_alone_that_shares_the_port(ends: Ends) -> None:
    shared = {"options": [("grpc.so_reuseport", 1)]}
    server, port = ends.begin("A", **shared)
    other, _ = ends.begin("B", f"127.0.0.1:{port}", **shared)
    with contextlib.ExitStack() as channels:
        calls = []
        for _ in range(12):  # the kernel deals them out
            channel = channels.enter_context(
                grpc.insecure_channel(
                    f"127.0.0.1:{port}", options=[("grpc.use_local_subchannel_pool", 1)]
                )
            )
            call = channel.unary_unary(path("Echo"))
            _, done = call.with_call(b"x", timeout=T)
            calls.append((trailing(done)[NODE_KEY], channel))
        others = [channel for node, channel in calls if node == "B"]
        assert 0 < len(others) < len(calls)
        states = watching(others[0], channels)
        for channel in others[1:]:
            watching(channel, channels, states)
        ends.end(server)
        for _, channel in calls:  # those of A connect anew
            call = channel.unary_unary(path("Echo"))
            _, done = call.with_call(b"x", timeout=T, wait_for_ready=True)
            assert trailing(done)[NODE_KEY] == "B"
        assert set(states) <= {grpc.ChannelConnectivity.READY}
    ends.end(other)


def test_stopping_closes_a_wildcard_and_a_unix_socket(ends: Ends, tmp_path: Path) -> None:
    server, port = ends.begin("A", "0.0.0.0:0")
    unix, _ = ends.begin("B", f"unix:{tmp_path / 's'}")
    for server_, endpoint in ((server, f"127.0.0.1:{port}"), (unix, f"unix:{tmp_path / 's'}")):
        assert is_served(endpoint)
        with grpc.insecure_channel(endpoint) as channel, contextlib.ExitStack() as stack:
            channel.unary_unary(path("Echo"))(b"x", timeout=T)
            ended = watching(channel, stack)
            ends.end(server_)
            wait_until(lambda seen=ended: grpc.ChannelConnectivity.IDLE in seen)
    assert not (tmp_path / "s").exists()
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), T):
        pass


def test_a_server_stops_though_its_connections_cannot_be_ended(
    ends: Ends,
    segment: Segment,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server, port = ends.begin("A")
    assert is_served(f"127.0.0.1:{port}")

    def fail() -> None:
        raise OSError("too many open files")

    monkeypatch.setattr(server._listeners, "deafen", fail)
    ends.end(server)
    assert "could not end its connections" in caplog.text
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), T):
        pass
    assert not segment.snapshot()
