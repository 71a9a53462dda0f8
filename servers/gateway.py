"""The leader's service: a query is split by team, each part goes to the team's least-loaded node.

The parts are read at once and forwarded as they come. A client that cancels or disappears ends
the parts on every node, and with them the leases that they hold. How a part finds its node is no
matter of the gateway: it calls a stub, whose channel routes by load.
"""

import logging
import math
import time
from collections.abc import Mapping

import grpc
import grpc.aio

from servers.config import Cluster
from servers.merging import SourceError, merged
from servers.pb import shmcoord_cluster_pb2 as pb
from servers.pb import shmcoord_cluster_pb2_grpc as pb_grpc
from servers.sending import Refusal, Writer, absence_cancels, in_time, time_limit_s
from servers.table import Row, Value, head, to_rows, to_tables

log = logging.getLogger("servers.gateway")

MAX_WORDS = 64
# The parts get a little less time than the client has, so that it hears what was late.
_ANSWER_SHARE = 0.05
_ANSWER_MAX_S = 0.1

Context = grpc.aio.ServicerContext[pb.QueryRequest, pb.QueryChunk]


class GatewayService(pb_grpc.GatewayServicer):
    """Answers clients with what the nodes of the teams answer.

    Attributes:
        running: queries that are being answered.
        draining: takes no more.

    Args:
        cluster: names the time-out of queries that bring none.
        teams: a stub for each team of the cluster.
    """

    def __init__(self, cluster: Cluster, teams: Mapping[str, pb_grpc.NodeStub]) -> None:
        self._cluster = cluster
        self._teams = teams
        self.running = 0
        self.draining = False

    async def Query(  # noqa: N802
        self, request: pb.QueryRequest, context: Context
    ) -> None:
        """Streams the rows of the teams asked, or the merged aggregate, and a summary."""
        with absence_cancels():
            writer = Writer(context)
            try:
                if self.draining:
                    raise Refusal(grpc.StatusCode.UNAVAILABLE, "the gateway is draining")
                if self.running >= self._cluster.cluster.max_queries:
                    raise Refusal(
                        grpc.StatusCode.RESOURCE_EXHAUSTED,
                        f"the gateway runs {self.running} queries, and takes no more at once",
                    )
                self.running += 1
                try:
                    # The parts have less time than that: who is late is told by them.
                    limit_s = time_limit_s(context, self._cluster.cluster.timeout_s)
                    await in_time(self._query(request, context, writer), limit_s + _ANSWER_MAX_S)
                finally:
                    self.running -= 1
            except Refusal as refusal:
                await writer.refuse(refusal)

    async def _query(
        self, request: pb.QueryRequest, context: Context, writer: Writer[pb.QueryChunk]
    ) -> None:
        begun = time.monotonic()
        teams = self._checked_teams(request)
        answer = _Answer(self._cluster, request, teams)
        part = pb.PartRequest(words=request.words, limit=request.limit, aggregate=request.aggregate)
        timeout_s = self._timeout_s(context)
        sources = {team: self._teams[team].Answer(part, timeout=timeout_s) for team in teams}
        try:
            async with merged(sources) as chunks:
                async for team, chunk in chunks:
                    for ready in answer.take(team, chunk):
                        await writer.write(ready)
        except SourceError as failed:
            raise self._refusal(failed) from failed
        for ready in answer.finish(time.monotonic() - begun):
            await writer.write(ready)

    def _checked_teams(self, request: pb.QueryRequest) -> list[str]:
        unknown = [team for team in request.teams if team not in self._cluster.teams]
        if unknown:
            raise Refusal(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"no team {', '.join(unknown)}; teams are {', '.join(self._cluster.teams)}",
            )
        if len(request.words) > MAX_WORDS:
            raise Refusal(
                grpc.StatusCode.INVALID_ARGUMENT, f"more than {MAX_WORDS} words in a query"
            )
        if request.aggregate and self._cluster.data.group_by is None:
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                "no aggregate is configured (data.group_by and data.mean)",
            )
        return [team for team in self._cluster.teams if not request.teams or team in request.teams]

    def _timeout_s(self, context: Context) -> float:
        limit_s = time_limit_s(context, math.inf)
        if limit_s == math.inf:
            return self._cluster.cluster.timeout_s
        return max(limit_s - min(limit_s * _ANSWER_SHARE, _ANSWER_MAX_S), 0.001)

    def _refusal(self, failed: SourceError) -> Refusal:
        code, details = _as_status(failed.__cause__)
        log.warning("Part of team %s failed: %s: %s", failed.key, code.name, details)
        return Refusal(code, f"team {failed.key}: {details}")


