"""The cluster with load running through its gateway, while processes are killed and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio
import psutil
import pytest
from cluster_helpers import (
    NODES,
    Running,
    held_query,
    matching,
    query,
    until,
    write_config,
    write_rows,
)

import shmcoord
from servers import client
from servers.pb import shmcoord_cluster_pb2 as pb
from servers.pb import shmcoord_cluster_pb2_grpc as pb_grpc

WORKERS = 6
WORDS = ["code0001"]
ROWS_FOUND = len(matching(WORDS))
#: After so many seconds nothing is routed to a dead node.
NO_ROUTING_S = 0.010
#: Of the same kind, for a node that stands still: heartbeats of 0.2 s, three of them, and a margin.
SUSPECT_S = 1.0
#: The gateway passes a node over for 1 s after it could not be reached.
UNREACHABLE_S = 1.2
OK, UNAVAILABLE = grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder: Path = tmp_path_factory.mktemp("cluster")
    write_rows(folder)
    running = Running(write_config(folder, NODES, secret=False), stamped=True)
    try:
        running.start(*NODES)
        yield running
    finally:
        codes = running.stop()
    assert set(codes.values()) == {0}, codes
    for name in NODES:
        log = running.log(name).read_text()
        assert "Traceback" not in log, log
        assert "ERROR" not in log, log


@pytest.fixture
def nodes(started: Running) -> Iterator[Running]:
    """The six nodes, all of them running before and after each test."""
    yield started
    started.start(*[name for name, p in started.processes.items() if p.poll() is not None])


@dataclass
class Outcome:
    """How one query of the load went."""

    began: float
    ended: float = 0.0
    asked: int = 1
    code: grpc.StatusCode = OK
    says: str = ""
    served: dict[str, str] = field(default_factory=dict)


#: What any gRPC client may be given, whatever it is written in: ask again who is not there.
ASK_AGAIN = {
    "name": [{}],
    "waitForReady": True,
    "retryPolicy": {
        "maxAttempts": 5,
        "initialBackoff": "0.3s",
        "maxBackoff": "3s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE"],
    },
}
SERVICE_CONFIG = ("grpc.service_config", json.dumps({"methodConfig": [ASK_AGAIN]}))


async def ask_plainly(stub: pb_grpc.GatewayStub, request: pb.QueryRequest) -> client.Answer:
    """As a client does that has nothing of ours but the .proto file; codes are gRPC's own."""
    answer = client.Answer()
    try:
        async for chunk in stub.Query(request, timeout=20.0):
            if chunk.HasField("summary"):
                answer.summary = chunk.summary
    except grpc.aio.AioRpcError as error:
        raise client.QueryError(error.code(), error.details() or "") from None
    return answer


@contextlib.asynccontextmanager
async def load(
    running: Running,
    retry_s: float = 0.0,
    *,
    plain: bool = False,
    more: tuple[tuple[str, object], ...] = (),
    request: pb.QueryRequest | None = None,
) -> AsyncIterator[list[Outcome]]:
    """Queries by some clients at once for as long as the `async with` lasts; how they went.

    Args:
        running: the cluster.
        retry_s: for so many seconds our own client asks again.
        plain: with a client that is not ours.
        more: further options for its channel.
        request: what is asked.
    """
    outcomes: list[Outcome] = []
    ending = asyncio.Event()
    request = request or pb.QueryRequest(words=WORDS, limit=5)

    async def work() -> None:
        options = [
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 100),
            *more,
        ]
        async with grpc.aio.insecure_channel(running.gateway, options) as channel:
            stub = pb_grpc.GatewayStub(channel)
            while not ending.is_set():
                outcome = Outcome(time.monotonic())
                try:
                    if plain:
                        answer = await ask_plainly(stub, request)
                    else:
                        answer = await client.ask(stub, request, 20.0, retry_s)
                except client.QueryError as error:
                    outcome.code, outcome.says = error.code, str(error)
                else:
                    outcome.asked = answer.asked
                    outcome.served = {part.team: part.node for part in answer.summary.parts}
                    assert answer.summary.matched == len(matching(list(request.words)))
                outcome.ended = time.monotonic()
                outcomes.append(outcome)
                await asyncio.sleep(random.random() * 0.02)  # the machine has others, too

    tasks = [asyncio.create_task(work()) for _ in range(WORKERS)]
    try:
        await asyncio.sleep(0.2)
        yield outcomes
    finally:
        ending.set()
        await asyncio.gather(*tasks)


def failed(outcomes: list[Outcome]) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.code is not OK]


async def rest_of(chunks: AsyncIterator[object]) -> None:
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
        async for _ in chunks:
            pass


