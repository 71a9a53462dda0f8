"""What `inspect --json` and `explain --json` print; described in docs/inspect-json.md and, for
programs, in inspect.schema.json and explain.schema.json."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from typing import Any

from shmcoord.cli.asking import Answer
from shmcoord.cli.reading import SegmentError, SegmentView
from shmcoord.decision import Decision
from shmcoord.status import Status

__all__ = ["VERSION", "dump", "dump_answer"]

VERSION = 1


def dump(views: Sequence[SegmentView | SegmentError], *, one_line: bool) -> str:
    """Return one JSON document, ASCII only, without a line end."""
    document = {
        "version": VERSION,
        "read_at": time.time(),
        "segments": [_segment(view) for view in views],
    }
    return json.dumps(document, indent=None if one_line else 2, allow_nan=False)


def dump_answer(answer: Answer, *, one_line: bool) -> str:
    """Return one JSON document of `explain`, ASCII only, without a line end."""
    document = {
        "version": VERSION,
        "read_at": time.time(),
        "decision": None if answer.decision is None else _decision(answer.decision),
        "decisions": [
            {
                "router": one.router,
                "pid": one.pid,
                "number": one.number,
                "age_s": _number(one.age_s),
                "outcome": one.outcome,
                "node": one.node or None,
                "queue": one.queue,
                "candidates": one.candidates,
                "waited_s": _number(one.waited_s),
            }
            for one in answer.past
        ],
        "missed": [
            {"router": gone.router, "pid": gone.pid, "count": gone.count} for gone in answer.missed
        ],
        "unreadable": [_segment(error) for error in answer.errors],
    }
    return json.dumps(document, indent=None if one_line else 2, allow_nan=False)


def _decision(decision: Decision) -> dict[str, Any]:
    chosen = decision.chosen
    return {
        "group": decision.group,
        "policy": decision.policy,
        "node": None if chosen is None else chosen.node,
        "endpoint": None if chosen is None else chosen.endpoint,
        "panic": decision.panic,
        "candidates": [
            {
                "node": one.node,
                "endpoint": one.endpoint,
                "segment": one.segment,
                "state": one.state.name,
                "health": one.health.name,
                "queue": one.queue,
                "capacity": one.capacity,
                "weight": _number(one.weight),
                "score": _number(one.score),
                "latency_s": _number(one.latency_s),
                "share": _number(one.share),
                "passed_over": one.passed_over or None,
            }
            for one in decision.candidates
        ],
    }


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
        "mirror": view.is_mirror,
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
