"""docs/tail.md: the tables and figures of a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.children import ROOT
from bench.tail import plots, table
from bench.tail.bars import bars
from bench.tail.cell import OVERLOAD_DEADLINE_S, OVERLOAD_QUEUE_S, OVERLOAD_WAITERS
from bench.tail.store import Results, Setting

DOCS = ROOT / "docs"

_INTRODUCTION = f"""\
# The tail of the latency

Six gRPC nodes, each of which works on one request at a time, are sent the same requests through
every way to balance them that is in use today. The requests come when they come (open loop), and a
latency counts from the time when a request was due. This page is written by
`python -m bench.tail report`; [bench/README.md](../bench/README.md) says how it is measured.

*One queue (bound)* is computed, not measured: one first-come queue in front of all nodes, in which
no message takes any time. Columns: *gap* is how long a node stood still (median) between two
requests of which the second had already arrived; *CPU* is that of routers, nodes and proxy per
request; *busy* is the part of the machine's CPU time that was in use by anybody. Where not
everybody can be served (120 % load), an answer counts for nothing that comes later than
{OVERLOAD_DEADLINE_S * 1e3:g} ms after the arrival, HAProxy and shmcoord's routers refuse who has
waited for {OVERLOAD_QUEUE_S * 1e3:g} ms, and shmcoord's routers refuse at once who would be the
{OVERLOAD_WAITERS + 1}st to wait. Ratios are geometric means of the seeds' own ratios; in brackets
their 95 % confidence interval (bootstrap over the seeds).
"""

_CAPTIONS = {
    "distribution-70": "Latency by percentile at 70 % load",
    "distribution-85": "Latency by percentile at 85 % load",
    "ranking-70": "Median and p99 at 70 % load",
    "ranking-85": "Median and p99 at 85 % load",
    "loads": "p99 by load",
    "routers": "p99 by the number of router processes",
}


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def _bars(results: Results) -> Iterator[str]:
    rows = [
        (
            bar.what,
            table.title_of(bar.against) if bar.against else "",
            bar.setting,
            table.bar_text(bar),
            table.found_text(bar),
            table.verdict(bar),
        )
        for bar in bars(results)
    ]
    yield "## What must be reached\n"
    yield from _table(("what", "against", "where", "bar", "found", "reached"), rows)


def _setting(results: Results, setting: Setting) -> Iterator[str]:
    seeds = {seed for name in results.systems(setting) for seed in results.of(setting, name)}
    yield f"### {table.setting_title(setting)}\n"
    yield f"{len(seeds)} seeds, {setting.seconds:g} s measured of each.\n"
    rows = (cells for _, cells in table.rows(results, setting))
    yield from _table(table.columns(setting), rows)


def text(results: Results, machine: str, names: Sequence[str]) -> str:
    """The whole page."""
    lines = [_INTRODUCTION, machine + "\n", *_bars(results), "## Figures\n"]
    lines += [
        f"![{_CAPTIONS.get(name, name)}](img/tail-{name}.svg)\n"
        for name in sorted(names, key=list(_CAPTIONS).index)
    ]
    lines.append("## All that was measured\n")
    for setting in results.settings():
        lines += _setting(results, setting)
    lines += [
        f"{table.title_of(system)} was skipped: {why}\n"
        for system, why in results.skipped().items()
    ]
    return "\n".join(lines).rstrip() + "\n"


def write(results: Results, heads: Sequence[dict[str, Any]], docs: Path = DOCS) -> Path:
    """Writes the page and its figures; returns the page's path."""
    machine = heads[-1]["machine"]
    packages = machine["packages"]
    proxies = heads[-1]["proxies"]
    line = (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['kernel']}, {machine['python']}, "
        f"grpcio {packages.get('grpcio', '–')}, {''.join(f'{each}, ' for each in proxies)}"
        f"shmcoord {packages.get('shmcoord', '–')} ({machine['commit']}), "
        f"{heads[-1]['measured_at'][:10]}."
    )
    names = plots.save(results, docs / "img", line)
    page = docs / "tail.md"
    page.write_text(text(results, line, names), encoding="utf-8")
    return page