async def nothing_held(running: Running) -> None:
    await running.idle()
    await until(lambda: running.cells() == 0, lambda: f"{running.cells()} cells are taken")


async def test_nodes_killed_under_load(
    nodes: Running, count: Callable[[int, int], int], report: Callable[..., None]
):
    """Only what the dead node had adopted fails; 10 ms later nothing is routed to it."""
    kills = count(2, 40)
    sent = lost = 0
    latest = -1.0
    for number in range(kills):
        victim = "DBECF"[number % 5]
        begun = time.monotonic()
        async with load(nodes) as outcomes:
            await asyncio.sleep(random.random() * 0.1)
            killed = time.monotonic()
            nodes.kill(victim)
            await asyncio.sleep(0.3)
            late = killed + NO_ROUTING_S
            await until(lambda at=late, of=outcomes: sum(o.began > at for o in of) > WORKERS)
        routed = [m - killed for m, node, _ in nodes.decisions() if node == victim and m > begun]
        assert routed, f"{victim} had no work"
        latest = max(latest, *routed)
        assert latest < NO_ROUTING_S, f"{victim} was routed to {latest:.6f} s after its death"
        for outcome in failed(outcomes):
            assert outcome.code is UNAVAILABLE, outcome
            assert f"team {NODES[victim]}" in outcome.says, outcome
        # What failed had been adopted, and a node adopts no more than its capacity.
        assert len(failed(outcomes)) <= nodes.cluster.capacity(victim)
        alive = {name for name, process in nodes.processes.items() if process.poll() is None}
        assert alive == set(NODES) - {victim}
        after = [o for o in outcomes if o.began > killed + NO_ROUTING_S]
        assert len(after) > WORKERS
        assert not failed(after)
        sent, lost = sent + len(outcomes), lost + len(failed(outcomes))
        nodes.start(victim)
    await nothing_held(nodes)
    report(
        "kill -9 of nodes under load",
        kills=kills,
        queries=sent,
        UNAVAILABLE=lost,
        wrong_status=0,
        others_failed=0,
        latest_routing_to_the_dead=f"{latest * 1e3:+.2f} ms",
        cells_held=nodes.cells(),
    )


async def test_routing_by_one_sign_of_life_is_found(nodes: Running, report: Callable[..., None]):
    """The controls: heartbeats alone, for a dead node; the death word alone, for one that stands.

    Both judge the same processes at the same moments as the rows do.
    """
    victim, late_s = "D", 3 * 0.2
    with shmcoord.Segment.attach(nodes.cluster.segment(victim)) as segment:
        nodes.kill(victim)
        killed = latest = time.monotonic()
        while time.monotonic() < killed + 1.5:
            if segment.status(victim).heartbeat_age_s < late_s:
                latest = time.monotonic()
            await asyncio.sleep(0.002)
        assert latest - killed > NO_ROUTING_S
        report(
            "kill -9 of nodes under load, control by heartbeats alone",
            latest_routing_to_the_dead=f"{(latest - killed) * 1e3:+.0f} ms",
        )
        nodes.start(victim)
        nodes.processes[victim].send_signal(signal.SIGSTOP)
        await asyncio.sleep(SUSPECT_S)
        backend = segment.backend(victim)
        alive, health = backend.alive, segment.status(victim).health
        nodes.processes[victim].send_signal(signal.SIGCONT)
        assert alive
        assert health is shmcoord.Health.SUSPECT
        report("SIGSTOP of a node under load, control by the death word alone", "routed to it")


async def test_what_a_dead_node_had_not_adopted_fails_over_and_what_it_had_does_not(
    nodes: Running, count: Callable[[int, int], int], report: Callable[..., None]
):
    rounds = count(1, 20)
    moved = 0
    for _ in range(rounds):
        async with contextlib.AsyncExitStack() as stack:
            held = {}
            for _ in range(5):  # two of the three nodes have two each, the third one
                kept = await stack.enter_async_context(held_query(nodes, teams=["PINK"]))
                held.setdefault(nodes.decisions()[-1][1], []).append(kept)
            # The third is the one to be taken next. It sends its rows: it has adopted this one, and
            # may have done anything.
            victim = min(held, key=lambda node, of=held: len(of[node]))
            [(call, chunks)] = held[victim]
            nodes.processes[victim].send_signal(signal.SIGSTOP)
            # Some of these are sent to it before it is suspect, and it takes none of them up.
            begun = time.monotonic()
            asked = [
                asyncio.create_task(query(nodes, "code0001", teams=["PINK"])) for _ in range(9)
            ]
            await asyncio.sleep(0.3)
            waiting = sum(not task.done() for task in asked)
            assert waiting
            nodes.kill(victim)
            answers = await asyncio.gather(*asked)
            assert victim not in {answer.summary.parts[0].node for answer in answers}
            routed = Counter(node for moment, node, _ in nodes.decisions() if moment > begun)
            assert routed[victim] >= waiting
            assert sum(routed.values()) == len(asked) + routed[victim]
            await rest_of(chunks)
            assert await call.code() is UNAVAILABLE
            assert "team PINK" in await call.details()
        moved += routed[victim]
        nodes.start(victim)
        await asyncio.sleep(UNREACHABLE_S)
    await nothing_held(nodes)
    report(
        "requests of a dead node",
        rounds=rounds,
        not_adopted_and_answered_by_others=moved,
        not_adopted_and_failed=0,
        adopted_and_UNAVAILABLE=rounds,
    )


