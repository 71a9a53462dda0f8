"""The core, held against an empty Python call."""

from __future__ import annotations

from contextlib import closing

import shmcoord
from bench.nodes import GROUP, MANY, segment_of
from bench.paired import Statement
from bench.plugin import Rows
from bench.report import Bar, Row

REFERENCE = "empty call"


def test_queue(rows: Rows, queue: Statement, unit: Statement) -> None:
    """A live attribute: one load from shared memory."""
    row = Row("queue", "core", "backend.queue", reference=REFERENCE, bar=Bar("<=", 2))
    rows.time(row, queue, unit)


def test_pick(rows: Rows, pick: Statement, unit: Statement) -> None:
    """The least loaded of six, dead and draining nodes left out."""
    row = Row("pick_6", "core", "router.pick of 6", reference=REFERENCE, bar=Bar("<=", 3))
    rows.time(row, pick, unit)


def test_acquire_release(rows: Rows, router: shmcoord.Router, unit: Statement) -> None:
    """Pick, reserve, free."""
    row = Row(
        "acquire_release_6",
        "core",
        "router.acquire + release, 6 nodes",
        reference=REFERENCE,
        bar=Bar("<=", 12),
    )
    names = {"router": router, "group": GROUP}
    rows.time(row, Statement("router.acquire(group).release()", names), unit)


def test_pick_many(rows: Rows, unit: Statement) -> None:
    """The least loaded of 1,024: one process holds them all."""
    row = Row("pick_1024", "core", "router.pick of 1,024", reference=REFERENCE, bar=Bar("<=", 60))
    with (
        segment_of([MANY], slots=len(MANY) + 8) as segment,
        closing(shmcoord.Router(segment.name)) as router,
    ):
        assert len(segment.snapshot()) == len(MANY)
        assert segment.backend(router.pick(GROUP).node).queue == 0
        rows.time(row, Statement("router.pick(group)", {"router": router, "group": GROUP}), unit)
