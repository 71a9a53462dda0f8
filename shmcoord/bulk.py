"""Statuses in bulk: one structured NumPy array."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy

from shmcoord.status import Status

__all__ = ["DTYPE", "to_numpy"]

#: One row per node; texts as long as the segment has room for.
DTYPE = numpy.dtype(
    [
        ("node", "U63"),
        ("group", "U63"),
        ("endpoint", "U255"),
        ("state", numpy.uint8),
        ("health", numpy.uint8),
        ("queue", numpy.uint32),
        ("waiting", numpy.uint32),
        ("inflight", numpy.uint32),
        ("capacity", numpy.uint32),
        ("weight", numpy.float64),
        ("memory_bytes", numpy.uint64),
        ("cpu_percent", numpy.float64),
        ("served", numpy.uint64),
        ("failed", numpy.uint64),
        ("latency_s", numpy.float64),
        ("pid", numpy.uint32),
        ("uptime_s", numpy.float64),
        ("heartbeat_age_s", numpy.float64),
    ]
)


def to_numpy(statuses: Sequence[Status]) -> numpy.ndarray[Any, Any]:
    """An array of shape (len(statuses),) with the fields of `DTYPE`."""
    names = DTYPE.names or ()
    rows = [tuple(getattr(status, name) for name in names) for status in statuses]
    return numpy.array(rows, dtype=DTYPE)
