"""Asking the gateway: one query, or many at once with what they cost."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc
import grpc.aio
from hdrh.histogram import HdrHistogram  # type: ignore[import-untyped]

from servers.links import PLAIN, Links
from servers.pb import shmcoord_cluster_pb2 as pb
from servers.pb import shmcoord_cluster_pb2_grpc as pb_grpc
from servers.table import Row, column_names, to_rows

# Latencies are kept in microseconds, to three digits, up to one hour.
_LONGEST_US = 3_600_000_000
# A gateway that ended or is just starting is asked again soon; in seconds.
_ASK_AGAIN_S = 0.1
_CHANNEL_OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


class QueryError(Exception):
    """The gateway did not answer a query; the message is for the user."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        self.code = code
        super().__init__(f"{code.name}: {details}")


@dataclass
class Answer:
    """What the gateway sent for one query, and how often it was asked."""

    asked: int = 1
    names: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    summary: pb.QuerySummary = field(default_factory=pb.QuerySummary)


class Report:
    """What came of many queries."""

    def __init__(self) -> None:
        self.first: Answer | None = None
        self.answered = 0
        self.asked_again = 0
        self.errors: Counter[str] = Counter()
        self.unavailable = 0
        self.served: Counter[tuple[str, str]] = Counter()
        self.seconds = 0.0
        self._latencies = HdrHistogram(1, _LONGEST_US, 3)

    def add(self, answer: Answer, latency_s: float) -> None:
        """Counts one answer."""
        self.first = self.first or answer
        self.answered += 1
        self.asked_again += answer.asked - 1
        self.served.update((part.team, part.node) for part in answer.summary.parts)
        self._latencies.record_value(max(1, min(round(latency_s * 1e6), _LONGEST_US)))

    def latency_s(self, percentile: float) -> float:
        """The latency that so many percent of the answers did not exceed, in seconds."""
        return float(self._latencies.get_value_at_percentile(percentile)) / 1e6


async def ask(
    stub: pb_grpc.GatewayStub,
    request: pb.QueryRequest,
    timeout_s: float | None,
    retry_s: float = 0.0,
) -> Answer:
    """Sends one query and gathers its chunks.

    Args:
        stub: the gateway's.
        request: the query.
        timeout_s: seconds for each time that it is sent; None for no limit of the client's.
        retry_s: for so many seconds it is sent again if the answer is UNAVAILABLE: the gateway
            or a node has ended. A query changes nothing, so this is always safe.

    Raises:
        QueryError: the gateway is not there, refused, or was too slow.
    """
    ends = time.monotonic() + retry_s
    asked = 1
    while True:
        answer = Answer(asked)
        try:
            async for chunk in stub.Query(request, timeout=timeout_s):
                if chunk.HasField("summary"):
                    answer.summary = chunk.summary
                else:
                    table = chunk.rows.table
                    answer.names = answer.names or column_names(table)
                    answer.rows.extend(to_rows(table))
        except grpc.aio.AioRpcError as error:
            failed = _failed(error)
            if failed.code is not grpc.StatusCode.UNAVAILABLE or time.monotonic() >= ends:
                raise failed from None
        else:
            return answer
        await asyncio.sleep(_ASK_AGAIN_S)
        asked += 1


def _failed(error: grpc.aio.AioRpcError) -> QueryError:
    """What gRPC says of a call, for the user."""
    # We did not cancel it (that would be an asyncio.CancelledError): gRPC says so where a request
    # meets a server that is just closing.
    if error.code() is grpc.StatusCode.CANCELLED:
        return QueryError(grpc.StatusCode.UNAVAILABLE, "the server ended the call")
    return QueryError(error.code(), error.details() or "")


async def ask_many(
    server: str,
    request: pb.QueryRequest,
    *,
    count: int = 1,
    concurrency: int = 1,
    timeout_s: float | None = None,
    retry_s: float = 0.0,
    links: Links = PLAIN,
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
                answer = await ask(stub, request, timeout_s, retry_s)
            except QueryError as error:
                report.errors[str(error)] += 1
                report.unavailable += error.code is grpc.StatusCode.UNAVAILABLE
            else:
                report.add(answer, time.monotonic() - sent)
            on_done()

    async with links.channel(server, _CHANNEL_OPTIONS) as channel:
        stub = pb_grpc.GatewayStub(channel)
        await asyncio.gather(*(work(stub) for _ in range(min(concurrency, count))))
    report.seconds = time.monotonic() - begun
    return report


async def node_status(endpoint: str, timeout_s: float, links: Links = PLAIN) -> pb.NodeStatus:
    """Asks one node for its status.

    Raises:
        QueryError: it is not there or too slow.
    """
    async with links.channel(endpoint) as channel:
        try:
            return await pb_grpc.NodeStub(channel).GetStatus(
                pb.GetStatusRequest(), timeout=timeout_s
            )
        except grpc.aio.AioRpcError as error:
            raise _failed(error) from None


async def shut_down(endpoint: str, secret: str, timeout_s: float, links: Links = PLAIN) -> None:
    """Asks one node to drain and end.

    Raises:
        QueryError: it is not there, or refused.
    """
    async with links.channel(endpoint) as channel:
        try:
            await pb_grpc.NodeStub(channel).Shutdown(
                pb.ShutdownRequest(secret=secret), timeout=timeout_s
            )
        except grpc.aio.AioRpcError as error:
            raise _failed(error) from None
