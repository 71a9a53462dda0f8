"""One row per thing measured, one table of them, one JSON file."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

RESULTS = Path(__file__).parent / "results"
SECTIONS = ("unit", "core", "status", "iceoryx2", "others", "size", "grpc")


@dataclass(frozen=True)
class Bar:
    """What a row must reach.

    Attributes:
        limit: the number.
        kind: which number of the row it limits, and from which side: `"<="` the ratio to the
            reference is at most so much; `"faster"` the subject is at least so many times as fast
            as the reference; `"slower"` the subject (a competitor) takes at least so many times as
            long as the reference (us); `"value"` the value itself is at most so much.
    """

    kind: str
    limit: float

    def text(self, unit: str) -> str:
        """Words for the table."""
        if self.kind == "value":
            return f"≤ {self.limit:g} {unit}"
        return f"≤ {self.limit:g} ×" if self.kind == "<=" else f"≥ {self.limit:,.0f} ×"


@dataclass
class Row:
    """One line of the table.

    Attributes:
        key: name in the JSON file; stays the same from release to release.
        section: one of SECTIONS, which is also the order in the table.
        what: name for people.
        value: median; seconds if `unit` is "s".
        unit: "s", "ms", "KiB" or "MiB".
        spread: half the distance of the quartiles, as a part of the median.
        reference: what it is held against.
        ratio: median of the ratios subject to reference of all rounds.
        bar: what must be reached, if anything.
        skipped: why there is no value.
        details: anything else for the JSON file.
    """

    key: str
    section: str
    what: str
    value: float | None = None
    unit: str = "s"
    spread: float | None = None
    reference: str = ""
    ratio: float | None = None
    bar: Bar | None = None
    skipped: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def reached(self) -> bool | None:
        """Whether the bar is reached; None if there is no bar, or nothing to hold to it."""
        number = self.value if self.bar and self.bar.kind == "value" else self.ratio
        if self.bar is None or number is None:
            return None
        if self.bar.kind == "faster":
            return 1 / number >= self.bar.limit
        if self.bar.kind == "slower":
            return number >= self.bar.limit
        return number <= self.bar.limit

    def as_json(self) -> dict[str, Any]:
        """The row as plain data, times in nanoseconds."""
        data = asdict(self)
        if self.unit == "s" and self.value is not None:
            data |= {"value": round(self.value * 1e9, 3), "unit": "ns"}
        return data | {"reached": self.reached}


def format_value(value: float, unit: str) -> str:
    """Three significant digits with a fitting unit."""
    if unit != "s":
        return f"{value:.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"
    for scale, name in ((1e-9, "ns"), (1e-6, "µs"), (1e-3, "ms")):
        if value < 999.5 * scale:
            number = value / scale
            digits = 2 if number < 10 else 1 if number < 100 else 0
            return f"{number:.{digits}f} {name}"
    return f"{value:.2f} s"


def format_ratio(row: Row) -> str:
    """The ratio as people say it: 1.4 ×, or 12,000 × faster."""
    if row.ratio is None:
        return ""
    if row.ratio < 0.1 or (row.bar is not None and row.bar.kind == "faster"):
        faster = 1 / row.ratio
        return f"{faster:,.0f} × faster" if faster >= 100 else f"{faster:.1f} × faster"
    return f"{row.ratio:,.0f} ×" if row.ratio >= 100 else f"{row.ratio:.2f} ×"


def ordered(rows: list[Row]) -> list[Row]:
    """The rows by section; within one, as they were measured."""
    return sorted(rows, key=lambda row: SECTIONS.index(row.section))


def _verdict(row: Row) -> Text:
    if row.bar is None:
        return Text("")
    if row.reached is None:
        return Text("?", style="yellow")
    return Text("yes", style="green") if row.reached else Text("NO", style="bold red")


def table(rows: list[Row], machine: dict[str, Any]) -> Table:
    """The rows as a table."""
    result = Table(title="shmcoord benchmarks", caption=machine_line(machine), title_style="bold")
    result.add_column("what")
    for name in ("median", "spread", "ratio"):
        result.add_column(name, justify="right")
    result.add_column("against")
    result.add_column("bar", justify="right")
    result.add_column("reached", justify="center")
    section = ""
    for row in ordered(rows):
        if section and row.section != section:
            result.add_section()
        section = row.section
        bar = row.bar.text(row.unit) if row.bar else ""
        if row.value is None:
            result.add_row(row.what, "–", "", "", f"skipped: {row.skipped}", bar, _verdict(row))
            continue
        result.add_row(
            row.what,
            format_value(row.value, row.unit),
            f"±{row.spread:.0%}" if row.spread is not None else "",
            format_ratio(row),
            row.reference,
            bar,
            _verdict(row),
        )
    return result


def machine_line(machine: dict[str, Any]) -> str:
    """The machine in one line."""
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['kernel']}, {machine['python']}, "
        f"grpcio {machine['packages'].get('grpcio', '–')}, load {machine['load_average'][0]}"
    )


def show(rows: list[Row], machine: dict[str, Any]) -> None:
    """Prints the table; whole also when the output is no terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print()
    console.print(table(rows, machine))


def missed(rows: list[Row]) -> list[Row]:
    """The rows whose bar is not reached, or could not be held against it."""
    return [row for row in rows if row.bar is not None and not row.reached]


def save(rows: list[Row], machine: dict[str, Any], seconds: float) -> Path:
    """Writes results/<time>.json, and the same as results/latest.json; returns the path."""
    RESULTS.mkdir(exist_ok=True)
    now = time.gmtime()
    data = {
        "format": 1,
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", now),
        "seconds": round(seconds, 1),
        "machine": machine,
        "rows": [row.as_json() for row in ordered(rows)],
    }
    text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    path = RESULTS / time.strftime("%Y%m%d-%H%M%S.json", now)
    path.write_text(text, encoding="utf-8")
    (RESULTS / "latest.json").write_text(text, encoding="utf-8")
    return path
