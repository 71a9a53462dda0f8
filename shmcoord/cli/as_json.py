"""What `inspect --json` prints; described in docs/inspect-json.md and inspect.schema.json."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from typing import Any

from shmcoord.cli.reading import SegmentError, SegmentView
from shmcoord.status import Status

__all__ = ["VERSION", "dump"]

VERSION = 1


def dump(views: Sequence[SegmentView | SegmentError], *, one_line: bool) -> str:
    """Return one JSON document, ASCII only, without a line end."""
    document = {
        "version": VERSION,
        "read_at": time.time(),
        "segments": [_segment(view) for view in views],
    }
    return json.dumps(document, indent=None if one_line else 2, allow_nan=False)


def _segment(view: SegmentView | SegmentError) -> dict[str, Any]:
    if isinstance(view, SegmentError):
        return {
            "name": view.name,
            "error": {"kind": type(view.error).__name__, "message": str(view.error)},
        }
    return {
        "name": view.name,
        "slots": view.slots,
        "used": len(view.nodes),
        "leases": view.leases,
        "size_bytes": view.size_bytes,
        "created_at": view.created_at,
        "nodes": [_node(status) for status in view.nodes],
    }


def _node(status: Status) -> dict[str, Any]:
    return {
        "node": status.node,
        "group": status.group,
        "endpoint": status.endpoint,
        "pid": status.pid,
        "state": status.state.name,
        "health": status.health.name,
        "queue": status.queue,
        "waiting": status.waiting,
        "inflight": status.inflight,
        "capacity": status.capacity,
        "weight": _number(status.weight),
        "memory_bytes": status.memory_bytes,
        "cpu_percent": _number(status.cpu_percent),
        "served": status.served,
        "failed": status.failed,
        "latency_s": _number(status.latency_s),
        "uptime_s": _number(status.uptime_s),
        "heartbeat_age_s": _number(status.heartbeat_age_s),
        "gauges": {name: _number(value) for name, value in status.gauges.items()},
    }


def _number(value: float) -> float | None:
    """Return the number, or None for what JSON cannot express."""
    return value if math.isfinite(value) else None
