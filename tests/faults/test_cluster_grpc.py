"""Clients that ask too much of gRPC: large, many, slow, late, restless."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import grpc
import grpc.aio
import psutil
import pytest
from cluster_helpers import (
    NOTHING_AHEAD,
    ROWS,
    Running,
    Teams,
    matching,
    query,
    server_of,
    until,
    write_config,
    write_rows,
)

from servers import config
from servers.gateway import GatewayService
from servers.pb import shmcoord_cluster_pb2 as pb
from servers.pb import shmcoord_cluster_pb2_grpc as pb_grpc
from servers.table import to_table

OK = grpc.StatusCode.OK
RESOURCE_EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
DEADLINE_EXCEEDED = grpc.StatusCode.DEADLINE_EXCEEDED
MAX_QUERIES = 40
TIMEOUT_S = 2.0
ALONE = [("grpc.use_local_subchannel_pool", 1)]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder: Path = tmp_path_factory.mktemp("cluster")
    write_rows(folder)
    limit = [f"max_queries = {MAX_QUERIES}"]
    teams = {"A": "GREEN", "E": "PINK"}
    running = Running(write_config(folder, teams, secret=False, timeout_s=TIMEOUT_S, cluster=limit))
    try:
        running.start(*teams)
        yield running
    finally:
        codes = running.stop()
    assert set(codes.values()) == {0}, codes
    for name in teams:
        log = running.log(name).read_text()
        assert "Traceback" not in log, log
        assert "ERROR" not in log, log


async def nothing_held(running: Running) -> None:
    await running.idle()
    await until(lambda: running.cells() == 0, lambda: f"{running.cells()} cells are taken")


def memory(running: Running, name: str = "A") -> int:
    return psutil.Process(running.processes[name].pid).memory_info().rss


async def ends_with(call: grpc.aio.UnaryStreamCall) -> grpc.StatusCode:
    """Reads a call to its end."""
    with contextlib.suppress(grpc.aio.AioRpcError):
        async for _ in call:
            pass
    return await call.code()


async def test_oversize_messages(nodes: Running, report: Callable[..., None]):
    large = ["x" * (300 << 10)]
    refused: Counter[str] = Counter()
    for name in ("A", "E"):
        async with grpc.aio.insecure_channel(nodes.cluster.endpoint(name), ALONE) as channel:
            gateway, node = pb_grpc.GatewayStub(channel), pb_grpc.NodeStub(channel)
            calls = [node.Answer(pb.PartRequest(words=large), timeout=10)]
            if name == "A":
                calls.append(gateway.Query(pb.QueryRequest(words=large), timeout=10))
                header = (("x-large", "x" * 40_000),)
                calls.append(gateway.Query(pb.QueryRequest(), timeout=10, metadata=header))
            for call in calls:
                assert await ends_with(call) is RESOURCE_EXHAUSTED
                refused[name] += 1
            call = node.Answer(pb.PartRequest(words=["x"] * 65), timeout=10)
            assert await ends_with(call) is grpc.StatusCode.INVALID_ARGUMENT
    await nothing_held(nodes)
    assert (await query(nodes, "code0001")).summary.matched == len(matching(["code0001"]))
    report("oversize messages and headers", RESOURCE_EXHAUSTED=refused.total())


async def test_many_streams_at_once(
    nodes: Running, count: Callable[[int, int], int], report: Callable[..., None]
):
    """The gateway runs so many and refuses the rest at once; what it holds stays bounded."""
    streams = count(300, 10_000)
    request = pb.QueryRequest(words=["code0"], limit=200)

    async def flood() -> tuple[Counter[grpc.StatusCode], int]:
        async with contextlib.AsyncExitStack() as stack:
            stubs = [
                pb_grpc.GatewayStub(
                    await stack.enter_async_context(grpc.aio.insecure_channel(nodes.gateway, ALONE))
                )
                for _ in range(count(6, 100))
            ]
            calls = [
                stubs[number % len(stubs)].Query(request, timeout=300) for number in range(streams)
            ]
            codes = asyncio.gather(*(ends_with(call) for call in calls))
            most = memory(nodes)
            while not codes.done():
                most = max(most, memory(nodes))
                await asyncio.wait([codes], timeout=0.1)
        return Counter(await codes), most

    await flood()
    await nothing_held(nodes)
    before = memory(nodes)
    codes, most = await flood()
    await nothing_held(nodes)
    assert set(codes) <= {OK, RESOURCE_EXHAUSTED}, codes
    assert codes.total() == streams
    assert codes[OK] > 0
    assert codes[RESOURCE_EXHAUSTED] > 0
    # A stream that waits for its refusal takes about 15 kB in gRPC.
    assert most - before < (64 << 20) + 20_000 * streams
    assert (await query(nodes, "code0001")).summary.matched == len(matching(["code0001"]))
    report(
        "streams at once",
        streams=streams,
        run_at_once=MAX_QUERIES,
        OK=codes[OK],
        RESOURCE_EXHAUSTED=codes[RESOURCE_EXHAUSTED],
        other_status=0,
        memory_grown=f"{(most - before) / 1e6:.1f} MB at most",
        cells_held=nodes.cells(),
    )


async def test_requests_without_a_lease_are_bounded(nodes: Running, report: Callable[..., None]):
    capacity = nodes.cluster.capacity("E")
    async with grpc.aio.insecure_channel(nodes.cluster.endpoint("E"), NOTHING_AHEAD) as channel:
        stub = pb_grpc.NodeStub(channel)
        calls = [stub.Answer(pb.PartRequest(), timeout=20) for _ in range(10 * capacity)]
        await until(lambda: sum(call.done() for call in calls) == 6 * capacity)
        assert {await call.code() for call in calls if call.done()} == {RESOURCE_EXHAUSTED}
        for call in calls:
            call.cancel()
    await nothing_held(nodes)
    report(
        "requests without a lease",
        capacity=capacity,
        sent=10 * capacity,
        taken=4 * capacity,
        RESOURCE_EXHAUSTED=6 * capacity,
    )


async def test_clients_that_read_never(
    nodes: Running, count: Callable[[int, int], int], report: Callable[..., None]
):
    """Without a deadline of theirs: the configured time-out takes their leases back."""
    clients, times = 30, count(2, 20)
    codes: Counter[grpc.StatusCode] = Counter()
    held: list[int] = []
    for _ in range(times):
        async with contextlib.AsyncExitStack() as stack:
            calls = []
            for _ in range(clients):
                channel = grpc.aio.insecure_channel(nodes.gateway, NOTHING_AHEAD)
                stub = pb_grpc.GatewayStub(await stack.enter_async_context(channel))
                calls.append(stub.Query(pb.QueryRequest()))
            await until(lambda: nodes.cells() > 0)
            begun = time.monotonic()
            await asyncio.sleep(TIMEOUT_S)
            await until(lambda: nodes.cells() == 0, lambda: f"{nodes.cells()} cells are taken")
            took_s = time.monotonic() - begun
            held.append(memory(nodes))
            assert (await query(nodes, "code0001")).summary.matched == len(matching(["code0001"]))
            # Who reads after all is told.
            codes.update([await asyncio.wait_for(ends_with(call), 10) for call in calls])
    # It goes up and down within about 80 MB from time to time, as the allocator has it.
    grown = max(held) - held[0]
    assert set(codes) <= {DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED}, codes
    assert codes[DEADLINE_EXCEEDED] >= 4
    assert grown < 128 << 20
    report(
        "clients that never read, without a deadline",
        clients=times * clients,
        all_leases_back_after=f"{took_s:.1f} s (time-out {TIMEOUT_S} s)",
        memory_grown=f"{max(0, grown) / 1e6:.1f} MB at most from the first {clients} on",
        DEADLINE_EXCEEDED=codes[DEADLINE_EXCEEDED],
        RESOURCE_EXHAUSTED=codes[RESOURCE_EXHAUSTED],
        other_status=0,
    )


class EndlessParts:
    """Nodes that send large chunks for ever."""

    async def answer(
        self, team: str, request: pb.PartRequest, timeout_s: float | None
    ) -> AsyncIterator[pb.PartChunk]:
        table = to_table(("word",), ("VARCHAR",), [("x" * 300_000,)])
        while True:
            yield pb.PartChunk(node="B", table=table)


@pytest.mark.parametrize("limit_s", [0.5, 3600.0])
async def test_a_query_that_is_not_read_is_held_without_the_limit(name: str, limit_s: float):
    """The control: it is the limit that takes it back, and no write ends by itself."""
    cluster = config.load()
    settings = cluster.cluster.model_copy(update={"timeout_s": limit_s})
    gateway = GatewayService(
        cluster.model_copy(update={"cluster": settings}), Teams(EndlessParts().answer)
    )
    server = server_of(name)
    pb_grpc.add_GatewayServicer_to_server(gateway, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", NOTHING_AHEAD) as channel:
        call = pb_grpc.GatewayStub(channel).Query(pb.QueryRequest())
        await until(lambda: gateway.running == 1)
        await asyncio.sleep(1.0)
        assert gateway.running == (limit_s > 1.0)
        if limit_s > 1.0:  # else it has its status, behind what it has not read
            await server.stop(None)
        await until(lambda: gateway.running == 0)
        expected = grpc.StatusCode.UNAVAILABLE if limit_s > 1.0 else DEADLINE_EXCEEDED
        assert await asyncio.wait_for(ends_with(call), 10) is expected
    await server.stop(None)


async def test_a_client_that_reads_slowly_gets_everything(
    nodes: Running, report: Callable[..., None]
):
    before = memory(nodes)
    most = rows = 0
    async with grpc.aio.insecure_channel(nodes.gateway, NOTHING_AHEAD) as channel:
        async for chunk in pb_grpc.GatewayStub(channel).Query(pb.QueryRequest(), timeout=30):
            rows += chunk.rows.table.rows
            most = max(most, memory(nodes))
            await asyncio.sleep(0.04)
    assert rows == ROWS
    assert most - before < 32 << 20
    await nothing_held(nodes)
    report(
        "a client that reads slowly",
        rows=rows,
        memory_grown=f"{max(0, most - before) / 1e6:.1f} MB at most",
    )


async def test_the_deadline_goes_along_the_hops(
    nodes: Running, count: Callable[[int, int], int], report: Callable[..., None]
):
    """A gateway that stands still can cancel nothing: the nodes know by themselves when to end."""
    process = nodes.processes["A"]
    rounds, latest_s = count(1, 30), -1.0
    for _ in range(rounds):
        async with grpc.aio.insecure_channel(nodes.gateway, NOTHING_AHEAD) as channel:
            call = pb_grpc.GatewayStub(channel).Query(pb.QueryRequest(teams=["PINK"]), timeout=1.0)
            ends = time.monotonic() + 1.0
            await call.__aiter__().__anext__()
            process.send_signal(signal.SIGSTOP)
            try:
                assert nodes.queues()["E"] == 1
                await asyncio.sleep(ends - time.monotonic() - 0.3)
                assert nodes.queues()["E"] == 1
                await until(lambda: nodes.queues()["E"] == 0, timeout_s=5)
                latest_s = max(latest_s, time.monotonic() - ends)
            finally:
                process.send_signal(signal.SIGCONT)
            assert latest_s < 1.0
            assert await ends_with(call) is DEADLINE_EXCEEDED
        await nothing_held(nodes)
    report(
        "deadline over two hops",
        rounds=rounds,
        node_ended_after_the_deadline=f"{latest_s * 1e3:+.0f} ms at most",
    )


# --- keepalive floods, by hand: gRPC's own clients would not

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_SETTINGS, _PING, _GOAWAY = 4, 6, 7
_ENHANCE_YOUR_CALM = 11


def frame(kind: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, 0]) + bytes(4) + payload


def connected(endpoint: str, timeout_s: float = 5.0) -> socket.socket:
    host, _, port = endpoint.rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout=timeout_s)
    connection.sendall(_PREFACE + frame(_SETTINGS))
    return connection


def pinged(endpoint: str, pings: int) -> tuple[int, bytes] | None:
    """Sends pings and reads the answers; the error of a GOAWAY, None if none came."""
    with connected(endpoint) as connection:
        connection.settimeout(0.5)
        data = b""
        with contextlib.suppress(OSError):
            for _ in range(pings):
                connection.sendall(frame(_PING, b"12345678"))
                data += connection.recv(65536)
            while more := connection.recv(65536):
                data += more
    while len(data) >= 9:
        length, kind = int.from_bytes(data[:3], "big"), data[3]
        payload, data = data[9 : 9 + length], data[9 + length :]
        if kind == _GOAWAY:
            return int.from_bytes(payload[4:8], "big"), payload[8:]
    return None


def flooded(endpoint: str, pings: int, timeout_s: float = 5.0) -> bool:
    """Sends pings and reads nothing; whether the connection was ended for it."""
    with connected(endpoint, timeout_s) as connection:
        try:
            for _ in range(pings // 100):
                connection.sendall(100 * frame(_PING, b"12345678"))
            while connection.recv(65536):
                pass
        except TimeoutError:
            return False
        except OSError:
            pass
        return True


async def test_floods_of_pings(
    nodes: Running, count: Callable[[int, int], int], report: Callable[..., None]
):
    floods = count(10, 200)
    request = pb.QueryRequest(words=["code0001"])
    before = memory(nodes)
    for name in ("A", "E"):
        endpoint = nodes.cluster.endpoint(name)
        assert await asyncio.to_thread(pinged, endpoint, 2) is None  # that is allowed
        error = await asyncio.to_thread(pinged, endpoint, 10)
        assert error == (_ENHANCE_YOUR_CALM, b"too_many_pings")
    async with grpc.aio.insecure_channel(nodes.gateway, ALONE) as channel:
        stub = pb_grpc.GatewayStub(channel)
        for number in range(floods):
            endpoint = nodes.cluster.endpoint("AE"[number % 2])
            flood = asyncio.create_task(asyncio.to_thread(flooded, endpoint, 10_000))
            assert await ends_with(stub.Query(request, timeout=10)) is OK
            assert await flood
    grown = memory(nodes) - before
    assert grown < 16 << 20
    report(
        "floods of pings",
        GOAWAY_too_many_pings_read_by=2,
        connections_flooded_and_ended=floods,
        pings_each=10_000,
        others_failed=0,
        memory_grown=f"{max(0, grown) / 1e6:.1f} MB",
    )
