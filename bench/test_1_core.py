"""The core, held against an empty Python call."""

from __future__ import annotations

from contextlib import closing

import pytest

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


@pytest.mark.parametrize("load", MANY)
def test_pick_many(load: str, rows: Rows, unit: Statement) -> None:
    """The least loaded of 1,024, held by one process; the bar is for either load."""
    nodes = MANY[load]
    row = Row(
        f"pick_1024_{load.replace(' ', '_')}",
        "core",
        f"router.pick of 1,024, {load}",
        reference=REFERENCE,
        bar=Bar("<=", 60),
    )
    with (
        segment_of([nodes], slots=len(nodes) + 8) as segment,
        closing(shmcoord.Router(segment.name)) as router,
    ):
        queues = [status.queue for status in segment.snapshot()]
        assert len(queues) == len(nodes)
        assert segment.backend(router.pick(GROUP).node).queue == min(queues)
        rows.time(row, Statement("router.pick(group)", {"router": router, "group": GROUP}), unit)
