"""Measures the tail of the latency: `python -m bench.tail run`, `python -m bench.tail report`.

Without options `run` measures the standard matrix, which takes about an hour. With --systems,
--shapes, --arrivals, --loads or --routers it measures these alone, each with each. Every cell is
saved as it comes: with --resume an interrupted run goes on where it ended.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench.machine import describe
from bench.tail import llm, matrix, store, table
from bench.tail.cell import Cell, measure, measure_streams
from bench.tail.proxies import ProxyMissing, versions
from bench.tail.summary import bound, summarize
from bench.tail.systems import BOUND, SYSTEMS
from bench.tail.trace import ARRIVALS, SHAPES


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.tail", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure")
    run.add_argument("--parts", nargs="+", metavar="PART", help="parts of the standard matrix")
    run.add_argument("--systems", nargs="+", choices=list(SYSTEMS), metavar="SYSTEM")
    run.add_argument("--shapes", nargs="+", choices=list(SHAPES), metavar="SHAPE")
    run.add_argument("--arrivals", nargs="+", choices=list(ARRIVALS), metavar="ARRIVALS")
    run.add_argument("--loads", nargs="+", type=float, metavar="LOAD", help="0.85 is 85 %%")
    run.add_argument("--routers", nargs="+", type=int, metavar="N")
    run.add_argument("--seeds", type=int, metavar="N")
    run.add_argument("--seconds", type=float, metavar="S", help="measured time of each cell")
    run.add_argument("--quick", action="store_true", help="one seed, two seconds each")
    run.add_argument("--resume", action="store_true", help="add what the last run has not measured")
    run.add_argument("--stop-after", type=float, metavar="S", help="begin no cell after so long")
    report = commands.add_parser("report", help="write docs/tail.md and its figures")
    report.add_argument("--results", type=Path, metavar="FILE", help="default: the last run")
    return parser.parse_args()


def _parts(options: argparse.Namespace) -> tuple[matrix.Part, ...]:
    wanted = (options.systems, options.shapes, options.arrivals, options.loads, options.routers)
    seconds = options.seconds or (2.0 if options.quick else None)
    if any(wanted):
        return matrix.chosen(
            options.systems or list(SYSTEMS),
            options.shapes or ["bimodal"],
            options.arrivals or ["poisson"],
            options.loads or [0.85],
            options.routers or [6],
            seconds or 12.0,
        )
    parts = matrix.standard(seconds, seconds) if seconds else matrix.standard()
    if options.parts:
        unknown = set(options.parts) - {part.name for part in parts}
        if unknown:
            sys.exit(f"no such part: {', '.join(unknown)}")
        parts = tuple(part for part in parts if part.name in options.parts)
    if options.quick:
        parts = parts[:1] if not options.parts else parts
    return parts


def _figures(cell: Cell) -> dict[str, Any]:
    if cell.shape == llm.SHAPE:
        streams = measure_streams(cell)
        return llm.summarize(np.concatenate(streams.records), streams.cpu, streams.busy)
    return summarize(cell, measure(cell))


def _has_bound(cell: Cell) -> bool:
    return not cell.in_flight and not cell.overload and cell.shape in SHAPES


def _measure(path: Path, cells: Sequence[tuple[str, Cell]], ends: float) -> None:
    """Measures what is not yet in the file."""
    done = store.Results(store.read(path)[1])
    missing: dict[str, str] = {}
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as progress:
        task = progress.add_task("", total=len(cells))
        for part, cell in cells:
            progress.update(task, description=f"{part}: seed {cell.seed}, {cell.system}")
            reference = replace(cell, system=BOUND, routers=cell.routers)
            if _has_bound(cell) and not done.has(reference):
                store.append(path, line := store.line(reference, bound(reference)))
                done.add(line)
            if not done.has(cell):
                if time.monotonic() > ends:
                    break
                try:
                    if cell.system in missing:
                        raise ProxyMissing(missing[cell.system])
                    figures = _figures(cell)
                except ProxyMissing as error:
                    missing[cell.system] = str(error)
                    figures = {"skipped": str(error)}
                store.append(path, line := store.line(cell, figures))
                done.add(line)
            progress.advance(task)


def _show(path: Path) -> None:
    heads, lines = store.read(path)
    console = Console()
    if not console.is_terminal:
        console = Console(width=170)
    table.show(console, store.Results(lines), heads[-1]["machine"])
    console.print(str(path))


def main() -> int:
    """Measures or reports."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is stopped
    options = _arguments()
    if options.command == "report":
        from bench.tail import document  # matplotlib is not needed to measure

        path = options.results or store.newest()
        _show(path)
        heads, lines = store.read(path)
        print(document.write(store.Results(lines), heads))
        return 0
    path = store.newest() if options.resume else store.new_file()
    store.append(path, store.head(describe(), versions()))
    seeds = options.seeds or (1 if options.quick else matrix.SEEDS)
    cells = list(matrix.in_order(_parts(options), seeds))
    ends = time.monotonic() + (options.stop_after or float("inf"))
    _measure(path, cells, ends)
    _show(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
