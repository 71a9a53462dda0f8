"""What the tests of the cluster share: its data, its configuration, its processes."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from helpers import Raw

import shmcoord
from servers import client, config
from servers.links import links_of
from servers.pb import shmcoord_cluster_pb2 as pb
from servers.pb import shmcoord_cluster_pb2_grpc as pb_grpc

ROOT = Path(__file__).resolve().parents[1]
NODES = {"A": "GREEN", "B": "GREEN", "C": "GREEN", "D": "PINK", "E": "PINK", "F": "PINK"}
SECRET = "only-for-this-test-0123"
# Rows are long enough that a query for all of them does not fit into the buffers of gRPC: it
# runs for as long as the client does not read on.
ROWS, FILLER = 24_000, "lorem ipsum " * 30
# A client that takes in no more than it reads.
NOTHING_AHEAD = [("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1)]


def csv_text() -> list[tuple[str, str, int, str]]:
    kinds = random.Random(7)
    return [
        (
            kinds.choice(["apple", "pear", "plum"]),
            f"code{number:05d}" if kinds.random() < 0.9 else "NA",
            number % 97 - 20,
            FILLER,
        )
        for number in range(ROWS)
    ]


TABLE = csv_text()
HALVES = {"GREEN": TABLE[: ROWS // 2], "PINK": TABLE[ROWS // 2 :]}


def matching(words: list[str], teams: tuple[str, ...] = ("GREEN", "PINK")) -> list[tuple]:
    return [
        row
        for team in teams
        for row in HALVES[team]
        if all(any(word in str(cell) for cell in (row[0], row[1], row[3])) for word in words)
    ]


def write_rows(folder: Path, more: Iterable[tuple[str, str, int, str]] = ()) -> None:
    """The table as the CSV file that `write_config` names, with further rows at its end."""
    with (folder / "rows.csv").open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["kind", "code", "weight", "filler"])
        writer.writerows([*TABLE, *more])


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def write_config(
    folder: Path,
    nodes: dict[str, str],
    *,
    secret: bool,
    grace_s: float = 8.0,
    timeout_s: float = 20.0,
    sockets: Mapping[str, str] = MappingProxyType({}),
    cluster: Iterable[str] = (),
    more: Iterable[str] = (),
) -> Path:
    """A cluster like the delivered one, with names and ports of its own.

    Args:
        folder: where `write_rows` has written.
        nodes: the team of each.
        secret: whether nodes can be ended by a call.
        grace_s: seconds for running requests.
        timeout_s: seconds for queries whose client sets no deadline.
        sockets: nodes that listen on a Unix socket instead of a port.
        cluster: further lines for [cluster].
        more: further lines at the end.
    """
    unique = f"{os.getpid()}_{random.randrange(1 << 32):08x}"
    hosts = {name: "host1" if name in "ABD" else "host2" for name in nodes}
    lines = [f"teams = {list(dict.fromkeys(nodes.values()))}", "[cluster]", "heartbeat_s = 0.2"]
    lines += [f"grace_s = {grace_s}", f"timeout_s = {timeout_s}"]
    lines += [f'shutdown_secret = "{SECRET}"'] * secret
    lines += cluster
    lines += ["[data]", f'file = "{folder / "rows.csv"}"', 'nulls = ["", "NA"]']
    lines += ['group_by = "kind"', 'mean = "weight"']
    for host in dict.fromkeys(hosts.values()):
        lines += [f"[hosts.{host}]", f'segment = "test_{host}_{unique}"']
    for (name, team), port in zip(nodes.items(), free_ports(len(nodes)), strict=True):
        role = "leader" if name == "A" else "worker"
        lines += [f"[nodes.{name}]", f'host = "{hosts[name]}"', f'role = "{role}"']
        socket_ = sockets.get(name)
        lines += [f'socket = "{socket_}"' if socket_ else f"port = {port}", f'team = "{team}"']
    lines += more
    path = folder / f"cluster_{unique}.toml"
    path.write_text("\n".join(lines))
    return path


# A node whose log lines end in the moment (monotonic seconds) at which they were written.
STAMPED = """
import logging, time
class Stamped(logging.LogRecord):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.stamp = time.monotonic()
    def getMessage(self):
        return f"{super().getMessage()} @{self.stamp:.6f}"
