"""Runs many points on all cores, and keeps what came out in one JSON file."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

from bench import machine
from bench.report import RESULTS
from bench.sim import engine
from bench.sim.engine import Point
from bench.sim.studies import expense

FORMAT = 1
PATH = RESULTS / "policies.json"


class NotSimulatedError(LookupError):
    """A result is asked for that the sweep has not made."""


@dataclass(frozen=True)
class Sweep:
    """The results of a sweep, by point.

    Attributes:
        results: for each point, `Result.as_json()`.
        machine: where it ran, and with which versions.
        swept_at: when it ended, UTC.
        seconds: how long it took.
    """

    results: dict[Point, dict[str, Any]]
    machine: dict[str, Any]
    swept_at: str
    seconds: float

    def of(self, point: Point) -> dict[str, Any]:
        """The result of a point.

        Raises:
            NotSimulatedError: it is not in this sweep.
        """
        try:
            return self.results[point]
        except KeyError:
            raise NotSimulatedError(f"not in the sweep: {point}") from None

    def ms(self, point: Point, key: str = "p99_s") -> float:
        """A time of a point, in milliseconds."""
        return float(self.of(point)[key]["value"]) * 1e3

    def only(self, points: Iterable[Point]) -> Sweep:
        """Without what is not among the points."""
        wanted = set(points)
        return replace(self, results={p: r for p, r in self.results.items() if p in wanted})

    def save(self, path: Path = PATH) -> None:
        """Writes the file; `load` reads it."""
        rows = [
            {"point": _as_json(point), "result": result} for point, result in self.results.items()
        ]
        data = asdict(replace(self, results={})) | {"format": FORMAT, "rows": rows}
        del data["results"]
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(data, allow_nan=False) + "\n", encoding="utf-8")


def _as_json(point: Point) -> dict[str, Any]:
    return {key: "inf" if value == math.inf else value for key, value in asdict(point).items()}


def load(path: Path = PATH) -> Sweep:
    """Reads what `Sweep.save` wrote."""
    data = json.loads(path.read_text(encoding="utf-8"))
    if data["format"] != FORMAT:
        raise ValueError(f"{path} has format {data['format']}, not {FORMAT}")
    results = {
        Point(**row["point"] | {"age_s": float(row["point"]["age_s"])}): row["result"]
        for row in data["rows"]
    }
    return Sweep(results, data["machine"], data["swept_at"], data["seconds"])


def _simulate(point: Point) -> tuple[Point, dict[str, Any]]:
    return point, engine.simulate(point).as_json()


def run(points: Iterable[Point], *, workers: int | None = None, kept: Sweep | None = None) -> Sweep:
    """Simulates the points, the longest first, in as many processes as there are cores.

    Args:
        points: what to simulate.
        workers: processes, if not as many.
        kept: results of before; what is in it is not simulated again.
    """
    engine.module()  # built once, before there are several that would build it
    results: dict[Point, dict[str, Any]] = dict(kept.results) if kept else {}
    todo = sorted((point for point in points if point not in results), key=expense, reverse=True)
    start = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with (
        context.Pool(workers or len(os.sched_getaffinity(0))) as pool,
        Progress(transient=True) as progress,
    ):
        task = progress.add_task("simulating", total=sum(map(expense, todo)))
        for point, result in pool.imap_unordered(_simulate, todo):
            results[point] = result
            progress.advance(task, expense(point))
    return Sweep(
        results,
        machine.describe(),
        time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        round(time.monotonic() - start + (kept.seconds if kept else 0.0), 1),
    )