class _Answer:
    """What of one query's parts was forwarded, and what is kept until the end."""

    def __init__(self, cluster: Cluster, request: pb.QueryRequest, teams: list[str]) -> None:
        self._teams = teams
        self._left = int(request.limit) or None
        self._groups = Groups(cluster) if request.aggregate else None
        self._summaries: dict[str, pb.PartSummary] = {}
        self._sent = 0

    def take(self, team: str, chunk: pb.PartChunk) -> list[pb.QueryChunk]:
        """What to forward for a chunk of a part."""
        if chunk.HasField("summary"):
            self._summaries[team] = chunk.summary
            return []
        table = chunk.table
        if self._groups is not None:
            self._groups.add(table)
            return []
        if self._left is not None:
            table = head(table, self._left)
            self._left -= table.rows
            if not table.rows:
                return []
        self._sent += table.rows
        return [pb.QueryChunk(rows=pb.ServedTable(team=team, node=chunk.node, table=table))]

    def finish(self, seconds: float) -> list[pb.QueryChunk]:
        """The merged groups, if any, and the summary."""
        chunks = []
        if self._groups is not None:
            for table in self._groups.tables():
                self._sent += table.rows
                chunks.append(pb.QueryChunk(rows=pb.ServedTable(table=table)))
        parts = [self._summaries[team] for team in self._teams if team in self._summaries]
        summary = pb.QuerySummary(
            parts=parts,
            matched=sum(part.matched for part in parts),
            sent=self._sent,
            seconds=seconds,
        )
        return [*chunks, pb.QueryChunk(summary=summary)]


class Groups:
    """Partial aggregates added up: the mean is taken once, from exact sums and counts."""

    def __init__(self, cluster: Cluster) -> None:
        self._names = (cluster.data.group_by or "", "count", f"mean_{cluster.data.mean}")
        self._kind = "VARCHAR"
        self._totals: dict[Value, tuple[int, int, float]] = {}

    def add(self, table: pb.Table) -> None:
        """Adds a part's groups."""
        self._kind = {
            "int64s": "BIGINT",
            "doubles": "DOUBLE",
            "bools": "BOOLEAN",
        }.get(table.columns[0].WhichOneof("values") or "", "VARCHAR")
        for group, rows, values, total in to_rows(table):
            old = self._totals.get(group, (0, 0, 0))
            self._totals[group] = (
                old[0] + int(rows or 0),
                old[1] + int(values or 0),
                old[2] + (total or 0),  # type: ignore[operator]
            )

    def tables(self) -> list[pb.Table]:
        """The groups in order, those without a name last."""
        rows: list[Row] = [
            (group, count, total / values if values else None)
            for group, (count, values, total) in self._totals.items()
        ]
        rows.sort(key=lambda row: (row[0] is None, row[0] if row[0] is not None else ""))
        return to_tables(self._names, (self._kind, "BIGINT", "DOUBLE"), rows)


def _as_status(error: BaseException | None) -> tuple[grpc.StatusCode, str]:
    """The gRPC status that tells a client what went wrong with a part."""
    if isinstance(error, grpc.aio.AioRpcError):
        # A node that was stopped cancels what it could not finish; the client did not.
        code = error.code()
        if code is grpc.StatusCode.CANCELLED:
            code = grpc.StatusCode.UNAVAILABLE
        return code, error.details() or code.name
    return grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}"
