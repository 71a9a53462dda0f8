"""A node: a gRPC server that works on one request at a time, by sleeping.

One thread does everything: it takes a request from gRPC's completion queue, works, answers, takes
the next. What has come meanwhile waits inside gRPC, first come first served. gRPC's own Python
servers hand each request from thread to thread four times, which on a small machine takes longer
than all that is compared here; this one uses the same library one layer lower (`cygrpc`).

The work comes with the request. A node that has joined a segment works under the lease that came
with it.
"""

from __future__ import annotations

import collections
import contextlib
import gc
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from grpc._cython import cygrpc

import shmcoord
from bench.tail.clock import exact_timers
from bench.tail.wire import ORCA_KEY, WORK_ANSWER, WORK_REQUEST, orca_report
from shmcoord.transport._grpc_common import token_in
from shmcoord.transport.grpc import LEASE_KEY, LEASE_LOST_KEY, REFUSED

GROUP = "NODES"
_REQUEST = "request"
_STOP = "stop"
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


class _Server:
    """One thread, one completion queue."""

    def __init__(self, settings: NodeSettings) -> None:
        self.settings = settings
        self.node: shmcoord.Node | None = None
        self.over_ns: list[int] = []  # how much longer than its work each request took
        self._load = _Load()
        self._waiting: collections.deque[tuple[Any, bytes]] = collections.deque()
        self._stopping = False
        self._queue = cygrpc.CompletionQueue()
        options = (("grpc.so_reuseport", int(settings.shares_port)),)
        self._server = cygrpc.Server(options, False)
        self._server.register_completion_queue(self._queue)
        self.port: int = self._server.add_http2_port(f"127.0.0.1:{settings.port}".encode())
        if not self.port:
            raise OSError(f"port {settings.port} is taken")

    def stop(self) -> None:
        """Ends `serve`; to be called by another thread."""
        self._stopping = True
        self._server.shutdown(self._queue, _STOP)
        self._server.cancel_all_calls()

    def serve(self) -> None:
        """Answers until it is stopped."""
        self._server.start()
        self._await_request()
        # Who tells by itself what waits here must know it; else it may wait inside gRPC.
        counts = self.node is not None and not self.settings.adopts
        while True:
            if not self._waiting:
                if not self._take(None):
                    return
                continue
            while counts and self._take(0.0):
                pass
            event, request = self._waiting.popleft()
            if counts:
                assert self.node is not None
                self.node.waiting = len(self._waiting)
            self._answer(event, request)

    def _await_request(self) -> None:
        self._server.request_call(self._queue, self._queue, _REQUEST)

    def _take(self, deadline: float | None) -> bool:
        """Takes one event from gRPC; False at the deadline, and at the end."""
        event = self._queue.poll(deadline)
        if event.completion_type == cygrpc.CompletionType.queue_timeout or event.tag is _STOP:
            return False
        if event.tag is _REQUEST:
            if self._stopping:
                return True
            self._await_request()
            receive = (cygrpc.ReceiveMessageOperation(0),)
            event.call.start_server_batch(receive, ("message", event))
        elif event.tag[0] == "message":
            request = event.batch_operations[0].message()
            if request is not None:  # else whoever sent it has gone
                self._waiting.append((event.tag[1], request))
        return True

    def _answer(self, event: Any, request: bytes) -> None:
        if event.call_details.deadline < time.time():  # nobody waits for it any more
            self._finish(event, b"", (), cygrpc.StatusCode.deadline_exceeded)
            return
        begun_ns = time.monotonic_ns()
        work_s = WORK_REQUEST.unpack(request)[0] / 1e6 / self.settings.speed
        try:
            counted = self._counted(event)
        except shmcoord.LeaseLost:
            trailing = ((LEASE_LOST_KEY, token_in(event.invocation_metadata) or ""),)
            self._finish(event, b"", trailing, cygrpc.StatusCode.failed_precondition)
            return
        with counted:
            if work_s:
                time.sleep(work_s)
            ended_ns = time.monotonic_ns()
        answer = WORK_ANSWER.pack(self.settings.number, begun_ns, ended_ns)
        trailing = ()
        if self.settings.reports_load:
            trailing = ((ORCA_KEY, self._load.report(begun_ns, ended_ns)),)
        self._finish(event, answer, trailing, cygrpc.StatusCode.ok)
        self.over_ns.append(ended_ns - begun_ns - int(work_s * 1e9))

    def _counted(self, event: Any) -> contextlib.AbstractContextManager[object]:
        """Counts the request in the segment: by its lease, or as one that came without."""
        if self.node is None:
            return contextlib.nullcontext()
        for key, value in event.invocation_metadata:
            if key == LEASE_KEY:
                return self.node.adopt(value)
        return self.node.request()

    def _finish(
        self, event: Any, answer: bytes, trailing: tuple[tuple[str, object], ...], code: int
    ) -> None:
        details = REFUSED.encode() if code == cygrpc.StatusCode.failed_precondition else b""
        operations: list[Any] = [cygrpc.SendInitialMetadataOperation(None, 0)]
        if code == cygrpc.StatusCode.ok:
            operations.append(cygrpc.SendMessageOperation(answer, 0))
        operations.append(cygrpc.SendStatusFromServerOperation(trailing, code, details, 0))
        event.call.start_server_batch(tuple(operations), ("sent", event))


def run_node(control: Connection, settings: NodeSettings) -> None:
    """The life of a node's process: says its port, serves until told to stop, says how it went.

    Args:
        control: gets the port, then, after the word to stop, how much longer than its work each
            request took (a list, nanoseconds). The end of the pipe means stop as well.
        settings: what to be.
    """
    exact_timers()
    server = _Server(settings)
    with contextlib.ExitStack() as stack:
        if settings.segment:
            segment = stack.enter_context(shmcoord.Segment.open(settings.segment))
            server.node = stack.enter_context(
                segment.join(
                    f"node-{settings.number}",
                    group=GROUP,
                    endpoint=f"127.0.0.1:{server.port}",
                    capacity=settings.capacity,
                    weight=settings.speed,
                )
            )
        gc.freeze()
        gc.disable()

        def await_stop() -> None:
            with contextlib.suppress(EOFError):
                control.recv()
            server.stop()

        threading.Thread(target=await_stop, daemon=True).start()
        control.send(server.port)
        server.serve()
        with contextlib.suppress(BrokenPipeError):
            control.send(server.over_ns)
