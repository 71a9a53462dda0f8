"""`python -m servers demo`: the whole cluster at work, once, from start to clean end."""

import asyncio
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

import shmcoord
from servers import client, view
from servers.config import Cluster, ConfigError
from servers.links import is_taken, links_of
from servers.pb import shmcoord_cluster_pb2 as pb
from servers.supervisor import NodeDiedError, Supervisor, unlink_segments

if TYPE_CHECKING:
    from servers.cli import Loader

# (what it shows, the words, other settings)
_QUERIES: tuple[tuple[str, str, dict[str, object]], ...] = (
    ("Free words, both teams", "ua sfo", {"limit": 5}),
    ("One team only", "jfk lax n3", {"limit": 5, "teams": ["PINK"]}),
    ("Count and mean delay by carrier", "", {"aggregate": True}),
)
_MANY = 120
_AT_ONCE = 10


async def run_demo(loader: "Loader", console: Console) -> int:
    """Runs the demo; returns the exit code."""
    begun = time.monotonic()
    cluster = _free_cluster(loader, console)
    show = _Stage(console, cluster)
    try:
        async with Supervisor(cluster, loader.arguments(), show.line) as nodes:
            with show.part("Six nodes start, each a process of its own", logs=True):
                await nodes.ready()
            pids = nodes.pids
            await _ask_one_by_one(cluster, show)
            await _ask_many(cluster, show)
            with show.part("The nodes' own answers, by RPC"):
                await _show_status(cluster, console)
            with show.part("What the segments say while queries go on: shmcoord inspect"):
                await _inspect_under_load(cluster, console)
            with show.part("Stopping: drain, finish, leave", logs=True):
                codes = await nodes.stop()
    except (NodeDiedError, TimeoutError, client.QueryError) as error:
        console.print(Text(f"Error: {error}", style="bold red"), soft_wrap=True)
        for name, line in show.last:
            view.show_log(console, line, show.styles[name])
        codes, pids = {"demo": 1}, {}
    finally:
        unlink_segments(cluster)  # also after Ctrl-C, and when nobody reads on
    left = [
        *_left_over(cluster, pids),
        *(f"{name}: exit {code}" for name, code in codes.items() if code),
    ]
    for fault in left:
        console.print(Text(fault, style="bold red"), soft_wrap=True)
    if left or show.failed:
        return 1
    console.print(
        Text(
            f"Nothing is left: no process, no segment. {time.monotonic() - begun:.1f} s in all.",
            style="bold green",
        )
    )
    return 0


class _Stage:
    """What the audience sees; logs of the nodes are shown only while they say something."""

    def __init__(self, console: Console, cluster: Cluster) -> None:
        self.console = console
        self.styles = view.node_styles(cluster)
        self.decisions: list[list[str]] = []
        self.last: list[tuple[str, str]] = []
        self.failed = False
        self._leader = cluster.leader
        self._logs = False

    def line(self, name: str, line: str) -> None:
        self.last = [*self.last[-20:], (name, line)]
        message = line.partition("] ")[2]
        if name == self._leader and " selected: " in message:
            self.decisions.append([line])
        elif self.decisions and name == self._leader and message.startswith("  "):
            self.decisions[-1].append(line)
        if self._logs:
            view.show_log(self.console, line, self.styles[name])

    @contextmanager
    def part(self, title: str, *, logs: bool = False) -> Iterator[None]:
        """Shows a headline, and the nodes' logs below it if asked to."""
        self.console.print()
        self.console.print(Text(f"━━ {title} ━━", style="bold"))
        self._logs = logs
        try:
            yield
        finally:
            self._logs = False

    def show_decisions(self, decisions: list[list[str]]) -> None:
        for decision in decisions:
            for line in decision:
                view.show_log(self.console, line, self.styles[self._leader])


async def _ask_one_by_one(cluster: Cluster, show: _Stage) -> None:
    gateway = cluster.endpoint(cluster.leader)
    for title, words, settings in _QUERIES:
        with show.part(f"{title}: {words!r}" if words else title, logs=True):
            request = pb.QueryRequest(words=words.split(), **settings)  # type: ignore[arg-type]
            report = await client.ask_many(
                gateway, request, timeout_s=20.0, links=links_of(cluster)
            )
            await asyncio.sleep(0.05)  # the gateway's log lines come by another way
            if report.first is None:
                show.failed = True
                view.show_errors(show.console, report)
                continue
            view.show_rows(show.console, report.first)
            view.show_summary(show.console, report.first, request.aggregate)


