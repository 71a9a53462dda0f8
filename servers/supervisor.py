"""Starts the nodes of a cluster as processes, watches them, and stops them in order."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

import shmcoord
from servers.config import Cluster
from servers.links import links_of

ROOT = Path(__file__).resolve().parents[1]

# A node that is told to end has its grace period and this, in seconds, before it is killed.
_STOP_MARGIN_S = 5.0
# The name under which the bridge's log is told, and how long it rests before it is started again:
# at first, and at most, in seconds.
BRIDGE = "bridge"
_BRIDGE_PAUSE_S = (0.1, 2.0)
# The longest line of a log that is kept whole, in bytes.
_LINE_BYTES = 1 << 20
# A node is asked again soon after it refused a connection, since it is just starting.
_PROBE_OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 200),
]


class NodeDiedError(Exception):
    """A process ended although nobody asked it to."""

    def __init__(self, what: str, how: str, name: str = "") -> None:
        super().__init__(f"{what} ended: {how}")
        self.name = name


class Supervisor:
    """The processes of one cluster; leaving the `async with` stops them all.

    Args:
        cluster: which nodes to start.
        arguments: options for each `python -m servers node`, so that it reads the same cluster.
        on_line: called with a node's name and each line of its log.
        host: start only the nodes of this host, and its bridge.
    """

    def __init__(
        self,
        cluster: Cluster,
        arguments: Sequence[str],
        on_line: Callable[[str, str], None],
        host: str | None = None,
    ) -> None:
        self._cluster = cluster
        self._links = links_of(cluster)
        self._arguments = list(arguments)
        self._on_line = on_line
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._readers: list[asyncio.Task[None]] = []
        self._host = host
        self._bridge: asyncio.subprocess.Process | None = None
        self._bridging: asyncio.Task[None] | None = None

    @property
    def pids(self) -> dict[str, int]:
        """The process of each node."""
        return {name: process.pid for name, process in self._processes.items()}

    async def __aenter__(self) -> "Supervisor":
        try:
            if self._host is not None and self._cluster.has_bridges:
                self._bridging = asyncio.create_task(self._keep_bridge(self._host))
            for name in self._cluster.nodes_of(self._host):
                await self._start(name)
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _start(self, name: str) -> None:
        process = self._processes[name] = await self._run("node", name)
        self._readers.append(asyncio.create_task(self._read(name, process)))

    async def _keep_bridge(self, host: str) -> None:
        """Run the bridge of the host, and start it again whenever it dies."""
        pause_s = _BRIDGE_PAUSE_S[0]
        while True:
            begun = asyncio.get_running_loop().time()
            self._bridge = await self._run("bridge", host)
            await self._read(BRIDGE, self._bridge)
            code = await self._bridge.wait()
            if asyncio.get_running_loop().time() - begun > _BRIDGE_PAUSE_S[1]:
                pause_s = _BRIDGE_PAUSE_S[0]
            self._on_line(BRIDGE, f"[{BRIDGE}] ended: {_how(code)}; it is started again")
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _BRIDGE_PAUSE_S[1])

    async def _run(self, *command: str) -> asyncio.subprocess.Process:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "servers",
            *command,
            *self._arguments,
            f"--die-with={os.getpid()}",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": path},
            limit=_LINE_BYTES,
            # Ctrl-C in the terminal is for the supervisor, which stops the nodes in order.
            start_new_session=True,
        )

    async def _read(self, name: str, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while True:
            try:
                line = await process.stdout.readline()
            except ValueError:  # longer than is kept
                continue
            if not line:
                return
            self._on_line(name, line.decode(errors="replace").rstrip("\n"))

    async def ready(self, timeout_s: float = 60.0) -> None:
        """Returns when every node is healthy.

        Raises:
            NodeDiedError: one ended instead.
            TimeoutError: it took longer than `timeout_s`.
        """
        probes = asyncio.ensure_future(self._all_healthy())
        death = asyncio.ensure_future(self.died())
        try:
            await asyncio.wait(
                (probes, death), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if death.done():
                raise death.result()
            if not probes.done():
                raise TimeoutError(f"the nodes were not ready after {timeout_s:g} s")
            probes.result()
        finally:
            for task in (probes, death):
                task.cancel()
            await asyncio.gather(probes, death, return_exceptions=True)

    async def _all_healthy(self) -> None:
        await asyncio.gather(*(self._healthy(name) for name in self._processes))

    async def _healthy(self, name: str) -> None:
        endpoint = self._cluster.endpoint(name)
        async with self._links.channel(endpoint, _PROBE_OPTIONS) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            serving = health_pb2.HealthCheckResponse.SERVING
            while True:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    answer = await stub.Check(  # type: ignore[attr-defined]
                        health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=60.0
                    )
                    if answer.status == serving and self._has_joined(name):
                        return
                await asyncio.sleep(0.02)  # somebody serves there, but not yet, or not he

    def _has_joined(self, name: str) -> bool:
        """Whether the process that we started is the node, not another that has its port."""
        with (
            contextlib.suppress(shmcoord.ShmcoordError),
            shmcoord.Segment.attach(self._cluster.segment(name)) as segment,
        ):
            return segment.status(name).pid == self._processes[name].pid
        return False

    async def died(self, known: Collection[str] = ()) -> NodeDiedError:
        """Waits until any node but those `known` has ended; says which, and how."""
        waits = {
            asyncio.create_task(process.wait()): name
            for name, process in self._processes.items()
            if name not in known
        }
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            task = next(iter(done))
            name = waits[task]
            return NodeDiedError(f"node {name}", _how(task.result()), name)
        finally:
            for task in waits:
                task.cancel()

    def signal(self, name: str, number: signal.Signals) -> None:
        """Sends a signal to a node that still runs."""
        with contextlib.suppress(ProcessLookupError):
            self._processes[name].send_signal(number)

    async def stop(self) -> dict[str, int]:
        """Drains and ends all nodes, the gateway first, so that its queries can still finish.

        The bridge goes last: what it tells the others is who has gone.

        Returns:
            The exit code of each node; negative for a signal.
        """
        leader = self._cluster.leader
        await self._end([name for name in self._processes if name == leader])
        await self._end([name for name in self._processes if name != leader])
        await asyncio.gather(*self._readers)
        await self._end_bridge()
        return {name: process.returncode or 0 for name, process in self._processes.items()}

    async def _end_bridge(self) -> None:
        task, self._bridging = self._bridging, None
        if task is None:
            return
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        if self._bridge is not None and self._bridge.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._bridge.terminate()
            try:
                await asyncio.wait_for(self._bridge.wait(), _STOP_MARGIN_S)
            except asyncio.TimeoutError:
                self._bridge.kill()
                await self._bridge.wait()

    def hurry(self) -> None:
        """Ends the grace period of the nodes that are draining."""
        for name, process in self._processes.items():
            if process.returncode is None:
                self.signal(name, signal.SIGTERM)

    async def _end(self, names: Sequence[str]) -> None:
        waits = []
        for name in names:
            if self._processes[name].returncode is None:
                self.signal(name, signal.SIGTERM)
            waits.append(asyncio.create_task(self._processes[name].wait()))
        if not waits:
            return
        limit_s = self._cluster.cluster.grace_s + _STOP_MARGIN_S
        _, late = await asyncio.wait(waits, timeout=limit_s)
        if late:
            for name in names:
                self.signal(name, signal.SIGKILL)
            await asyncio.wait(late)


def unlink_segments(cluster: Cluster, host: str | None = None) -> list[str]:
    """Removes the cluster's segments unless somebody lives in them; returns those that stay.

    With a host, its own segment and its mirrors.
    """
    kept = []
    for name in cluster.segments if host is None else cluster.segments_at(host):
        try:
            with shmcoord.Segment.attach(name) as segment:
                alive = any(
                    status.health is not shmcoord.Health.DEAD for status in segment.snapshot()
                )
            if alive:
                kept.append(name)
            else:
                shmcoord.Segment.unlink(name)
        except shmcoord.SegmentNotFound:
            continue
        except shmcoord.ShmcoordError:
            kept.append(name)
    return kept


def _how(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(-code).name}"
    return f"killed by signal {-code}"