async def test_gateways_killed_under_load(
    nodes: Running, count: Callable[[int, int], int], report: Callable[..., None]
):
    kills = count(1, 25)
    sent = lost = 0
    slowest = 0.0
    for _ in range(kills):
        async with load(nodes) as outcomes, held_query(nodes):
            await asyncio.sleep(random.random() * 0.1)
            nodes.kill("A")
            killed = time.monotonic()
            # What it had reserved and nobody adopted goes with the nodes' next beat; what it had
            # as a node goes with its slot, when that is taken again.
            await until(lambda: nodes.cells(without="A") == 0)
            slowest = max(slowest, time.monotonic() - killed)
            await asyncio.to_thread(nodes.start, "A")
            await until(lambda done=outcomes: done[-1].code is OK, timeout_s=30)
        for outcome in failed(outcomes):
            assert outcome.code is UNAVAILABLE, outcome
        assert all(nodes.processes[name].poll() is None for name in NODES)
        sent, lost = sent + len(outcomes), lost + len(failed(outcomes))
    await nothing_held(nodes)
    report(
        "kill -9 of the gateway under load",
        kills=kills,
        queries=sent,
        UNAVAILABLE=lost,
        wrong_status=0,
        all_leases_back_after=f"{slowest:.2f} s at most (heartbeats of 0.2 s)",
        cells_held=nodes.cells(),
    )


async def test_leases_of_a_gateway_that_lives_are_kept(nodes: Running, report: Callable[..., None]):
    """The control: it is its death that gives them back, and nothing else within that time."""
    async with held_query(nodes):
        nodes.processes["A"].send_signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(1.0)
            held = nodes.cells()
        finally:
            nodes.processes["A"].send_signal(signal.SIGCONT)
    await nothing_held(nodes)
    report("kill -9 of the gateway under load, control: it only stands", cells_held_1_s_later=held)
    assert held > 0


async def test_a_node_that_stands_still_and_goes_on(
    nodes: Running, count: Callable[[int, int], int], report: Callable[..., None]
):
    """Nothing fails: what it had is late, the rest goes to others, and it gets work again."""
    rounds = count(1, 20)
    sent = 0

    def routed(node: str, begin: float, end: float) -> int:
        return sum(name == node and begin < m < end for m, name, _ in nodes.decisions())

    for number in range(rounds):
        victim = "FBDCE"[number % 5]
        process = nodes.processes[victim]
        async with load(nodes) as outcomes:
            process.send_signal(signal.SIGSTOP)
            stopped = time.monotonic()
            await asyncio.sleep(SUSPECT_S)
            assert nodes.statuses()[victim].pid == process.pid
            before = len(outcomes)
            await asyncio.sleep(0.7)
            assert len(outcomes) > before  # the others went on meanwhile
            process.send_signal(signal.SIGCONT)
            went_on = time.monotonic()
            assert routed(victim, stopped + SUSPECT_S, went_on) == 0
            await until(lambda at=went_on, node=victim: routed(node, at, at + 60) > 0)
            assert nodes.statuses()[victim].health is shmcoord.Health.ALIVE
        assert not failed(outcomes)
        sent += len(outcomes)
    await nothing_held(nodes)
    report(
        "SIGSTOP of a node under load, SIGCONT",
        rounds=rounds,
        queries=sent,
        failed=0,
        routed_to_it_while_suspect=0,
        cells_held=nodes.cells(),
    )


async def restarted(running: Running, name: str) -> None:
    assert await asyncio.to_thread(running.end, name) == 0
    await asyncio.to_thread(running.start, name)