async def _ask_many(cluster: Cluster, show: _Stage) -> None:
    with show.part(f"{_MANY} queries, {_AT_ONCE} at once: the load spreads"):
        before = len(show.decisions)
        request = pb.QueryRequest(words=["ord"], limit=50)
        report = await client.ask_many(
            cluster.endpoint(cluster.leader),
            request,
            count=_MANY,
            concurrency=_AT_ONCE,
            timeout_s=20.0,
            links=links_of(cluster),
        )
        await asyncio.sleep(0.05)
        view.show_report(show.console, report)
        view.show_errors(show.console, report)
        show.failed = show.failed or bool(report.errors)
    with show.part("Some of the routing decisions under that load"):
        busy = [d for d in show.decisions[before:] if any("BUSY" in line for line in d)]
        chosen = busy or show.decisions[before:]
        show.show_decisions(chosen[:: max(1, len(chosen) // 4)][:4])


async def _show_status(cluster: Cluster, console: Console) -> None:
    statuses: dict[str, pb.NodeStatus | str] = {}
    for name in cluster.nodes:
        statuses[name] = await client.node_status(cluster.endpoint(name), 5.0, links_of(cluster))
    view.show_status(console, cluster, statuses)


async def _inspect_under_load(cluster: Cluster, console: Console) -> None:
    request = pb.QueryRequest(words=["ord"], limit=50)
    load = asyncio.create_task(
        client.ask_many(
            cluster.endpoint(cluster.leader),
            request,
            count=100_000,
            concurrency=_AT_ONCE,
            links=links_of(cluster),
        )
    )
    try:
        await _inspect(cluster, console)
    finally:
        load.cancel()
        await asyncio.wait([load])


async def _inspect(cluster: Cluster, console: Console) -> None:
    """The command that users have, in a process of its own, as they would run it."""
    code = "import sys; from shmcoord.cli import main; sys.exit(main())"
    colours = {"FORCE_COLOR": "1"} if console.is_terminal else {}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        code,
        "inspect",
        *cluster.segments,
        env={**os.environ, **colours},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    console.print(Text.from_ansi(output.decode(errors="replace")), soft_wrap=True)
    if process.returncode:
        raise NodeDiedError("shmcoord inspect", f"exit code {process.returncode}")


def _free_cluster(loader: "Loader", console: Console) -> Cluster:
    """The cluster as configured, or beside it if its ports or segments are in use."""
    cluster = loader.load()
    if cluster.has_bridges:
        problem = "hosts: the demo runs on one machine, and these have bridges; use `up` on each"
        raise ConfigError("demo", [problem])
    if loader.overridden:
        return cluster
    busy = [name for name in cluster.nodes if _port_taken(cluster, name)]
    taken = [segment for segment in cluster.segments if segment in shmcoord.segments()]
    if not busy and not taken:
        return cluster
    cluster = loader.load(base_port=_free_base(len(cluster.nodes)), suffix=f".demo{os.getpid()}")
    console.print(
        Text(
            "The usual ports or segments are in use; the demo runs beside them, "
            f"the gateway at {cluster.endpoint(cluster.leader)}.",
            style="yellow",
        ),
        soft_wrap=True,
    )
    return cluster


def _port_taken(cluster: Cluster, name: str) -> bool:
    settings = cluster.nodes[name]
    if settings.socket is not None:
        return is_taken(cluster.folder / settings.socket)
    address = cluster.hosts[settings.host].address
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, settings.port))
        except OSError:
            return True
    return False


def _free_base(count: int) -> int:
    """The first of `count` ports in a row that nobody uses just now."""
    for base in range(20_000 + os.getpid() % 10_000, 60_000, count):
        with _Held() as held:
            if all(held.take(port) for port in range(base, base + count)):
                return base
    raise TimeoutError("no free ports")


class _Held:
    """Ports that are held only to see that they are free."""

    def __enter__(self) -> "_Held":
        self._sockets: list[socket.socket] = []
        return self

    def take(self, port: int) -> bool:
        taken = socket.socket()
        self._sockets.append(taken)
        try:
            taken.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True

    def __exit__(self, *_: object) -> None:
        for held in self._sockets:
            held.close()


def _left_over(cluster: Cluster, pids: dict[str, int]) -> Iterator[str]:
    for name, pid in pids.items():
        if os.path.exists(f"/proc/{pid}"):
            yield f"left over: the process {pid} of node {name}"
    for segment in cluster.segments:
        if segment in shmcoord.segments():
            yield f"left over: the segment {segment}"
