"""One cell of the matrix: starts a system, sends it a trace, stops it, tells what was measured."""

from __future__ import annotations

import contextlib
import multiprocessing.context
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import forkserver
from typing import Any

import numpy as np
from numpy.typing import NDArray

import shmcoord
from bench.children import new_folder
from bench.tail import llm_node, llm_router
from bench.tail.clients import ClientSettings
from bench.tail.clock import sleep_until
from bench.tail.cpu import cpu_s, machine_busy_s
from bench.tail.node import NodeSettings, run_node
from bench.tail.proxies import find, free_port, haproxy_config, nginx_config, running
from bench.tail.router import RouterSettings, run_router
from bench.tail.systems import SYSTEMS, System
from bench.tail.trace import NODES, SHAPES

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0
PATIENCE_S = 30.0
"""How long a request may take where there is no overload."""
OVERLOAD_DEADLINE_S = 0.5
"""In overload: an answer that comes later than this after the arrival counts for nothing."""
OVERLOAD_QUEUE_S = 0.35
"""In overload: who could not be handed to a node for so long is refused."""
OVERLOAD_WAITERS = 120
"""In overload: so many may wait for a node in all routers together; the next is refused at once.
The nodes do about 600 requests in a second, so that the last of them waits about 0.2 s."""
_LEASES = 1024  # of each node: who does not wait for capacity may have that many in flight
_START_IN_S = 0.1


_ENVIRONMENT = {
    "GRPC_VERBOSITY": "NONE",  # or every end of a connection is told
    # gRPC then waits for its sockets in the threads that use them, and not in further ones which
    # must wake these: half as many switches between threads for each request, for all systems.
    "GRPC_EXPERIMENTS": "-event_engine_client,-event_engine_listener",
}


@dataclass(frozen=True)
class Cell:
    """What is measured.

    Attributes:
        system, shape, arrivals: names.
        load: part of the nodes' capacity.
        routers: how many processes send.
        seed: of the trace.
        warmup_s: sent, but not measured.
        seconds: measured.
        in_flight: not 0: closed loop with so many requests at once, without work.
    """

    system: str
    shape: str = "bimodal"
    arrivals: str = "poisson"
    load: float = 0.7
    routers: int = 6
    seed: int = 1
    warmup_s: float = 1.0
    seconds: float = 12.0
    in_flight: int = 0

    @property
    def overload(self) -> bool:
        """Whether not everybody can be served."""
        return self.load > 1.0

    @property
    def deadline_s(self) -> float:
        """How long a request may take, from its arrival."""
        return OVERLOAD_DEADLINE_S if self.overload else PATIENCE_S


@dataclass(frozen=True)
class Measured:
    """What came of a cell.

    Attributes:
        records: of all requests that were due in the measured time, by router (RECORD).
        start_ns: when the trace began.
        over_ns: how much longer than its work each request took in its node.
        cpu: seconds of CPU in the measured time: routers, nodes, proxy.
        busy: part of the machine's CPU time that was in use.
    """

    records: tuple[NDArray[np.void], ...]
    start_ns: int
    over_ns: NDArray[np.int64]
    cpu: dict[str, float]
    busy: float


def _context() -> multiprocessing.context.ForkServerContext:
    """Children are forked from a process that has imported all they need and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.tail.llm_node", "bench.tail.llm_router"])
    before = dict(os.environ)
    os.environ |= _ENVIRONMENT
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


class _Child:
    """A process that speaks to us through a pipe."""

    def __init__(self, what: str, target: Callable[..., None], settings: object) -> None:
        context = _context()
        self.control, theirs = context.Pipe()
        self.what = what
        self._process = context.Process(target=target, args=(theirs, settings), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def hear(self, timeout_s: float) -> Any:
        """What it says next.

        Raises:
            RuntimeError: it says nothing in time, or has ended.
        """
        if not self.control.poll(timeout_s):
            raise RuntimeError(f"{self.what} says nothing")
        try:
            return self.control.recv()
        except EOFError:
            raise RuntimeError(f"{self.what} has ended") from None

    def stop(self) -> None:
        self.control.close()
        self._process.join(STOP_TIMEOUT_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()


def _start(
    stack: contextlib.ExitStack, what: str, target: Callable[..., None], settings: Sequence[object]
) -> list[_Child]:
    children = []
    for number, each in enumerate(settings):
        child = _Child(f"{what} {number}", target, each)
        stack.callback(child.stop)
        children.append(child)
    return children


@contextlib.contextmanager
def _segment() -> Iterator[str]:
    name = f"shmtail-{os.getpid()}-{secrets.token_hex(3)}"
    with shmcoord.Segment.open(name, leases=_LEASES):
        try:
            yield name
        finally:
            shmcoord.Segment.unlink(name)


@contextlib.contextmanager
def _proxy(system: System, ports: Sequence[int], cell: Cell) -> Iterator[tuple[int, list[int]]]:
    """Starts the system's proxy; yields its port and its processes."""
    port = free_port()
    with new_folder() as folder:
        folder.chmod(0o755)
        config = folder / "config"
        if system.proxy == "nginx":
            config.write_text(nginx_config(folder, port, ports, PATIENCE_S))
            command = [find("nginx"), "-p", str(folder), "-c", str(config)]
        else:
            queue_s = OVERLOAD_QUEUE_S if cell.overload else PATIENCE_S
            config.write_text(haproxy_config(port, ports, PATIENCE_S, queue_s, system.maxconn))
            command = [find("haproxy"), "-db", "-f", str(config)]
        with running(command, port, folder / "output") as pids:
            yield port, pids