logging.setLogRecordFactory(Stamped)
"""
MAIN = """
from servers.__main__ import _main
_main()
"""


class Running:
    """Node processes of one configuration.

    Args:
        file: the configuration.
        stamped: whether log lines say when they were written.
        before: code that each node runs first, to go without a protection.
    """

    def __init__(self, file: Path, *, stamped: bool = False, before: str = "") -> None:
        self.file = file
        self.command = ("-c", STAMPED * stamped + before + MAIN)
        self.cluster = config.load(file)
        self.links = links_of(self.cluster)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, *names: str) -> None:
        for name in names:
            with self.log(name).open("ab") as log:
                self.processes[name] = subprocess.Popen(
                    [sys.executable, *self.command, "node", name, "--config", str(self.file)],
                    cwd=ROOT,
                    stdout=log,
                    stderr=log,
                )
        for name in names:
            options = [("grpc.initial_reconnect_backoff_ms", 50)]
            options += [("grpc.max_reconnect_backoff_ms", 100)]
            deadline = time.monotonic() + 40
            with self._sync_channel(self.cluster.endpoint(name), options) as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                while True:
                    assert self.processes[name].poll() is None, self.log(name).read_text()
                    assert time.monotonic() < deadline, self.log(name).read_text()
                    with contextlib.suppress(grpc.RpcError):
                        answer = stub.Check(
                            health_pb2.HealthCheckRequest(), timeout=0.5, wait_for_ready=True
                        )
                        if answer.status == health_pb2.HealthCheckResponse.SERVING:
                            break

    def _sync_channel(self, endpoint: str, options: list[tuple[str, object]]) -> grpc.Channel:
        if self.links.credentials is None:
            return grpc.insecure_channel(endpoint, options)
        return grpc.secure_channel(
            endpoint, self.links.credentials, [*options, *self.links.options]
        )

    def log(self, name: str) -> Path:
        return self.file.with_suffix(f".{name}.log")

    def kill(self, name: str) -> None:
        self.processes[name].kill()
        self.processes[name].wait()

    def end(self, name: str) -> int:
        """SIGTERM, and wait until it has drained; its exit code."""
        self.processes[name].terminate()
        return self.processes[name].wait(20)

    def stop(self) -> dict[str, int]:
        for process in self.processes.values():
            if process.poll() is None:
                process.terminate()
        try:
            return {name: process.wait(20) for name, process in self.processes.items()}
        finally:
            for process in self.processes.values():
                if process.poll() is None:
                    process.kill()
                    process.wait()
            self.unlink()

    def unlink(self) -> None:
        for name in self.cluster.segments:
            with contextlib.suppress(shmcoord.SegmentNotFound):
                shmcoord.Segment.unlink(name)

    @property
    def gateway(self) -> str:
        return self.cluster.endpoint("A")

    def statuses(self) -> dict[str, shmcoord.Status]:
        found = {}
        for name in self.cluster.segments:
            with shmcoord.Segment.attach(name) as segment:
                found.update({status.node: status for status in segment.snapshot()})
        return found

    def queues(self) -> dict[str, int]:
        return {name: status.queue for name, status in self.statuses().items()}

    def decisions(self) -> list[tuple[float, str, str]]:
        """What the gateway decided: (moment, node, team). For stamped logs only."""
        found = re.findall(
            r"selected: (\S+) for team (\S+) @([0-9.]+)$", self.log("A").read_text(), re.MULTILINE
        )
        return [(float(moment), node, team) for node, team, moment in found]

    def cells(self, *, without: str = "") -> int:
        """Lease cells that are taken, in all segments, perhaps without those of one node."""
        taken = 0
        for name in self.cluster.segments:
            raw = Raw(name)
            for slot in range(raw.slots):
                owner = raw.read(raw.offset("meta", "name", slot), 64).partition(b"\0")[0].decode()
                if not (without and owner == without):
                    taken += sum(cell != 0 for cell in raw.cells(slot))
        return taken

    async def idle(self) -> None:
        """Waits until no living node holds anything."""

        def held() -> dict[str, int]:
            statuses = self.statuses().values()
            alive = [s for s in statuses if s.health is not shmcoord.Health.DEAD]
            return {status.node: status.queue for status in alive if status.queue}

        await until(lambda: not held(), lambda: str(held()))


async def until(condition, describe=lambda: "", timeout_s: float = 10.0) -> None:
    ends = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < ends, describe()
        await asyncio.sleep(0.02)


async def query(running: Running, text: str = "", **settings: object) -> client.Answer:
    async with running.links.channel(running.gateway) as channel:
        request = pb.QueryRequest(words=text.split(), **settings)
        return await client.ask(pb_grpc.GatewayStub(channel), request, 20.0)


@contextlib.asynccontextmanager
async def held_query(
    running: Running, **settings: object
) -> AsyncIterator[tuple[grpc.aio.UnaryStreamCall, AsyncIterator[pb.QueryChunk]]]:
    """A query for everything whose client reads one chunk and no more: (call, the rest)."""
    async with running.links.channel(running.gateway, NOTHING_AHEAD) as channel:
        call = pb_grpc.GatewayStub(channel).Query(pb.QueryRequest(**settings), timeout=30)
        chunks = call.__aiter__()
        await chunks.__anext__()
        yield call, chunks
        call.cancel()


class Teams(dict[str, SimpleNamespace]):
    """Stubs for GREEN and PINK in the place of real ones: their `Answer` is a generator of chunks.

    Args:
        answer: called with the team, the request and the time-out in seconds.
    """

    def __init__(
        self, answer: Callable[[str, pb.PartRequest, float | None], AsyncIterator[pb.PartChunk]]
    ) -> None:
        for team in ("GREEN", "PINK"):
            self[team] = SimpleNamespace(
                Answer=lambda request, *, timeout=None, team=team: answer(team, request, timeout)
            )


def server_of(segment: str) -> shmcoord.grpc.aio.AioServer:
    """A server as the leader of a cluster has it."""
    return shmcoord.grpc.aio.server(
        node="A", segment=segment, group="GREEN", exclude=["/shmcoord.cluster.v1.Gateway/"]
    )
