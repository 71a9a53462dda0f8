"""The tables of a run in the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.report import machine_line
from bench.tail import llm
from bench.tail.bars import Bar, bars, compare
from bench.tail.stats import Estimate, mean
from bench.tail.store import Results, Setting, figure
from bench.tail.systems import BOUND, MAIN, SYSTEMS
from bench.tail.trace import SHAPES

LATENCIES = ("p50", "mean", "p99", "p99.9")


def title_of(system: str) -> str:
    """The name of a system for people."""
    if system == BOUND:
        return "one queue (bound)"
    return llm.WAYS[system].title if system in llm.WAYS else SYSTEMS[system].title


def setting_title(setting: Setting) -> str:
    """The setting in a line."""
    routers = f"{setting.routers} router{'s' if setting.routers > 1 else ''}"
    if setting.in_flight:
        return f"closed loop, {setting.in_flight} in flight without work, {routers}"
    if setting.shape == llm.SHAPE:
        rate = setting.load * llm.FULL_RATE
        return f"language model, {rate:.3g} requests/s, Poisson arrivals, {routers}"
    shape = SHAPES[setting.shape].title
    arrivals = "Poisson" if setting.arrivals == "poisson" else setting.arrivals
    return f"{setting.load * 100:g} % load, {arrivals} arrivals, {shape}, {routers}"


def order(results: Results, setting: Setting) -> list[str]:
    """The systems of a setting: the bound, then as in SYSTEMS."""
    known = [BOUND, *SYSTEMS, *llm.WAYS]
    return sorted(results.systems(setting), key=known.index)


def milliseconds(value: float) -> str:
    """Three digits."""
    if math.isnan(value):
        return "–"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def times(found: Estimate | None) -> str:
    """A ratio with its interval."""
    if found is None:
        return "–"
    return f"{found.value:.2f} × [{found.low:.2f}, {found.high:.2f}]"


def rows(results: Results, setting: Setting) -> Iterator[tuple[str, list[str]]]:
    """Each system and its cells of the table: see `columns`."""
    if setting.shape == llm.SHAPE:
        yield from _stream_rows(results, setting)
        return
    for system in order(results, setting):
        cells = list(results.of(setting, system).values())
        if not cells:
            continue
        latencies = [
            milliseconds(mean([figure(c, ("latency_ms", name)) for c in cells]).value)
            for name in LATENCIES
        ]
        against = (
            ""
            if system == MAIN
            else times(compare(results, setting, MAIN, system, ("latency_ms", "p99")))
        )
        yield system, [title_of(system), *latencies, against, *_usage(cells)]


def columns(setting: Setting) -> tuple[str, ...]:
    """Names of the columns of `rows`."""
    return STREAM_COLUMNS if setting.shape == llm.SHAPE else COLUMNS


def _stream_rows(results: Results, setting: Setting) -> Iterator[tuple[str, list[str]]]:
    for system in order(results, setting):
        cells = list(results.of(setting, system).values())
        against = compare(results, setting, "llm-least-cost", system, ("latency_ms", "p99"))
        yield (
            system,
            [
                title_of(system),
                *(
                    milliseconds(mean([figure(c, (what, name)) for c in cells]).value)
                    for what in ("first_token_ms", "latency_ms", "per_token_ms")
                    for name in ("p50", "p99")
                ),
                "" if system == "llm-least-cost" else times(against),
                f"{sum(c['answered'] for c in cells) / sum(c['requests'] for c in cells):.1%}",
            ],
        )


STREAM_COLUMNS = (
    "system",
    *(
        f"{what} {name} ms"
        for what in ("first token", "last token", "per token")
        for name in ("p50", "p99")
    ),
    "last token p99 of least cost against it",
    "answered",
)
COLUMNS = (
    "system",
    *(f"{name} ms" for name in LATENCIES),
    "p99 of shmcoord against it",
    "CPU µs",
    "gap ms",
    "in time /s",
    "refused",
    "busy",
)


def _usage(cells: list[dict[str, Any]]) -> list[str]:
    if "cpu_us" not in cells[0]:
        return [""] * 5
    cpu = mean([sum(c["cpu_us"].values()) for c in cells]).value
    gap = [c["idle_gap_ms"]["p50"] for c in cells if c["idle_gap_ms"]]
    requests = sum(c["requests"] for c in cells)
    refused = sum(c["refused"] for c in cells) / max(1, requests)
    return [
        f"{cpu:,.0f}",
        f"{mean(gap).value:.2f}" if gap else "",
        f"{mean([c['goodput'] for c in cells]).value:,.0f}",
        f"{refused:.1%}" if refused else "",
        f"{mean([c['machine_busy'] for c in cells]).value:.0%}",
    ]


def setting_table(results: Results, setting: Setting) -> Table:
    """The systems of one setting."""
    seeds = {seed for name in results.systems(setting) for seed in results.of(setting, name)}
    table = Table(
        title=f"{setting_title(setting)}; {len(seeds)} × {setting.seconds:g} s",
        title_justify="left",
    )
    for name in columns(setting):
        table.add_column(name, justify="left" if name == "system" else "right")
    for system, cells in rows(results, setting):
        table.add_row(*cells, style="bold" if system == MAIN else "")
    return table


def verdict(bar: Bar) -> str:
    """Whether a bar is reached, in a word."""
    return "not measured" if bar.reached is None else "yes" if bar.reached else "NO"


def found_text(bar: Bar) -> str:
    """What was found for a bar."""
    if bar.found is None:
        return "–"
    if bar.against:
        return times(bar.found)
    return f"{bar.found.value:.3g} [{bar.found.low:.3g}, {bar.found.high:.3g}]"


def bar_text(bar: Bar) -> str:
    """What must be reached."""
    sign = {"<=": "≤", ">=": "≥", "<": "<"}[bar.sign]
    return f"{sign} {bar.limit:g}{' ×' if bar.against else ''}"


def bars_table(results: Results) -> Table:
    """The bars."""
    table = Table(title="must reach (shmcoord, waits for capacity)", title_justify="left")
    table.add_column("what")
    table.add_column("against")
    table.add_column("where")
    table.add_column("bar", justify="right")
    table.add_column("found", justify="right")
    table.add_column("reached", justify="center")
    styles = {True: "green", False: "bold red", None: "yellow"}
    for bar in bars(results):
        against = title_of(bar.against) if bar.against else ""
        word = Text(verdict(bar), style=styles[bar.reached])
        table.add_row(bar.what, against, bar.setting, bar_text(bar), found_text(bar), word)
    return table


def show(console: Console, results: Results, machine: dict[str, Any]) -> None:
    """Prints all tables."""
    for setting in results.settings():
        console.print(setting_table(results, setting), "")
    console.print(bars_table(results))
    for system, why in results.skipped().items():
        console.print(f"{title_of(system)} was skipped: {why}")
    console.print(machine_line(machine))
