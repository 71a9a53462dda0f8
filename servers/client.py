"""Asking the gateway: one query, or many at once with what they cost."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc
import grpc.aio
from hdrh.histogram import HdrHistogram  # type: ignore[import-untyped]

from servers.pb import shmcoord_cluster_pb2 as pb
from servers.pb import shmcoord_cluster_pb2_grpc as pb_grpc
from servers.table import Row, column_names, to_rows

# Latencies are kept in microseconds, to three digits, up to one hour.
_LONGEST_US = 3_600_000_000


class QueryError(Exception):
    """The gateway did not answer a query; the message is for the user."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        self.code = code
        super().__init__(f"{code.name}: {details}")


@dataclass
class Answer:
    """What the gateway sent for one query."""

    names: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    summary: pb.QuerySummary = field(default_factory=pb.QuerySummary)


class Report:
    """What came of many queries."""

    def __init__(self) -> None:
        self.first: Answer | None = None
        self.answered = 0
        self.errors: Counter[str] = Counter()
        self.unavailable = 0
        self.served: Counter[tuple[str, str]] = Counter()
        self.seconds = 0.0
        self._latencies = HdrHistogram(1, _LONGEST_US, 3)

    def add(self, answer: Answer, latency_s: float) -> None:
        """Counts one answer."""
        self.first = self.first or answer
        self.answered += 1
        self.served.update((part.team, part.node) for part in answer.summary.parts)
        self._latencies.record_value(max(1, min(round(latency_s * 1e6), _LONGEST_US)))

    def latency_s(self, percentile: float) -> float:
        """The latency that so many percent of the answers did not exceed, in seconds."""
        return float(self._latencies.get_value_at_percentile(percentile)) / 1e6


async def ask(
    stub: pb_grpc.GatewayStub, request: pb.QueryRequest, timeout_s: float | None
) -> Answer:
    """Sends one query and gathers its chunks.

    Raises:
        QueryError: the gateway is not there, refused, or was too slow.
    """
    answer = Answer()
    try:
        async for chunk in stub.Query(request, timeout=timeout_s):
            if chunk.HasField("summary"):
                answer.summary = chunk.summary
            else:
                table = chunk.rows.table
                answer.names = answer.names or column_names(table)
                answer.rows.extend(to_rows(table))
    except grpc.aio.AioRpcError as error:
        raise QueryError(error.code(), error.details() or "") from None
    return answer


async def ask_many(
    server: str,
    request: pb.QueryRequest,
    *,
    count: int = 1,
    concurrency: int = 1,
    timeout_s: float | None = None,
    on_done: Callable[[], None] = lambda: None,
) -> Report:
    """Sends the same query many times, some of them at once; failures are counted, not raised."""
    report = Report()
    numbers = iter(range(count))
    begun = time.monotonic()

    async def work(stub: pb_grpc.GatewayStub) -> None:
        for _ in numbers:
            sent = time.monotonic()
            try:
                answer = await ask(stub, request, timeout_s)
            except QueryError as error:
                report.errors[str(error)] += 1
                report.unavailable += error.code is grpc.StatusCode.UNAVAILABLE
            else:
                report.add(answer, time.monotonic() - sent)
            on_done()

    async with grpc.aio.insecure_channel(server) as channel:
        stub = pb_grpc.GatewayStub(channel)
        await asyncio.gather(*(work(stub) for _ in range(min(concurrency, count))))
    report.seconds = time.monotonic() - begun
    return report


async def node_status(endpoint: str, timeout_s: float) -> pb.NodeStatus:
    """Asks one node for its status.

    Raises:
        QueryError: it is not there or too slow.
    """
    async with grpc.aio.insecure_channel(endpoint) as channel:
        try:
            return await pb_grpc.NodeStub(channel).GetStatus(
                pb.GetStatusRequest(), timeout=timeout_s
            )
        except grpc.aio.AioRpcError as error:
            raise QueryError(error.code(), error.details() or "") from None


async def shut_down(endpoint: str, secret: str, timeout_s: float) -> None:
    """Asks one node to drain and end.

    Raises:
        QueryError: it is not there, or refused.
    """
    async with grpc.aio.insecure_channel(endpoint) as channel:
        try:
            await pb_grpc.NodeStub(channel).Shutdown(
                pb.ShutdownRequest(secret=secret), timeout=timeout_s
            )
        except grpc.aio.AioRpcError as error:
            raise QueryError(error.code(), error.details() or "") from None
