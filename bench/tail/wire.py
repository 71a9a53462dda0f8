"""What routers and nodes say to each other: a few bytes, so that the balancing is measured."""

from __future__ import annotations

import struct

METHOD = "/shmcoord.bench.tail.Node/Work"
STREAM_METHOD = "/shmcoord.bench.tail.Node/Stream"
SERVICE, WORK = METHOD[1:].split("/")

WORK_REQUEST = struct.Struct("<I")
"""Work in microseconds."""

WORK_ANSWER = struct.Struct("<Bqq")
"""The node's number; when it began and ended the work, by CLOCK_MONOTONIC in nanoseconds."""

ORCA_KEY = "endpoint-load-metrics-bin"
"""Trailing metadata in which gRPC's weighted_round_robin finds a node's load report."""

_DOUBLE = struct.Struct("<Bd")
# Numbers of the fields of xds.data.orca.v3.OrcaLoadReport, and their type (64 bits).
_RPS_FRACTIONAL = 6 << 3 | 1
_APPLICATION_UTILIZATION = 9 << 3 | 1


def orca_report(rps: float, utilization: float) -> bytes:
    """An `xds.data.orca.v3.OrcaLoadReport`, serialized: two fields of type double.

    Args:
        rps: requests per second that the node has answered of late.
        utilization: part of the time that it was busy.
    """
    return _DOUBLE.pack(_RPS_FRACTIONAL, rps) + _DOUBLE.pack(_APPLICATION_UTILIZATION, utilization)