def _node_settings(system: System, shape: str, segment: str) -> list[NodeSettings]:
    port = free_port() if system.shares_port else 0
    return [
        NodeSettings(
            number,
            speed=SHAPES[shape].speeds[number],
            port=port,
            shares_port=system.shares_port,
            reports_load=system.reports_load,
            segment=segment,
            capacity=system.capacity,
            adopts=system.client == "leased",
        )
        for number in range(NODES)
    ]


def _options(system: System, cell: Cell) -> dict[str, int]:
    """In overload, those who wait are limited: who cannot be served soon is refused at once."""
    if cell.overload and system.client == "leased":
        return {"max_waiters": max(1, OVERLOAD_WAITERS // cell.routers)}
    return {}


def _router_settings(cell: Cell, client: ClientSettings) -> list[RouterSettings]:
    each, more = divmod(cell.in_flight, cell.routers)
    return [
        RouterSettings(
            number,
            cell.routers,
            client=replace(client, seed=cell.seed * 1000 + number),
            shape=cell.shape,
            arrivals=cell.arrivals,
            load=cell.load,
            seconds=cell.warmup_s + cell.seconds,
            seed=cell.seed,
            deadline_s=cell.deadline_s,
            drain_s=min(10.0, cell.deadline_s + 1.0),
            in_flight=each + (number < more),
        )
        for number in range(cell.routers)
    ]


def measure(cell: Cell) -> Measured:
    """Runs one cell from start to end.

    Raises:
        ProxyMissing: its proxy is not installed and cannot be.
        RuntimeError: something did not start, or ended too early.
    """
    system = SYSTEMS[cell.system]
    if system.proxy:
        find(system.proxy)
    with contextlib.ExitStack() as stack:
        segment = stack.enter_context(_segment()) if system.joins else ""
        nodes = _start(stack, "node", run_node, _node_settings(system, cell.shape, segment))
        ports = [child.hear(START_TIMEOUT_S) for child in nodes]
        proxy: list[int] = []
        entries = ports
        if system.proxy:
            port, proxy = stack.enter_context(_proxy(system, ports, cell))
            entries = [port]
        elif system.shares_port:
            entries = ports[:1]
        client = ClientSettings(
            system.client,
            tuple(f"127.0.0.1:{port}" for port in entries),
            balancer=system.balancer,
            segment=segment,
            policy=system.policy,
            options=_options(system, cell),
            patience_s=OVERLOAD_QUEUE_S if cell.overload else PATIENCE_S,
        )
        routers = _start(stack, "router", run_router, _router_settings(cell, client))
        for child in routers:
            child.hear(START_TIMEOUT_S)
        groups = {
            "routers": [child.pid for child in routers],
            "nodes": [child.pid for child in nodes],
            "proxy": proxy,
        }
        return _run(cell, nodes, routers, groups)


def measure_streams(cell: Cell) -> Measured:
    """Runs one cell of the language model's shape; its records are of `llm.RECORD`."""
    with contextlib.ExitStack() as stack:
        segment = stack.enter_context(_segment())
        settings = [NodeSettings(number, segment=segment) for number in range(NODES)]
        nodes = _start(stack, "node", llm_node.run_node, settings)
        ports = [child.hear(START_TIMEOUT_S) for child in nodes]
        routers = _start(
            stack,
            "router",
            llm_router.run_router,
            [
                llm_router.StreamSettings(
                    number,
                    cell.routers,
                    way=cell.system,
                    segment=segment,
                    targets=tuple(f"127.0.0.1:{port}" for port in ports),
                    load=cell.load,
                    seconds=cell.warmup_s + cell.seconds,
                    seed=cell.seed,
                )
                for number in range(cell.routers)
            ],
        )
        for child in routers:
            child.hear(START_TIMEOUT_S)
        groups = {
            "routers": [child.pid for child in routers],
            "nodes": [child.pid for child in nodes],
        }
        return _run(cell, nodes, routers, groups)


def _run(
    cell: Cell, nodes: list[_Child], routers: list[_Child], groups: dict[str, list[int]]
) -> Measured:
    start_ns = time.monotonic_ns() + int(_START_IN_S * 1e9)
    for child in routers:
        child.control.send(start_ns)
    begin_ns = start_ns + int(cell.warmup_s * 1e9)
    end_ns = begin_ns + int(cell.seconds * 1e9)
    sleep_until(begin_ns)
    before, busy_before_s = _usage(groups)
    sleep_until(end_ns)
    after, busy_after_s = _usage(groups)
    whole = [child.hear(cell.deadline_s + STOP_TIMEOUT_S) for child in routers]
    for child in routers:
        child.control.send(None)
    for child in nodes:
        child.control.send(None)
    over_ns = np.concatenate([np.array(child.hear(STOP_TIMEOUT_S), np.int64) for child in nodes])
    measured = [
        records[(records["due_ns"] >= begin_ns) & (records["due_ns"] < end_ns)] for records in whole
    ]
    return Measured(
        records=tuple(measured),
        start_ns=start_ns,
        over_ns=over_ns,
        cpu={name: after[name] - before[name] for name in groups},
        busy=(busy_after_s - busy_before_s) / cell.seconds / (os.cpu_count() or 1),
    )


def _usage(groups: dict[str, list[int]]) -> tuple[dict[str, float], float]:
    return {name: cpu_s(pids) for name, pids in groups.items()}, machine_busy_s()
