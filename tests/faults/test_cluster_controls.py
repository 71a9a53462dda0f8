"""The controls of the cluster's rows: a cluster without its protections, in which each is missed.

The nodes are those of the reference cluster, with what protects them taken out before they start:
no bound for messages, for pings, for queries and for requests without a lease; the deadline is not
passed on; a client that has gone is served all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from cluster_helpers import NOTHING_AHEAD, Running, Teams, until, write_config, write_rows
from test_cluster_grpc import ALONE, ends_with, flooded, pinged

import shmcoord
from servers import config, gateway
from servers.gateway import GatewayService
from servers.merging import merged
from servers.pb import shmcoord_cluster_pb2 as pb
from servers.pb import shmcoord_cluster_pb2_grpc as pb_grpc
from servers.table import to_table
from shmcoord import course, dispatch
from shmcoord.transport import ConnectionLost

OK = grpc.StatusCode.OK
TIMEOUT_S = 4.0
CARELESS = """
import asyncio
from servers import answering, gateway, node

unbound = {"grpc.max_receive_message_length": -1, "grpc.http2.max_ping_strikes": 0}
node._SERVER_OPTIONS = [*(dict(node._SERVER_OPTIONS) | unbound).items()]
answering._UNLEASED = 1000
gateway.GatewayService._timeout_s = lambda self, context: self._cluster.cluster.timeout_s

async def to_the_end(self, request, context, careful=gateway.GatewayService.Query):
    await asyncio.shield(asyncio.ensure_future(careful(self, request, context)))

class Stubborn(gateway.Writer):
    async def write(self, response):
        try:
            await super().write(response)
        except BaseException:
            await asyncio.sleep(0.2)

gateway.GatewayService.Query = to_the_end
gateway.Writer = Stubborn
"""


@pytest.fixture(scope="module")
def careless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder: Path = tmp_path_factory.mktemp("cluster")
    write_rows(folder)
    file = write_config(
        folder,
        {"A": "GREEN", "E": "PINK"},
        secret=False,
        grace_s=0.2,
        timeout_s=TIMEOUT_S,
        cluster=["max_queries = 100000"],
    )
    running = Running(file, before=CARELESS)
    try:
        running.start("A", "E")
        yield running
    finally:
        running.stop()


async def test_oversize_messages_are_taken(careless: Running, report: Callable[..., None]):
    large = pb.QueryRequest(words=["x" * (300 << 10)])
    async with grpc.aio.insecure_channel(careless.gateway, ALONE) as channel:
        code = await ends_with(pb_grpc.GatewayStub(channel).Query(large, timeout=10))
    report("oversize messages and headers, control without a bound", code.name)
    assert code is OK


async def test_floods_of_pings_go_on(careless: Running, report: Callable[..., None]):
    endpoint = careless.cluster.endpoint("E")
    error = await asyncio.to_thread(pinged, endpoint, 10)
    ended = await asyncio.to_thread(flooded, endpoint, 2_000, 1.0)
    report("floods of pings, control without strikes", GOAWAY=str(error), ended=str(ended))
    assert error is None
    assert not ended


async def test_many_more_run_at_once(careless: Running, report: Callable[..., None]):
    """Requests without a lease at a node: all are taken, whatever its capacity."""
    sent = 10 * careless.cluster.capacity("E")
    async with grpc.aio.insecure_channel(careless.cluster.endpoint("E"), NOTHING_AHEAD) as channel:
        stub = pb_grpc.NodeStub(channel)
        calls = [stub.Answer(pb.PartRequest(words=["lorem"]), timeout=20) for _ in range(sent)]
        await until(lambda: careless.queues()["E"] > sent // 2)
        taken = careless.queues()["E"]
        for call in calls:
            call.cancel()
    await careless.idle()
    report("requests without a lease, control without a bound", sent=sent, taken=taken)
    assert taken > 4 * careless.cluster.capacity("E")


async def test_the_deadline_stays_with_the_gateway(careless: Running, report: Callable[..., None]):
    """The nodes go on when the client's deadline has long passed."""
    process = careless.processes["A"]
    async with grpc.aio.insecure_channel(careless.gateway, NOTHING_AHEAD) as channel:
        call = pb_grpc.GatewayStub(channel).Query(pb.QueryRequest(teams=["PINK"]), timeout=0.5)
        ends = time.monotonic() + 0.5
        await call.__aiter__().__anext__()
        process.send_signal(signal.SIGSTOP)  # as in the row
        await asyncio.sleep(ends - time.monotonic() + 1.0)
        held = careless.queues()["E"]
        process.send_signal(signal.SIGCONT)
        call.cancel()
    report("deadline over two hops, control without passing it on", held_1_s_later=held)
    assert held == 1
    await careless.idle()


async def test_the_cancelled_are_served_on(careless: Running, report: Callable[..., None]):
    async with grpc.aio.insecure_channel(careless.gateway, NOTHING_AHEAD) as channel:
        stub = pb_grpc.GatewayStub(channel)
        for _ in range(3):
            call = stub.Query(pb.QueryRequest(), timeout=30)
            await call.__aiter__().__anext__()
            call.cancel()
        await asyncio.sleep(1.0)
        held = careless.cells()
    report("cancelled requests, control: served on", cells_held_1_s_later=held)
    assert held > 0
    await until(lambda: careless.cells() == 0, timeout_s=2 * TIMEOUT_S)