@pytest.mark.parametrize("plain", [False, True], ids=["our client", "a plain client"])
async def test_a_rolling_restart_loses_nothing(
    nodes: Running, full: bool, report: Callable[..., None], plain: bool
):
    """Nodes: no client notices. The gateway: clients ask again, and are answered."""
    names, gateways = (4 * "BCDEF", 6) if full else ("B" if plain else "E", 1)
    async with load(nodes, plain=plain) as outcomes:
        for name in names:
            await restarted(nodes, name)
    assert not failed(outcomes)
    if full:
        assert {node for outcome in outcomes for node in outcome.served.values()} == set(NODES)
    async with load(nodes, 20.0, plain=plain, more=(SERVICE_CONFIG,) * plain) as through:
        for _ in range(gateways):
            await restarted(nodes, "A")
            began = time.monotonic()
            await until(lambda at=began: sum(o.began > at for o in through) > WORKERS)
    assert not failed(through)
    await nothing_held(nodes)
    report(
        "rolling restart under load, " + ("a plain gRPC client" if plain else "the client's"),
        restarts=len(names) + gateways,
        queries=len(outcomes) + len(through),
        failed=0,
        cells_held=nodes.cells(),
    )


async def test_a_gateway_that_ends_says_unavailable(
    nodes: Running, count: Callable[[int, int], int], report: Callable[..., None]
):
    """Who does not ask again hears UNAVAILABLE, never CANCELLED: that is for clients to say."""
    restarts = count(1, 20)
    codes: Counter[grpc.StatusCode] = Counter()
    async with load(nodes, plain=True) as outcomes:
        for _ in range(restarts):
            await restarted(nodes, "A")
    codes.update(outcome.code for outcome in outcomes)
    assert set(codes) == {OK, UNAVAILABLE}, codes
    await nothing_held(nodes)
    report(
        "a gateway that ends, plain gRPC clients that do not ask again",
        restarts=restarts,
        queries=len(outcomes),
        UNAVAILABLE=codes[UNAVAILABLE],
        other_status=0,
    )


async def test_restarting_without_a_drain_is_found(nodes: Running, report: Callable[..., None]):
    """The control: the same restarts, but the nodes have no time to finish what they run."""
    request = pb.QueryRequest(words=["lorem"], limit=2000)
    restarts = 0
    while restarts < 40:
        async with load(nodes, plain=True, request=request) as outcomes:
            for name in "BE":
                await asyncio.to_thread(nodes.kill, name)
                await asyncio.to_thread(nodes.start, name)
                restarts += 1
        if failed(outcomes):
            break
    await nothing_held(nodes)
    report(
        "rolling restart under load, control without a drain",
        restarts=restarts,
        failed=len(failed(outcomes)),
    )
    assert failed(outcomes)


async def test_cancelled_requests_leave_nothing(
    nodes: Running, count: Callable[[int, int], int], report: Callable[..., None]
):
    total = count(400, 10_000)
    requests = [
        pb.QueryRequest(words=["lorem"], limit=2000),
        pb.QueryRequest(words=WORDS),
        pb.QueryRequest(words=["apple"], aggregate=True),
    ]
    processes = {name: psutil.Process(p.pid) for name, p in nodes.processes.items()}
    codes: Counter[grpc.StatusCode] = Counter()

    async def cancelled(wanted: int) -> None:
        async with grpc.aio.insecure_channel(nodes.gateway) as channel:
            stub = pb_grpc.GatewayStub(channel)
            while codes[grpc.StatusCode.CANCELLED] < wanted:
                call = stub.Query(random.choice(requests), timeout=30)
                reading = asyncio.ensure_future(rest_of(call))
                await asyncio.wait([reading], timeout=random.random() * 0.06)
                call.cancel()
                await asyncio.wait([reading])
                codes[await call.code()] += 1

    async def used() -> dict[str, tuple[int, int]]:
        await nothing_held(nodes)
        return {name: (p.memory_info().rss, p.num_fds()) for name, p in processes.items()}

    async def some(wanted: int) -> None:
        await asyncio.gather(*(cancelled(wanted) for _ in range(16)))

    async with held_query(nodes):
        assert nodes.cells() == 2  # this is how it would look
    await some(total // 2)
    before = await used()
    await some(total)
    after = await used()
    # The first half has filled every pool and buffer; the second must not need more.
    memory = max(after[name][0] - before[name][0] for name in NODES)
    descriptors = max(after[name][1] - before[name][1] for name in NODES)
    assert memory < 32 << 20
    assert descriptors <= 4
    assert set(codes) <= {grpc.StatusCode.CANCELLED, OK}, codes
    assert codes[grpc.StatusCode.CANCELLED] >= total
    for name in NODES:
        assert (await client.node_status(nodes.cluster.endpoint(name), 5)).inflight == 0
    assert (await query(nodes, "code0001")).summary.matched == ROWS_FOUND
    report(
        "cancelled requests",
        cancelled=codes[grpc.StatusCode.CANCELLED],
        answered_before=codes[OK],
        cells_held=nodes.cells(),
        memory_grown=f"{memory / 1e6:.1f} MB at most",
        descriptors_grown=descriptors,
    )
