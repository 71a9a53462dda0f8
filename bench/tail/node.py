"""A node: a gRPC server that works on one request at a time, by sleeping.

gRPC's threaded server with one thread is a first-come queue in front of one worker. The work comes
with the request. A node that has joined a segment works under the lease that came with it.
"""

from __future__ import annotations

import collections
import contextlib
import gc
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import grpc

import shmcoord
from bench.tail.clock import exact_timers
from bench.tail.wire import ORCA_KEY, SERVICE, WORK, WORK_ANSWER, WORK_REQUEST, orca_report
from shmcoord.transport.grpc import lease_token, refuse_lost_lease

GROUP = "NODES"
ORCA_WINDOW_S = 1.0
"""A load report tells of the last second."""


@dataclass(frozen=True)
class NodeSettings:
    """What a node shall be.

    Attributes:
        number: 0 and up.
        speed: 1 does a second's work in a second.
        port: 0 takes a free one.
        shares_port: several nodes listen on the same port (SO_REUSEPORT).
        reports_load: with each answer, for gRPC's weighted_round_robin.
        segment: what it joins, if anything.
        capacity: as in `Segment.join`.
        adopts: requests come with a lease.
    """

    number: int
    speed: float = 1.0
    port: int = 0
    shares_port: bool = False
    reports_load: bool = False
    segment: str = ""
    capacity: int | None = None
    adopts: bool = False


class _Load:
    """Answers per second and the busy part of the last second, for the load reports."""

    def __init__(self) -> None:
        self._begun_ns = time.monotonic_ns()
        self._done: collections.deque[tuple[int, int]] = collections.deque()
        self._busy_ns = 0

    def report(self, begun_ns: int, ended_ns: int) -> bytes:
        """Counts one more answer; returns the report that goes with it."""
        self._done.append((ended_ns, ended_ns - begun_ns))
        self._busy_ns += ended_ns - begun_ns
        since_ns = ended_ns - int(ORCA_WINDOW_S * 1e9)
        while self._done[0][0] < since_ns:
            self._busy_ns -= self._done.popleft()[1]
        window_s = max(0.1, (ended_ns - max(since_ns, self._begun_ns)) / 1e9)
        return orca_report(len(self._done) / window_s, min(1.0, self._busy_ns / 1e9 / window_s))


class _Service(grpc.GenericRpcHandler):  # type: ignore[misc]
    """The work, and the count of what waits for it."""

    def __init__(self, settings: NodeSettings) -> None:
        self.settings = settings
        self.node: shmcoord.Node | None = None
        self.over_ns: list[int] = []  # how much longer than its work each request took
        self._load = _Load()
        self._arrived = 0  # written by gRPC's own thread alone
        self._taken = 0  # written by the worker alone
        self._handler = grpc.unary_unary_rpc_method_handler(self._work)

    def service(self, details: Any) -> Any:
        """Called by gRPC when a request arrives; before it waits for the worker."""
        if details.method != f"/{SERVICE}/{WORK}":
            return None
        if self.node is not None and not self.settings.adopts:
            self._arrived += 1
            self.node.waiting = self._arrived - self._taken
        return self._handler

    @contextlib.contextmanager
    def _counted(self, context: Any) -> Iterator[None]:
        """The request is counted in the segment, as one with a lease or without."""
        if self.node is None:
            yield
        elif self.settings.adopts:
            token = lease_token(context)
            try:
                work = self.node.adopt(token) if token else self.node.request()
            except shmcoord.LeaseLost:
                refuse_lost_lease(context)
            with work:
                yield
        else:
            self._taken += 1
            self.node.waiting = self._arrived - self._taken
            with self.node.request():
                yield

    def _work(self, request: bytes, context: Any) -> bytes:
        begun_ns = time.monotonic_ns()
        work_s = WORK_REQUEST.unpack(request)[0] / 1e6 / self.settings.speed
        with self._counted(context):
            if work_s:
                time.sleep(work_s)
            ended_ns = time.monotonic_ns()
        self.over_ns.append(ended_ns - begun_ns - int(work_s * 1e9))
        if self.settings.reports_load:
            report = self._load.report(begun_ns, ended_ns)
            context.set_trailing_metadata(((ORCA_KEY, report),))
        return WORK_ANSWER.pack(self.settings.number, begun_ns, ended_ns)


def run_node(control: Connection, settings: NodeSettings) -> None:
    """The life of a node's process: says its port, serves until told to stop, says how it went.

    Args:
        control: gets the port, then, after the word to stop, how much longer than its work each
            request took (a list, nanoseconds). The end of the pipe means stop as well.
        settings: what to be.
    """
    exact_timers()
    service = _Service(settings)
    server = grpc.server(
        ThreadPoolExecutor(1),
        handlers=(service,),
        options=[("grpc.so_reuseport", int(settings.shares_port))],
    )
    port = server.add_insecure_port(f"127.0.0.1:{settings.port}")
    with contextlib.ExitStack() as stack:
        if settings.segment:
            segment = stack.enter_context(shmcoord.Segment.open(settings.segment))
            service.node = stack.enter_context(
                segment.join(
                    f"node-{settings.number}",
                    group=GROUP,
                    endpoint=f"127.0.0.1:{port}",
                    capacity=settings.capacity,
                    weight=settings.speed,
                )
            )
        server.start()
        gc.freeze()
        gc.disable()
        control.send(port)
        with contextlib.suppress(EOFError):
            control.recv()
        server.stop(None).wait()
        with contextlib.suppress(BrokenPipeError):
            control.send(service.over_ns)
