"""Other stores that hold the same six records; each against what shmcoord does in its place."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from bench.children import children
from bench.paired import Statement
from bench.plugin import Rows
from bench.report import Bar, Row
from bench.stores import NAMES, Reading, UnavailableError
from bench.stores.record import HELD, QUEUES

TITLES = {
    "iceoryx2": "iceoryx2 blackboard",
    "redis": "Redis, Unix socket",
    "manager": "multiprocessing.Manager",
    "lmdb": "LMDB",
    "shared_memory": "shared_memory + struct",
}
QUEUE_BAR = {"iceoryx2": Bar("slower", 10)}
LEAST_BAR = {"iceoryx2": Bar("slower", 60)}


def _section(name: str) -> str:
    return "iceoryx2" if name == "iceoryx2" else "others"


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"bench.stores.{name}")


@contextmanager
def _reading(name: str, place: Path) -> Iterator[Reading]:
    module = _module(name)
    with children([["bench.stores.writer", name, str(place)]]), module.reading(place) as reading:
        assert eval(reading.queue, dict(reading.names)) == QUEUES[HELD]
        assert QUEUES[reading.least()] == min(QUEUES)
        yield reading


@pytest.mark.parametrize("name", NAMES)
def test_queue(name: str, rows: Rows, place: Path, queue: Statement) -> None:
    """Reads one field of one record."""
    row = Row(
        f"{name}_queue",
        _section(name),
        f"{TITLES[name]}: queue of one node",
        reference="backend.queue",
        bar=QUEUE_BAR.get(name),
    )
    try:
        with _reading(name, place) as reading:
            rows.time(row, Statement(reading.queue, reading.names), queue)
    except UnavailableError as reason:
        rows.skip(row, str(reason))


@pytest.mark.parametrize("name", NAMES)
def test_least(name: str, rows: Rows, place: Path, pick: Statement) -> None:
    """Finds the shortest queue; looks neither at states nor at who is alive."""
    row = Row(
        f"{name}_least",
        _section(name),
        f"{TITLES[name]}: least of six",
        reference="router.pick of 6",
        bar=LEAST_BAR.get(name),
    )
    try:
        with _reading(name, place) as reading:
            rows.time(row, Statement("least()", {"least": reading.least}), pick)
    except UnavailableError as reason:
        rows.skip(row, str(reason))


def test_iceoryx2_unchanged(rows: Rows, place: Path, queue: Statement) -> None:
    """What a reader that keeps the last value pays while nothing is written."""
    row = Row(
        "iceoryx2_unchanged",
        "iceoryx2",
        "iceoryx2 blackboard: only ask whether it changed",
        reference="backend.queue",
    )
    try:
        with _reading("iceoryx2", place) as reading:
            rows.time(row, Statement(reading.unchanged, reading.names), queue)
    except UnavailableError as reason:
        rows.skip(row, str(reason))
