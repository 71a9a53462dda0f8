"""One node of the cluster: a process that serves its team's part of the data.

Its life: take the port, load the rows, join the host's segment, serve; on SIGTERM or SIGINT
drain (DRAINING, then health NOT_SERVING, running requests finish), show SHUTDOWN, give the slot
back. A second signal ends the grace period.
"""

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

import shmcoord
from servers.answering import NodeService, Serving
from servers.config import Cluster
from servers.data import Dataset
from servers.gateway import GatewayService
from servers.links import LinkError, links_of, listen
from servers.pb import shmcoord_cluster_pb2 as pb
from servers.pb import shmcoord_cluster_pb2_grpc as pb_grpc
from servers.sending import LONGEST_S

log = logging.getLogger("servers.node")

NODE_SERVICE = pb.DESCRIPTOR.services_by_name["Node"].full_name
GATEWAY_SERVICE = pb.DESCRIPTOR.services_by_name["Gateway"].full_name

_SERVER_OPTIONS = [
    # Otherwise gRPC shares a taken port silently.
    ("grpc.so_reuseport", 0),
    # Requests are a few words, and one client has only so many of them at once.
    ("grpc.max_receive_message_length", 1 << 18),
    ("grpc.max_concurrent_streams", 128),
    # Requests that gRPC keeps until we refuse them with a status: each takes about 15 kB. What is
    # beyond, or older, it ends as CANCELLED.
    ("grpc.server.max_pending_requests", 1 << 14),
    ("grpc.server.max_pending_requests_hard_limit", 1 << 14),
    ("grpc.server_max_unrequested_time_in_server", round(LONGEST_S)),  # in seconds
    # Who vanished without a word is noticed; whoever does not read has its connection closed.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_connection_age_ms", 3_600_000),
    ("grpc.max_connection_age_grace_ms", round(LONGEST_S * 1000)),
]
# Calls at once, beside the queries: health, status, parts, and clients that do not read the end.
_OTHER_CALLS = 256
# A part whose client is slow is held back at its node, and not gathered in the gateway: without
# these, gRPC lets many megabytes come in advance.
_PART_OPTIONS = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 18)]
# What is no load of the node: the leader's queries, which become the parts that are.
_NO_LOAD = (f"/{GATEWAY_SERVICE}/", f"/{NODE_SERVICE}/GetStatus", f"/{NODE_SERVICE}/Shutdown")


class NodeError(Exception):
    """The node cannot run; the message says why."""


class _Stop:
    """Who wants the node to end, and how often they said so."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.hurry = asyncio.Event()

    def ask(self) -> None:
        if self.asked.is_set():
            self.hurry.set()
        self.asked.set()


async def run(cluster: Cluster, name: str) -> None:
    """Serves until a signal or the Shutdown call ends it.

    Raises:
        NodeError: the port is taken.
        DataError, ConfigError, shmcoord.ShmcoordError: what the node needs is not to be had.
    """
    stop = _Stop()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.ask)
    service = NodeService(cluster, name, stop.ask)
    probes = health.aio.HealthServicer()
    async with contextlib.AsyncExitStack() as stack:
        # The port comes first: whoever has it already is then not disturbed by anything else.
        server = _bound_server(cluster, name, probes)
        stack.push_async_callback(server.stop, None)
        dataset = await asyncio.to_thread(_load, cluster, name)
        stack.callback(dataset.close)
        pool = ThreadPoolExecutor(cluster.capacity(name), thread_name_prefix="search")
        stack.callback(pool.shutdown)
        _open_segments(stack, cluster, name)
        gateway = await _gateway(stack, cluster) if name == cluster.leader else None
        services = await _add_services(server, service, gateway, probes)
        service.serving = Serving(dataset, pool)
        await server.start()
        log.info("Shared memory update thread started")
        server.node.publish(rows=dataset.rows)
        for known in services:
            await probes.set(known, health_pb2.HealthCheckResponse.SERVING)
        log.info("Serving team %s on %s", cluster.nodes[name].team, cluster.endpoint(name))
        await stop.asked.wait()
        await _finish(cluster, server, service, gateway, stop)
    log.info("Stopped")


def die_with(parent: int) -> None:
    """Makes the kernel end this process (SIGTERM) when its parent ends, however it ends."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it ended before we asked
        raise NodeError("the process that started this node is gone")


