"""The results: a file of JSON lines, one per cell, written as they come."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.report import RESULTS
from bench.tail.cell import Cell

FORMAT = 1


@dataclass(frozen=True)
class Setting:
    """Everything about a cell but the system and the seed: what may be compared."""

    shape: str
    arrivals: str
    load: float
    routers: int
    in_flight: int
    seconds: float

    @classmethod
    def of(cls, cell: dict[str, Any]) -> Setting:
        """The setting of a cell as it was saved."""
        return cls(**{name: cell[name] for name in cls.__dataclass_fields__})


def new_file() -> Path:
    """Path of a file for a run that begins now."""
    RESULTS.mkdir(exist_ok=True)
    return RESULTS / time.strftime("tail-%Y%m%d-%H%M%S.jsonl", time.gmtime())


def newest() -> Path:
    """The file of the last run.

    Raises:
        FileNotFoundError: there is none.
    """
    files = sorted(RESULTS.glob("tail-*.jsonl"))
    if not files:
        raise FileNotFoundError(f"no results in {RESULTS}: python -m bench.tail run")
    return files[-1]


def append(path: Path, line: dict[str, Any]) -> None:
    """Adds a line; after that it is kept, whatever happens."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def head(machine: dict[str, Any], proxies: Sequence[str]) -> dict[str, Any]:
    """The first line of a run."""
    return {
        "format": FORMAT,
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine,
        "proxies": list(proxies),
    }


def line(cell: Cell, figures: dict[str, Any]) -> dict[str, Any]:
    """The line of a cell."""
    return {"cell": asdict(cell), **figures}


def read(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The heads (one per run that wrote to the file) and the cells of a file."""
    lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    return [each for each in lines if "machine" in each], [each for each in lines if "cell" in each]


class Results:
    """Cells, by setting, system and seed. Of a cell that was measured twice the last counts."""

    def __init__(self, lines: Iterable[dict[str, Any]]) -> None:
        self._cells: dict[tuple[Setting, str, int], dict[str, Any]] = {}
        for each in lines:
            self.add(each)

    def add(self, line: dict[str, Any]) -> None:
        """One more cell."""
        cell = line["cell"]
        self._cells[Setting.of(cell), cell["system"], cell["seed"]] = line

    def settings(self) -> list[Setting]:
        """All settings, in the order in which they came."""
        return list(dict.fromkeys(setting for setting, _, _ in self._cells))

    def systems(self, setting: Setting) -> list[str]:
        """The systems that were measured in a setting."""
        return list(dict.fromkeys(name for each, name, _ in self._cells if each == setting))

    def of(self, setting: Setting, system: str) -> dict[int, dict[str, Any]]:
        """The cells of a system by seed."""
        return {
            seed: line
            for (each, name, seed), line in self._cells.items()
            if each == setting and name == system and "skipped" not in line
        }

    def skipped(self) -> dict[str, str]:
        """The systems that could not be measured, and why."""
        return {
            name: line["skipped"] for (_, name, _), line in self._cells.items() if "skipped" in line
        }

    def has(self, cell: Cell) -> bool:
        """Whether a cell has been measured."""
        return (Setting.of(asdict(cell)), cell.system, cell.seed) in self._cells


def figure(line: dict[str, Any], path: Sequence[str]) -> float:
    """A figure of a cell, such as ("latency_ms", "p99")."""
    value: Any = line
    for name in path:
        value = value[name]
    return float(value)


def paired(
    results: Results, setting: Setting, systems: Sequence[str], path: Sequence[str]
) -> Iterator[tuple[float, ...]]:
    """A figure of several systems, seed by seed, where all of them have it."""
    cells = [results.of(setting, system) for system in systems]
    for seed in sorted(set.intersection(*(set(each) for each in cells))):
        yield tuple(figure(each[seed], path) for each in cells)
