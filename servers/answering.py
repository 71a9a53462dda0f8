"""The service of every node: it answers its team's part of a query."""

import hmac
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc
import grpc.aio

from servers.config import Cluster
from servers.data import DataError, Dataset, SearchInterruptedError
from servers.gateway import MAX_WORDS
from servers.load import OwnLoad
from servers.pb import shmcoord_cluster_pb2 as pb
from servers.pb import shmcoord_cluster_pb2_grpc as pb_grpc
from servers.searching import RunningSearch
from servers.sending import Refusal, Writer, absence_cancels, in_time, time_limit_s
from shmcoord.transport.grpc import lease_token

log = logging.getLogger("servers.node")

# Requests that come without a lease are taken until a node has so many times its capacity.
_UNLEASED = 4

AnswerContext = grpc.aio.ServicerContext[pb.PartRequest, pb.PartChunk]
StatusContext = grpc.aio.ServicerContext[pb.GetStatusRequest, pb.NodeStatus]
ShutdownContext = grpc.aio.ServicerContext[pb.ShutdownRequest, pb.ShutdownReply]


@dataclass
class Serving:
    """What a node has once it is ready to serve."""

    dataset: Dataset
    pool: ThreadPoolExecutor


class NodeService(pb_grpc.NodeServicer):
    """Answers parts, tells its own status, and ends the node if it is asked with the secret.

    Args:
        cluster: the configuration.
        name: which node this is.
        stop: begins to drain and end this node.
    """

    def __init__(self, cluster: Cluster, name: str, stop: Callable[[], None]) -> None:
        self._cluster = cluster
        self._name = name
        self._team = cluster.nodes[name].team
        self._stop = stop
        self._most = _UNLEASED * cluster.capacity(name)
        self.load = OwnLoad()
        self.serving: Serving | None = None
        self.draining = False

    async def Answer(  # noqa: N802
        self, request: pb.PartRequest, context: AnswerContext
    ) -> None:
        """Streams this node's rows for a part, then the part's summary."""
        with absence_cancels():
            writer = Writer(context)
            try:
                await self._checked_answer(request, context, writer)
            except Refusal as refusal:
                await writer.refuse(refusal)

    async def _checked_answer(
        self, request: pb.PartRequest, context: AnswerContext, writer: Writer[pb.PartChunk]
    ) -> None:
        if self.serving is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"{self._name} is still starting")
        if len(request.words) > MAX_WORDS:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, f"more than {MAX_WORDS} words in a query"
            )
        if lease_token(context) is None and self.load.inflight >= self._most:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{self._name} has {self.load.inflight} requests, and takes none without a lease",
            )
        with self.load.request():
            # The gateway always sets a deadline, at which gRPC ends the request; others may not.
            limit_s = time_limit_s(context, self._cluster.cluster.timeout_s)
            await in_time(self._answer(self.serving, request, writer), limit_s)

    async def _answer(
        self, serving: Serving, request: pb.PartRequest, writer: Writer[pb.PartChunk]
    ) -> None:
        begun = time.monotonic()
        try:
            search = serving.dataset.search(
                request.words, limit=request.limit, aggregate=request.aggregate
            )
            async with RunningSearch(search, serving.pool) as running:
                while (table := await running.next_batch()) is not None:
                    await writer.write(pb.PartChunk(node=self._name, table=table))
        except DataError as error:
            raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, str(error)) from None
        except SearchInterruptedError:
            text = "the search was interrupted"
            raise Refusal(grpc.StatusCode.UNAVAILABLE, text) from None
        summary = pb.PartSummary(
            team=self._team,
            node=self._name,
            matched=search.matched,
            sent=search.sent,
            seconds=time.monotonic() - begun,
        )
        await writer.write(pb.PartChunk(node=self._name, summary=summary))

    async def GetStatus(  # noqa: N802
        self, request: pb.GetStatusRequest, context: StatusContext
    ) -> pb.NodeStatus:
        """What this process knows of itself; nothing of it is read from shared memory."""
        load, cluster, name = self.load, self._cluster, self._name
        return pb.NodeStatus(
            node=name,
            team=self._team,
            role=cluster.nodes[name].role,
            endpoint=cluster.endpoint(name),
            segment=cluster.segment(name),
            state=self._state(),
            inflight=load.inflight,
            capacity=cluster.capacity(name),
            served=load.served,
            failed=load.failed,
            latency_s=load.latency_s,
            memory_bytes=load.memory_bytes,
            cpu_percent=load.cpu_percent(),
            uptime_s=load.uptime_s,
            pid=os.getpid(),
            rows=self.serving.dataset.rows if self.serving else 0,
        )

    def _state(self) -> pb.NodeState:
        if self.draining:
            return pb.NODE_STATE_DRAINING
        return pb.NODE_STATE_BUSY if self.load.inflight else pb.NODE_STATE_IDLE

    async def Shutdown(  # noqa: N802
        self, request: pb.ShutdownRequest, context: ShutdownContext
    ) -> pb.ShutdownReply:
        """Drains and ends this node, if the configuration holds a secret and it was given."""
        secret = self._cluster.cluster.shutdown_secret
        if secret is None:
            await context.abort(
                grpc.StatusCode.UNIMPLEMENTED,
                "shutting down by a call is off: the configuration has no shutdown_secret",
            )
        if not hmac.compare_digest(secret.encode(), request.secret.encode()):
            log.warning("A shutdown was refused: wrong secret, from %s", context.peer())
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "wrong secret")
        log.info("Shutdown asked for by %s", context.peer())
        self._stop()
        return pb.ShutdownReply()
