"""Gathers the rows of a run, and shows and saves them at its end."""

from __future__ import annotations

import time
from typing import Any

import pytest

from bench import machine, report
from bench.paired import Measured, Timed, measure


class Collector:
    """The pytest plugin that holds the rows of one run."""

    def __init__(self) -> None:
        self.rows: list[report.Row] = []
        self._machine = machine.describe()
        self._start = time.monotonic()

    def pytest_terminal_summary(self) -> None:
        """Prints the table and writes the JSON file."""
        if not self.rows:
            return
        report.show(self.rows, self._machine)
        path = report.save(self.rows, self._machine, time.monotonic() - self._start)
        print(f"written: {path}")


class Rows:
    """What a benchmark reports its rows to; knows how many rounds to run."""

    def __init__(self, collector: Collector, benchmark: Any, rounds: int) -> None:
        self._collector = collector
        self._benchmark = benchmark
        self._rounds = rounds

    def time(
        self,
        row: report.Row,
        subject: Timed,
        reference: Timed | None = None,
        *,
        part: float = 1.0,
        batch_s: float | None = None,
    ) -> Measured:
        """Measures the subject, against the reference if there is one, and adds the row.

        Args:
            row: the row, without its numbers.
            subject: what is measured.
            reference: what it is held against.
            part: so many of the usual number of rounds (for what is slow).
            batch_s: how long a batch lasts, if not as usual.
        """
        options = {} if batch_s is None else {"batch_s": batch_s}
        rounds = max(5, round(self._rounds * part))
        measured = measure(self._benchmark, subject, reference, rounds=rounds, **options)
        low, high = measured.quartiles_s
        row.value = measured.median_s
        row.spread = (high - low) / 2 / measured.median_s
        row.ratio = measured.ratio
        row.details |= {
            "quartiles_ns": [round(low * 1e9, 3), round(high * 1e9, 3)],
            "rounds": measured.rounds,
            "iterations": measured.iterations,
        }
        if measured.reference_s is not None and measured.ratio_quartiles is not None:
            row.details |= {
                "reference_ns": round(measured.reference_s * 1e9, 3),
                "ratio_quartiles": list(measured.ratio_quartiles),
            }
        self.add(row)
        return measured

    def add(self, row: report.Row) -> None:
        """Adds a row that was measured otherwise."""
        self._collector.rows.append(row)
        if self._benchmark is not None:
            self._benchmark.extra_info[row.key] = row.as_json()

    def skip(self, row: report.Row, reason: str) -> None:
        """Adds the row without a value, and skips the test."""
        row.skipped = reason
        self._collector.rows.append(row)
        pytest.skip(reason)
