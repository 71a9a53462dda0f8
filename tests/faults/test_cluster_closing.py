"""Servers that end while clients ask: UNAVAILABLE for whoever is not answered any more."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import grpc
import grpc.aio
import pytest
from cluster_helpers import Teams, server_of, until
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from servers import config
from servers.gateway import GatewayService
from servers.pb import shmcoord_cluster_pb2 as pb
from servers.pb import shmcoord_cluster_pb2_grpc as pb_grpc
from shmcoord.grpc import _closing

OK, UNAVAILABLE = grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE
CANCELLED = grpc.StatusCode.CANCELLED
ALONE = [("grpc.use_local_subchannel_pool", 1)]
WATCHERS, ASKING, CONNECTING = 4, 8, 8


class NoParts:
    """Nodes that have not a row."""

    async def answer(
        self, team: str, request: pb.PartRequest, timeout_s: float | None
    ) -> AsyncIterator[pb.PartChunk]:
        await asyncio.sleep(0.001)
        yield pb.PartChunk(node="B", summary=pb.PartSummary(team=team, node="B"))


async def codes_of_one_end(
    endpoint: str,
    server: grpc.aio.Server,
    end: Callable[[grpc.aio.Server, str], Awaitable[None]],
    *,
    connecting: int = 0,
) -> Counter[grpc.StatusCode]:
    """A gateway that ends under watchers of its health and clients that ask and ask.

    Args:
        endpoint: of the gateway.
        server: serves it, and has not started.
        end: ends the server.
        connecting: so many further clients have a new connection for each request.
    """
    gateway = GatewayService(config.load(), Teams(NoParts().answer))
    pb_grpc.add_GatewayServicer_to_server(gateway, server)
    probes = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(probes, server)
    port = server.add_insecure_port(endpoint)
    if not endpoint.startswith("unix:"):
        endpoint = f"127.0.0.1:{port}"
    await server.start()
    codes: Counter[grpc.StatusCode] = Counter()
    ended = asyncio.Event()

    async def code_of(call: grpc.aio.UnaryStreamCall) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError):
            async for _ in call:
                pass
        codes[await call.code()] += 1

    async def ask(stub: pb_grpc.GatewayStub) -> None:
        while not ended.is_set():
            await code_of(stub.Query(pb.QueryRequest(), timeout=10))

    async def connect_and_ask() -> None:
        while not ended.is_set():
            async with grpc.aio.insecure_channel(endpoint, ALONE) as channel:
                await code_of(pb_grpc.GatewayStub(channel).Query(pb.QueryRequest(), timeout=10))

    async with contextlib.AsyncExitStack() as stack:
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(endpoint, ALONE))
            for _ in range(4)
        ]
        watching = [
            asyncio.create_task(
                code_of(
                    health_pb2_grpc.HealthStub(channels[number % 4]).Watch(
                        health_pb2.HealthCheckRequest()
                    )
                )
            )
            for number in range(WATCHERS)
        ]
        asking = [
            asyncio.create_task(ask(pb_grpc.GatewayStub(channels[number % 4])))
            for number in range(ASKING)
        ]
        asking += [asyncio.create_task(connect_and_ask()) for _ in range(connecting)]
        await until(lambda: codes[OK] > 4 * ASKING, lambda: str(codes))
        gateway.draining = True
        await end(server, endpoint)
        ended.set()
        await asyncio.gather(*watching, *asking)
    return codes


async def stop(server: grpc.aio.Server, _endpoint: str) -> None:
    await server.stop(None)


async def ended_at_once(endpoint: str, name: str, connecting: int = 0) -> Counter[grpc.StatusCode]:
    return await codes_of_one_end(endpoint, server_of(name), stop, connecting=connecting)


@pytest.mark.parametrize("kind", ["port", "socket"])
async def test_who_is_not_answered_hears_unavailable(
    name: str,
    tmp_path: Path,
    kind: str,
    count: Callable[[int, int], int],
    report: Callable[..., None],
):
    ends = count(10, 150)
    codes: Counter[grpc.StatusCode] = Counter()
    for number in range(ends):
        endpoint = "127.0.0.1:0" if kind == "port" else f"unix:{tmp_path}/{number}"
        codes += await ended_at_once(endpoint, name)
    report(
        f"a server that ends, on a {kind}",
        ends=ends,
        OK=codes[OK],
        UNAVAILABLE=codes[UNAVAILABLE],
        CANCELLED=codes[CANCELLED],
    )
    assert set(codes) == {OK, UNAVAILABLE}, codes
    assert codes[UNAVAILABLE] >= ends * WATCHERS


async def test_stopping_alone_cancels(report: Callable[..., None]):
    """The control: what `grpc.aio.Server.stop` does to the same clients.

    Not to each: one whose connection ended first hears UNAVAILABLE.
    """
    codes: Counter[grpc.StatusCode] = Counter()
    ends = 0
    while not codes[CANCELLED] and ends < 50:
        codes += await codes_of_one_end(
            "127.0.0.1:0", grpc.aio.server(), lambda server, _: server.stop(0.1)
        )
        ends += 1
    report(
        "a server that ends, control by stop(grace) alone", ends=ends, CANCELLED=codes[CANCELLED]
    )
    assert codes[CANCELLED]


@pytest.mark.parametrize("kind", ["port", "socket"])
async def test_who_connects_while_it_ends_hears_unavailable(
    name: str,
    tmp_path: Path,
    kind: str,
    count: Callable[[int, int], int],
    report: Callable[..., None],
):
    """A connection that comes between the end of the others and `stop` is not taken."""
    ends = count(10, 100)
    codes: Counter[grpc.StatusCode] = Counter()
    for number in range(ends):
        endpoint = "127.0.0.1:0" if kind == "port" else f"unix:{tmp_path}/{number}"
        codes += await ended_at_once(endpoint, name, CONNECTING)
    assert not list(tmp_path.iterdir())  # a socket goes with its server
    report(
        f"a server that ends under clients that connect, on a {kind}",
        ends=ends,
        OK=codes[OK],
        UNAVAILABLE=codes[UNAVAILABLE],
        CANCELLED=codes[CANCELLED],
    )
    assert set(codes) == {OK, UNAVAILABLE}, codes


def listening_at(endpoint: str) -> _closing.Listeners:
    """What listens there, as a server of ours would know it."""
    path, port = endpoint.removeprefix("unix:"), endpoint.rpartition(":")[2]
    found = _closing.Listeners()
    for _, inode, opened in _closing._sockets():
        name = _closing._name(opened)
        if _closing._listens(opened) and (name.address == path or str(name.port) == port):
            found.names[inode] = name
    assert len(found.names) == 1
    return found


@pytest.mark.parametrize("kind", ["port", "socket"])
async def test_a_port_that_stays_open_cancels(
    tmp_path: Path, kind: str, report: Callable[..., None]
):
    """The control: all connections are closed, but the server still listens until it stops."""

    async def end(server: grpc.aio.Server, endpoint: str) -> None:
        listening_at(endpoint).sever()
        await asyncio.sleep(0.005)
        await server.stop(None)

    codes: Counter[grpc.StatusCode] = Counter()
    ends = 0
    while not codes[CANCELLED] and ends < 200:
        endpoint = "127.0.0.1:0" if kind == "port" else f"unix:{tmp_path}/{ends}"
        codes += await codes_of_one_end(endpoint, grpc.aio.server(), end, connecting=CONNECTING)
        ends += 1
    report(
        f"a server that ends, control by closing the connections alone, on a {kind}",
        ends=ends,
        CANCELLED=codes[CANCELLED],
    )
    assert codes[CANCELLED]


def test_only_the_server_s_own_connections_are_closed():
    """Not those of the same process to others, nor those on other ports."""
    import socket

    with contextlib.ExitStack() as stack:

        def listening() -> socket.socket:
            listener = stack.enter_context(socket.socket())
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            return listener

        ours, other = listening(), listening()
        ends = []
        for listener in (ours, other):
            client = stack.enter_context(socket.create_connection(listener.getsockname()))
            accepted = stack.enter_context(listener.accept()[0])
            client.settimeout(5)
            ends.append((client, accepted))
        ends[0][1].sendall(b"last words")
        listeners = listening_at(f"127.0.0.1:{ours.getsockname()[1]}")
        assert listeners.sever() == 1
        assert ends[0][0].recv(100) == b"last words"
        assert ends[0][0].recv(100) == b""
        ends[1][1].sendall(b"x")
        assert ends[1][0].recv(100) == b"x"
        stack.enter_context(socket.create_connection(ours.getsockname()))
        stack.enter_context(ours.accept()[0])  # it still listens
        address = ours.getsockname()
        listeners.deafen()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
        stack.enter_context(socket.create_connection(other.getsockname()))  # which still does