async def test_a_lease_without_an_owner_is_found(
    careless: Running, native, report: Callable[..., None]
):
    """What every row says at its end, 0 cells held, is not said where one is."""
    with shmcoord.Segment.open(careless.cluster.segment("E")) as segment:
        index = native.take_ownerless(segment.backend("E"))
        with pytest.raises(AssertionError):
            await until(lambda: careless.cells() == 0, timeout_s=1.0)
        native.free_plainly(segment.backend("E"), index)
    await until(lambda: careless.cells() == 0)
    report("cluster, control: a lease without an owner", "found")


class Parts:
    """Nodes that send for ever, or nothing at all."""

    def __init__(self, *, hang: bool) -> None:
        self.hang = hang
        self.made = 0

    async def answer(
        self, team: str, request: pb.PartRequest, timeout_s: float | None
    ) -> AsyncIterator[pb.PartChunk]:
        table = to_table(("word",), ("VARCHAR",), [("x" * 10_000,)])
        while True:
            if self.hang:
                await asyncio.sleep(3600)
            self.made += 1
            yield pb.PartChunk(node="B", table=table)
            await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def connected(
    parts: Parts, options: list[tuple[str, int]], **settings: object
) -> AsyncIterator[tuple[GatewayService, pb_grpc.GatewayStub]]:
    """A gateway in this process, and a stub for it."""
    cluster = config.load()
    changed = cluster.cluster.model_copy(update=settings)
    service = GatewayService(cluster.model_copy(update={"cluster": changed}), Teams(parts.answer))
    server = grpc.aio.server()
    pb_grpc.add_GatewayServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options) as channel:
        yield service, pb_grpc.GatewayStub(channel)
    await server.stop(0)


async def test_streams_pile_up_without_the_limit(report: Callable[..., None]):
    running, codes = {}, Counter[grpc.StatusCode]()
    for most in (40, 100_000):
        async with connected(Parts(hang=True), ALONE, max_queries=most) as (service, stub):
            calls = [stub.Query(pb.QueryRequest(), timeout=60) for _ in range(200)]
            await until(
                lambda most=most, s=service, calls=calls: (
                    s.running == min(most, 200)
                    and sum(call.done() for call in calls) == max(200 - most, 0)
                )
            )
            running[most] = service.running
            for call in calls:
                if call.done():
                    codes[await call.code()] += 1
                call.cancel()
    assert codes == {grpc.StatusCode.RESOURCE_EXHAUSTED: 160}
    report("streams at once, control without the limit", run_of_200=running[100_000])
    assert running == {40: 40, 100_000: 200}


async def test_a_slow_reader_fills_the_memory_without_the_bound(
    monkeypatch: pytest.MonkeyPatch, report: Callable[..., None]
):
    made = {}
    for ahead in (None, 1_000_000):
        if ahead is not None:
            monkeypatch.setattr(gateway, "merged", lambda s, a=ahead: merged(s, ahead=a))
        parts = Parts(hang=False)
        async with connected(parts, NOTHING_AHEAD) as (_, stub):
            call = stub.Query(pb.QueryRequest(), timeout=60)
            chunks = call.__aiter__()
            for _ in range(10):
                await chunks.__anext__()
                await asyncio.sleep(0.05)
            made[ahead] = parts.made
            call.cancel()
    report(
        "a client that reads slowly, control without a bound",
        chunks_read=10,
        gathered=made[1_000_000],
        instead_of=made[None],
    )
    assert made[1_000_000] > 10 * made[None]


class Dying:
    """Nodes that take a request up, carry it out, and die before they have answered.

    Args:
        nodes: by endpoint.
    """

    def __init__(self, nodes: dict[str, shmcoord.Node]) -> None:
        self.nodes = nodes
        self.carried_out: Counter[object] = Counter()

    async def send(
        self, endpoint: str, method: str, request: object, *, lease: str, timeout_s: float | None
    ) -> object:
        self.nodes[endpoint].adopt(lease)
        self.carried_out[request] += 1
        raise ConnectionLost(f"{endpoint} died")

    async def close(self) -> None:
        """Nothing to close."""


@pytest.mark.parametrize("again", [False, True], ids=["as it is", "sent again"])
async def test_sending_again_what_was_adopted_is_found(
    name: str, monkeypatch: pytest.MonkeyPatch, again: bool, report: Callable[..., None]
):
    """The control: whoever sends everything again carries requests out twice."""
    with shmcoord.Segment.open(name, slots=8, leases=64) as segment:
        nodes = {
            str(i): segment.join(f"n{i}", group="G", endpoint=str(i), interval_s=3600)
            for i in range(3)
        }
        if again:
            monkeypatch.setattr(course.Course, "leave", careless_leave)
        transport = Dying(nodes)
        with shmcoord.Router(segment) as router:
            dispatcher = dispatch.AsyncDispatcher(router, transport, adopts=True)
            for number in range(10):
                with pytest.raises((ConnectionLost, shmcoord.NoBackend)):
                    await dispatcher.call("G", "method", number, timeout_s=5)
        most = max(transport.carried_out.values())
    if again:
        report("requests of a dead node, control: sent again", carried_out_times=most)
    assert most == (3 if again else 1)


def careless_leave(taken: course.Course, lease: shmcoord.Lease, error: BaseException) -> bool:
    lease.release()
    if isinstance(error, ConnectionLost):
        taken.exclude = (*taken.exclude, lease.backend)
        return True
    return False
