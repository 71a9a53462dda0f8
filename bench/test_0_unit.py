"""The unit that the core is held against."""

from __future__ import annotations

from bench.paired import Statement
from bench.plugin import Rows
from bench.report import Row


def test_empty_call(rows: Rows, unit: Statement) -> None:
    """One call of a function that does nothing."""
    rows.time(Row("empty_call", "unit", "empty Python function call (the unit)"), unit)


def test_empty_loop(rows: Rows, unit: Statement) -> None:
    """What every row that is timed as a statement carries with it."""
    row = Row("empty_loop", "unit", "the timing loop alone", reference="empty call")
    rows.time(row, Statement("pass"), unit)