def _bound_server(
    cluster: Cluster, name: str, probes: health.aio.HealthServicer
) -> shmcoord.grpc.aio.AioServer:
    server = shmcoord.grpc.aio.server(
        node=name,
        segment=cluster.segment(name),
        group=cluster.nodes[name].team,
        endpoint=cluster.endpoint(name),
        capacity=cluster.capacity(name),
        weight=cluster.nodes[name].weight,
        interval_s=cluster.heartbeat_s(name),
        gauges=("rows",),
        exclude=_NO_LOAD,
        health=probes,
        options=_SERVER_OPTIONS,
        maximum_concurrent_rpcs=cluster.cluster.max_queries + _OTHER_CALLS,
    )
    try:
        listen(server, cluster, name)
    except LinkError as error:
        raise NodeError(str(error)) from None
    return server


def _load(cluster: Cluster, name: str) -> Dataset:
    begun = time.monotonic()
    data = cluster.data
    dataset = Dataset(
        cluster.data_file(),
        cluster.part(name),
        nulls=data.nulls,
        group_by=data.group_by,
        mean=data.mean,
    )
    log.info(
        "Loaded %s of %s rows in %.1f s",
        f"{dataset.rows:,}",
        f"{dataset.total_rows:,}",
        time.monotonic() - begun,
    )
    return dataset


def _open_segments(stack: contextlib.AsyncExitStack, cluster: Cluster, name: str) -> None:
    """This node's segment; the gateway, which routes over all of them, opens all."""
    own = (cluster.segment(name),)
    wanted = cluster.segments_at(cluster.nodes[name].host) if name == cluster.leader else own
    for segment in wanted:
        log.info("Initializing shared memory: %s", segment)
        stack.enter_context(shmcoord.Segment.open(segment))
    log.info("Shared memory initialized successfully")


async def _gateway(stack: contextlib.AsyncExitStack, cluster: Cluster) -> GatewayService:
    """The gateway, with a channel to the nodes of each team; all of them share one router."""
    router = shmcoord.Router(*cluster.segments_at(cluster.nodes[cluster.leader].host))
    stack.callback(router.close)
    links = links_of(cluster)
    teams = {}
    for team in cluster.teams:
        channel = shmcoord.grpc.aio.channel(
            router=router,
            group=team,
            credentials=links.credentials,
            options=[*_PART_OPTIONS, *links.options],
            adopts=True,
            on_decision=_log_decision,
        )
        teams[team] = pb_grpc.NodeStub(await stack.enter_async_context(channel))
    return GatewayService(cluster, teams)


def _log_decision(decision: shmcoord.Decision, lease: shmcoord.Lease) -> None:
    for line in str(decision).splitlines():
        log.info(line)


async def _add_services(
    server: grpc.aio.Server,
    service: NodeService,
    gateway: GatewayService | None,
    probes: health.aio.HealthServicer,
) -> list[str]:
    """Registers everything; returns the names whose health is told, "" meaning the process."""
    services = ["", NODE_SERVICE]
    pb_grpc.add_NodeServicer_to_server(service, server)
    if gateway is not None:
        services.append(GATEWAY_SERVICE)
        pb_grpc.add_GatewayServicer_to_server(gateway, server)
    health_pb2_grpc.add_HealthServicer_to_server(probes, server)
    for known in services:
        await probes.set(known, health_pb2.HealthCheckResponse.NOT_SERVING)
    reflection.enable_server_reflection(
        [*services[1:], health.SERVICE_NAME, reflection.SERVICE_NAME], server
    )
    return services


async def _finish(
    cluster: Cluster,
    server: shmcoord.grpc.aio.AioServer,
    service: NodeService,
    gateway: GatewayService | None,
    stop: _Stop,
) -> None:
    """Takes no new work, waits until the old is done, and stops the server.

    It waits no longer than the grace period, and no longer than until a second signal.
    """
    service.draining = True
    if gateway is not None:
        gateway.draining = True
    log.info("Draining: %d requests are running", service.load.inflight)
    hurry = asyncio.create_task(stop.hurry.wait())
    stopping = asyncio.create_task(server.stop(cluster.cluster.grace_s))
    try:
        await asyncio.wait((stopping, hurry), return_when=asyncio.FIRST_COMPLETED)
        if not stopping.done():
            await server.stop(None)
        await stopping
    finally:
        hurry.cancel()
