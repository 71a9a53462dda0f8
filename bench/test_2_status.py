"""A node's status from shared memory, against asking the node itself.

Both are about the same node of the reference cluster, in another process of this host. The RPC is
the one that `python -m servers status` sends, over one connection that is kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import grpc
import pytest

import shmcoord
from bench import native
from bench.children import children, new_folder
from bench.paired import AsyncCall, Loop, Statement
from bench.plugin import Rows
from bench.report import Bar, Row
from bench.status_node import NODE
from servers.pb import shmcoord_cluster_pb2 as pb
from servers.pb import shmcoord_cluster_pb2_grpc as pb_grpc

BATCH_S = 0.01
REFERENCE = "GetStatus RPC"


@pytest.fixture(scope="module")
def node() -> Iterator[tuple[str, str]]:
    """A running node: its endpoint and its segment."""
    with new_folder() as folder, children([["bench.status_node", str(folder)]]) as [words]:
        endpoint, segment = words.split()
        yield endpoint, segment


@pytest.fixture(scope="module")
def segment(node: tuple[str, str]) -> Iterator[shmcoord.Segment]:
    """The node's segment, read-only."""
    with shmcoord.Segment.attach(node[1]) as segment:
        yield segment


@pytest.fixture(scope="module")
def rpc(node: tuple[str, str]) -> Iterator[AsyncCall]:
    """GetStatus by a client of grpc.aio, on an event loop of its own."""
    loop = asyncio.new_event_loop()

    async def connect() -> tuple[grpc.aio.Channel, pb_grpc.NodeStub]:
        channel = grpc.aio.insecure_channel(node[0])
        await channel.channel_ready()
        return channel, pb_grpc.NodeStub(channel)

    channel, stub = loop.run_until_complete(connect())
    request = pb.GetStatusRequest()
    assert loop.run_until_complete(stub.GetStatus(request)).node == NODE
    yield AsyncCall(loop, lambda: stub.GetStatus(request))
    loop.run_until_complete(channel.close(None))
    loop.close()


def test_rpc(rows: Rows, rpc: AsyncCall) -> None:
    """The reference."""
    rows.time(Row("rpc", "status", "GetStatus RPC (grpc.aio)"), rpc, part=0.5, batch_s=BATCH_S)


def test_rpc_blocking(rows: Rows, node: tuple[str, str], rpc: AsyncCall) -> None:
    """The same by grpc's blocking client."""
    row = Row("rpc_blocking", "status", "GetStatus RPC, blocking client", reference=REFERENCE)
    with grpc.insecure_channel(node[0]) as channel:
        names = {
            "get_status": pb_grpc.NodeStub(channel).GetStatus,
            "request": pb.GetStatusRequest(),
        }
        subject = Statement("get_status(request)", names)
        rows.time(row, subject, rpc, part=0.5, batch_s=BATCH_S)


def test_status(rows: Rows, segment: shmcoord.Segment, rpc: AsyncCall) -> None:
    """The whole status as a Python object."""
    row = Row("status", "status", "segment.status", reference=REFERENCE, bar=Bar("faster", 1_000))
    assert segment.status(NODE).node == NODE
    subject = Statement("segment.status(node)", {"segment": segment, "node": NODE})
    rows.time(row, subject, rpc, part=0.5, batch_s=BATCH_S)


def test_record_compiled(rows: Rows, segment: shmcoord.Segment, rpc: AsyncCall) -> None:
    """The record, read by a compiled module that cimports shmcoord."""
    row = Row(
        "record_compiled",
        "status",
        "record read in compiled code",
        reference=REFERENCE,
        bar=Bar("faster", 100_000),
    )
    try:
        module = native.load()
    except native.NotBuiltError as reason:
        rows.skip(row, str(reason))
    slot = module.find_slot(segment, NODE)
    assert module.read_records(segment, slot, 1) == 0
    subject = Loop(lambda n: module.read_records(segment, slot, n))
    rows.time(row, subject, rpc, part=0.5, batch_s=BATCH_S)


def test_whole_record_compiled(rows: Rows, segment: shmcoord.Segment, rpc: AsyncCall) -> None:
    """The same with reserved words and room for sixteen gauges: the most that a record can be."""
    row = Row(
        "whole_record_compiled",
        "status",
        "the same with all 16 user gauges",
        reference=REFERENCE,
    )
    try:
        module = native.load()
    except native.NotBuiltError as reason:
        rows.skip(row, str(reason))
    slot = module.find_slot(segment, NODE)
    assert module.read_whole_records(segment, slot, 1) == 0
    subject = Loop(lambda n: module.read_whole_records(segment, slot, n))
    rows.time(row, subject, rpc, part=0.5, batch_s=BATCH_S)


def test_load_compiled(rows: Rows, segment: shmcoord.Segment, rpc: AsyncCall) -> None:
    """The load word alone: what routing reads."""
    row = Row("load_compiled", "status", "queue read in compiled code", reference=REFERENCE)
    try:
        module = native.load()
    except native.NotBuiltError as reason:
        rows.skip(row, str(reason))
    slot = module.find_slot(segment, NODE)
    subject = Loop(lambda n: module.read_queues(segment, slot, n))
    rows.time(row, subject, rpc, part=0.5, batch_s=BATCH_S)
