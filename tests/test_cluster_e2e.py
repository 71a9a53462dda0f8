"""The cluster as real processes: six nodes, real gRPC, real segments, killed and stopped nodes."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from cluster_helpers import (
    NODES,
    NOTHING_AHEAD,
    ROOT,
    ROWS,
    SECRET,
    Running,
    free_ports,
    held_query,
    matching,
    query,
    until,
    write_config,
    write_rows,
)
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import shmcoord
from servers import client, config
from servers.pb import shmcoord_cluster_pb2 as pb
from servers.pb import shmcoord_cluster_pb2_grpc as pb_grpc
from shmcoord.transport.grpc import LEASE_KEY, LEASE_LOST_KEY


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cluster")
    write_rows(folder)
    return folder


@pytest.fixture(scope="module")
def started(folder: Path) -> Iterator[Running]:
    running = Running(write_config(folder, NODES, secret=True))
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
    assert not set(running.cluster.segments) & set(os.listdir("/dev/shm"))


@pytest.fixture
def nodes(started: Running) -> Iterator[Running]:
    """The six nodes, all of them running before and after each test."""
    yield started
    started.start(*[name for name, p in started.processes.items() if p.poll() is not None])


def as_wire(rows: list[tuple]) -> list[tuple]:
    return [tuple(None if cell == "NA" else cell for cell in row) for row in rows]


@pytest.mark.parametrize(
    "words", ["code00", "apple code1", "APPLE CODE1", "pear code123", "nothing"]
)
async def test_queries_find_what_plain_python_finds(nodes: Running, words: str):
    answer = await query(nodes, words)
    expected = matching(words.lower().split())
    assert sorted(answer.rows) == sorted(as_wire(expected))
    assert answer.summary.matched == answer.summary.sent == len(expected)
    assert not expected or answer.names == ["kind", "code", "weight", "filler"]


@pytest.mark.parametrize("team", ["GREEN", "PINK"])
async def test_a_team_answers_for_its_half_only(nodes: Running, team: str):
    for _ in range(8):
        answer = await query(nodes, "plum code1", teams=[team])
        assert answer.rows == as_wire(matching(["plum", "code1"], (team,)))
        assert [part.team for part in answer.summary.parts] == [team]
        assert NODES[answer.summary.parts[0].node] == team


async def test_every_node_of_a_team_gets_work(nodes: Running):
    report = await client.ask_many(
        nodes.gateway, pb.QueryRequest(words=["code0001"]), count=60, concurrency=6, timeout_s=20
    )
    assert not report.errors
    assert {node for _, node in report.served} == set(NODES)
    assert all(NODES[node] == team for team, node in report.served)
    log = nodes.log("A").read_text()
    assert "Load-aware routing selected: " in log
    assert "for team GREEN" in log


async def test_the_aggregate_is_exact(nodes: Running):
    answer = await query(nodes, "code0", aggregate=True)
    groups: dict[str, list[int]] = {}
    for kind, _, weight, _ in matching(["code0"]):
        groups.setdefault(kind, []).append(weight)
    assert answer.rows == [
        (kind, len(weights), sum(weights) / len(weights))
        for kind, weights in sorted(groups.items())
    ]
    assert answer.names == ["kind", "count", "mean_weight"]


async def test_a_limit_is_kept_and_the_count_is_whole(nodes: Running):
    answer = await query(nodes, "apple", limit=7)
    assert len(answer.rows) == 7
    assert answer.summary.matched == len(matching(["apple"]))


async def test_get_status_and_the_segment_agree(nodes: Running):
    await query(nodes, "code00012")
    await nodes.idle()
    await asyncio.sleep(0.5)  # two heartbeats: memory and counters of all nodes are new
    for name, status in nodes.statuses().items():
        own = await client.node_status(nodes.cluster.endpoint(name), 5)
        assert (own.node, own.team, own.endpoint) == (status.node, status.group, status.endpoint)
        assert (own.pid, own.capacity) == (status.pid, status.capacity)
        assert (own.served, own.failed) == (status.served, status.failed)
        assert own.inflight == status.queue == 0
        assert pb.NodeState.Name(own.state) == f"NODE_STATE_{status.state.name}"
        assert own.memory_bytes == pytest.approx(status.memory_bytes, rel=0.1)
        assert own.rows == status.gauges["rows"] == ROWS // 2


async def test_a_running_query_is_seen_by_both(nodes: Running):
    async with held_query(nodes, teams=["PINK"]):
        await until(lambda: sum(nodes.queues().values()) == 1, lambda: str(nodes.queues()))
        name = next(name for name, queue in nodes.queues().items() if queue)
        status = nodes.statuses()[name]
        assert (NODES[name], status.state) == ("PINK", shmcoord.State.BUSY)
        own = await client.node_status(nodes.cluster.endpoint(name), 5)
        assert (own.inflight, own.state) == (1, pb.NODE_STATE_BUSY)
    await nodes.idle()


async def test_a_client_that_cancels_frees_every_node(nodes: Running):
    for _ in range(5):
        async with held_query(nodes):
            assert sum(nodes.queues().values()) == 2
        await nodes.idle()
    assert (await query(nodes, "code00012")).summary.matched == len(matching(["code00012"]))


async def test_queries_cancelled_at_any_moment_free_every_node(nodes: Running):
    request = pb.QueryRequest(words=["lorem", "code"], limit=500)
    for wait_ms in range(0, 60, 3):
        load = asyncio.create_task(
            client.ask_many(nodes.gateway, request, count=100, concurrency=4)
        )
        await asyncio.sleep(wait_ms / 1e3)
        load.cancel()
        with pytest.raises(asyncio.CancelledError):
            await load
    await nodes.idle()


async def test_a_client_that_is_killed_frees_every_node(nodes: Running):
    code = (
        "import sys, time, grpc\n"
        "from servers.pb import shmcoord_cluster_pb2 as pb, shmcoord_cluster_pb2_grpc as rpc\n"
        "channel = grpc.insecure_channel(sys.argv[1], [('grpc.http2.bdp_probe', 0)])\n"
        "call = rpc.GatewayStub(channel).Query(pb.QueryRequest())\n"
        "next(call)\n"
        "print('reading', flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, nodes.gateway], cwd=ROOT, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"reading\n"
        assert sum(nodes.queues().values()) == 2
        process.kill()
    await nodes.idle()


async def test_a_deadline_frees_every_node(nodes: Running):
    async with grpc.aio.insecure_channel(nodes.gateway, NOTHING_AHEAD) as channel:
        call = pb_grpc.GatewayStub(channel).Query(pb.QueryRequest(), timeout=0.6)
        assert (await call.read()).HasField("rows")
        assert sum(nodes.queues().values()) == 2
        await nodes.idle()
        assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_all_at_capacity_is_resource_exhausted(nodes: Running):
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(3 * 4):
            await stack.enter_async_context(held_query(nodes, teams=["PINK"]))
        assert [nodes.queues()[name] for name in "DEF"] == [4, 4, 4]
        async with grpc.aio.insecure_channel(nodes.gateway) as channel:
            request = pb.QueryRequest(words=["code00012"], teams=["PINK"])
            for _ in range(5):  # on a busy machine its own deadline may come before the status
                with pytest.raises(client.QueryError) as caught:
                    await client.ask(pb_grpc.GatewayStub(channel), request, 1.0)
                if caught.value.code is not grpc.StatusCode.DEADLINE_EXCEEDED:
                    break
        assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "team PINK" in str(caught.value)
        # The other team is free.
        assert (await query(nodes, "code00012", teams=["GREEN"])).summary.parts
    await nodes.idle()


async def test_a_killed_node_costs_nothing_but_itself(nodes: Running):
    nodes.kill("B")
    for _ in range(20):
        answer = await query(nodes, "plum code1")
        assert answer.summary.matched == len(matching(["plum", "code1"]))
        assert answer.summary.parts[0].node in "AC"
    assert nodes.statuses().get("B") is None or nodes.statuses()["B"].health is shmcoord.Health.DEAD
    await nodes.idle()
    nodes.start("B")
    assert nodes.statuses()["B"].health is shmcoord.Health.ALIVE
    served = {(await query(nodes, "code0001")).summary.parts[0].node for _ in range(40)}
    assert "B" in served


async def test_a_node_killed_at_work_ends_its_query_and_frees_the_rest(nodes: Running):
    async with held_query(nodes) as (call, chunks):
        busy = next(name for name, queue in nodes.queues().items() if queue and name in "DEF")
        nodes.kill(busy)
        with contextlib.suppress(grpc.aio.AioRpcError):
            async for _ in chunks:
                pass
        assert await call.code() is grpc.StatusCode.UNAVAILABLE
        assert "team PINK" in await call.details()
    await nodes.idle()
    assert (await query(nodes, "code00012")).summary.matched == len(matching(["code00012"]))
    # What the dead one held goes with its slot, which anybody may give back.
    with shmcoord.Segment.open(nodes.cluster.segment(busy)) as segment:
        await until(lambda: segment.reap() >= 0 and busy not in nodes.statuses())


async def test_a_gateway_killed_at_work_frees_every_node(nodes: Running):
    async with held_query(nodes):
        assert sum(nodes.queues().values()) == 2
        nodes.kill("A")
    await nodes.idle()
    nodes.start("A")
    assert (await query(nodes, "code00012")).summary.matched == len(matching(["code00012"]))


async def test_sigterm_drains_and_running_requests_finish(nodes: Running):
    async with held_query(nodes, teams=["PINK"]) as (call, chunks):
        name = next(name for name, queue in nodes.queues().items() if queue)
        process = nodes.processes[name]
        process.terminate()
        await until(lambda: nodes.statuses()[name].state is shmcoord.State.DRAINING)
        async with grpc.aio.insecure_channel(nodes.cluster.endpoint(name)) as channel:
            health = await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service="shmcoord.cluster.v1.Node"), timeout=5
            )
            assert health.status == health_pb2.HealthCheckResponse.NOT_SERVING
            # What comes without a lease is not taken any more.
            with pytest.raises(grpc.aio.AioRpcError, match="draining"):
                await pb_grpc.NodeStub(channel).Answer(pb.PartRequest(), timeout=5).read()
        own = await client.node_status(nodes.cluster.endpoint(name), 5)
        assert own.state == pb.NODE_STATE_DRAINING
        for _ in range(10):
            answer = await query(nodes, "code00012", teams=["PINK"])
            assert answer.summary.parts[0].node != name
        assert process.poll() is None
        rest = [chunk async for chunk in chunks]
        assert await call.code() is grpc.StatusCode.OK
        assert rest[-1].summary.matched == rest[-1].summary.sent == ROWS // 2
    await until(lambda: process.poll() is not None)
    assert process.returncode == 0
    assert name not in nodes.statuses()


async def test_the_grace_period_ends_what_does_not_finish(folder: Path):
    running = Running(write_config(folder, {"A": "GREEN"}, secret=False, grace_s=0.5))
    try:
        running.start("A")
        channel = grpc.aio.insecure_channel(running.gateway, NOTHING_AHEAD)
        async with held_query(running) as (call, chunks), channel:
            part = pb_grpc.NodeStub(channel).Answer(pb.PartRequest(), timeout=20)
            of_part = part.__aiter__()
            await of_part.__anext__()
            begun = time.monotonic()
            running.processes["A"].terminate()
            await until(lambda: running.processes["A"].poll() is not None)
            assert time.monotonic() - begun < 5
            for ended, rest in ((call, chunks), (part, of_part)):
                with contextlib.suppress(grpc.aio.AioRpcError):
                    async for _ in rest:
                        pass
                assert await ended.code() is grpc.StatusCode.UNAVAILABLE
        # A shutdown by a call is off where the configuration has no secret.
        running.start("A")
        with pytest.raises(client.QueryError) as refused:
            await client.shut_down(running.gateway, "", 5)
        assert refused.value.code is grpc.StatusCode.UNIMPLEMENTED
    finally:
        codes = running.stop()
    assert codes == {"A": 0}


async def test_the_shutdown_call_needs_the_secret(nodes: Running):
    endpoint = nodes.cluster.endpoint("F")
    for wrong in ("", "wrong", SECRET + "x", "é"):
        with pytest.raises(client.QueryError) as refused:
            await client.shut_down(endpoint, wrong, 5)
        assert refused.value.code is grpc.StatusCode.PERMISSION_DENIED
    assert nodes.processes["F"].poll() is None
    await client.shut_down(endpoint, SECRET, 5)
    await until(lambda: nodes.processes["F"].poll() is not None)
    assert nodes.processes["F"].returncode == 0


async def test_health_and_reflection_are_served(nodes: Running):
    async with grpc.aio.insecure_channel(nodes.gateway) as channel:
        for service in ("", "shmcoord.cluster.v1.Node", "shmcoord.cluster.v1.Gateway"):
            answer = await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=service), timeout=5
            )
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(timeout=5)
        await call.write(reflection_pb2.ServerReflectionRequest(list_services="*"))
        listed = {item.name for item in (await call.read()).list_services_response.service}
        await call.done_writing()
        call.cancel()
    assert {
        "shmcoord.cluster.v1.Node",
        "shmcoord.cluster.v1.Gateway",
        "grpc.health.v1.Health",
    } <= listed


async def test_a_part_needs_no_lease_but_a_lease_must_be_held(nodes: Running):
    async with grpc.aio.insecure_channel(nodes.cluster.endpoint("E")) as channel:
        stub = pb_grpc.NodeStub(channel)
        chunks = [chunk async for chunk in stub.Answer(pb.PartRequest(words=["code00"]))]
        assert chunks[-1].summary.node == "E"
        with shmcoord.Router(nodes.cluster.segment("E")) as router:
            lease = router.acquire("PINK")
            token = lease.token
            endpoint = lease.endpoint
            lease.release()
        async with grpc.aio.insecure_channel(endpoint) as other:
            call = pb_grpc.NodeStub(other).Answer(
                pb.PartRequest(), metadata=((LEASE_KEY, token),), timeout=5
            )
            assert await call.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert LEASE_LOST_KEY in dict(await call.trailing_metadata())
        call = stub.Answer(pb.PartRequest(), metadata=((LEASE_KEY, "nonsense"),), timeout=5)
        assert await call.code() in (
            grpc.StatusCode.INVALID_ARGUMENT,
            grpc.StatusCode.FAILED_PRECONDITION,
        )
    await nodes.idle()


def run(*arguments: str | Path, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "servers", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def test_a_port_that_is_taken_is_an_error(nodes: Running):
    result = run("node", "B", "--config", nodes.file)
    assert result.returncode == 1
    assert nodes.cluster.endpoint("B") in result.stderr
    assert "taken" in result.stderr
    assert "Traceback" not in result.stderr
    assert nodes.statuses()["B"].pid == nodes.processes["B"].pid


def test_a_name_that_lives_already_is_an_error(nodes: Running, folder: Path):
    text = nodes.file.read_text()
    other = folder / "other.toml"
    port = nodes.cluster.nodes["B"].port
    other.write_text(text.replace(f"port = {port}", f"port = {free_ports(1)[0]}"))
    result = run("node", "B", "--config", other)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert nodes.statuses()["B"].pid == nodes.processes["B"].pid


def test_the_query_command_prints_rows_and_who_served(nodes: Running):
    result = run("query", "--server", nodes.gateway, "--query", "apple code0001", "--count", "5")
    assert result.returncode == 0, result.stderr
    assert "code0001" in result.stdout
    for word in ("Served by", "GREEN", "PINK", "p50", "p90", "p99", "5 answered"):
        assert word in result.stdout


def test_the_status_command_says_who_does_not_answer(nodes: Running):
    assert run("status", "--config", nodes.file).returncode == 0
    nodes.kill("D")
    result = run("status", "--config", nodes.file)
    assert result.returncode == 1
    assert "UNAVAILABLE" in result.stdout


@contextlib.contextmanager
def up(file: Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, int]]]:
    """`up` of a small cluster, once it is ready; gives it and the pids of its nodes."""
    with subprocess.Popen(
        [sys.executable, "-m", "servers", "up", "--config", str(file)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            lines = []
            for line in process.stdout:
                lines.append(line)
                if line.startswith("Ready"):
                    break
            else:
                pytest.fail("".join(lines))
            statuses = Running(file).statuses()
            yield process, {name: status.pid for name, status in statuses.items()}
        finally:
            if process.poll() is None:
                process.kill()
            if not process.stdout.closed:
                process.stdout.read()


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.fixture
def small(folder: Path) -> Iterator[Path]:
    file = write_config(folder, {"A": "GREEN", "E": "PINK"}, secret=False)
    yield file
    Running(file).unlink()


def test_up_stops_everything_on_ctrl_c(small: Path):
    with up(small) as (process, pids):
        assert set(pids) == {"A", "E"}
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert "All nodes have ended." in process.stdout.read()
        assert process.wait(10) == 0
    assert all(gone(pid) for pid in pids.values())
    assert not set(config.load(small).segments) & set(os.listdir("/dev/shm"))


def test_up_goes_on_when_a_node_dies_and_fails_in_the_end(small: Path):
    with up(small) as (process, pids):
        os.kill(pids["E"], signal.SIGKILL)
        assert process.stdout is not None
        for line in process.stdout:
            if "node E ended: killed by SIGKILL; the others go on" in line:
                break
        else:
            pytest.fail("nothing was said")
        cluster = config.load(small)
        gateway = cluster.endpoint(cluster.leader)
        assert run("query", "--server", gateway, "--team", "GREEN").returncode == 0
        os.kill(pids["A"], signal.SIGKILL)
        assert "nobody is left" in process.stdout.read()
        assert process.wait(10) == 1
    assert all(gone(pid) for pid in pids.values())
    assert not set(config.load(small).segments) & set(os.listdir("/dev/shm"))


async def test_nodes_end_with_a_supervisor_that_is_killed(small: Path):
    with up(small) as (process, pids):
        process.kill()
        process.wait()
        await until(lambda: all(gone(pid) for pid in pids.values()))


def test_up_survives_its_reader(small: Path):
    with up(small) as (process, pids):
        assert process.stdout is not None
        process.stdout.close()
        os.kill(pids["E"], signal.SIGKILL)  # something to say
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 1
    assert all(gone(pid) for pid in pids.values())
    assert not set(config.load(small).segments) & set(os.listdir("/dev/shm"))


def test_up_says_which_port_is_taken(small: Path):
    cluster = config.load(small)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", cluster.nodes["E"].port))
        taken.listen()
        result = run("up", "--config", small)
    assert result.returncode == 1
    assert f"cannot listen on {cluster.endpoint('E')}" in result.stdout
    assert "Traceback" not in result.stdout
    assert not set(cluster.segments) & set(os.listdir("/dev/shm"))


def test_the_demo_ends_well_and_leaves_nothing(small: Path):
    result = run("demo", "--config", small)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Nothing is left" in result.stdout
    assert not set(config.load(small).segments) & set(os.listdir("/dev/shm"))


def test_an_interrupted_demo_leaves_nothing(small: Path):
    with subprocess.Popen(
        [sys.executable, "-m", "servers", "demo", "--config", str(small)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell's background job has SIGINT ignored, and hands that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "Free words" in line:
                process.send_signal(signal.SIGINT)
                break
        assert "Interrupted." in process.stdout.read()
        assert process.wait(20) == 130
    assert not set(config.load(small).segments) & set(os.listdir("/dev/shm"))
