"""`python -m bench.sim`: simulate one point, or all that docs/policies.md shows."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from bench.sim import engine, studies, sweep
from bench.sim.engine import Estimate, Point

_CHOICES = {
    "work": engine.WORKS,
    "binding": engine.BINDINGS,
    "phases": engine.PHASES,
    "cost": engine.COSTS,
    "latency": engine.LATENCIES,
}


def _help() -> dict[str, str]:
    """What the docstring of Point says of each attribute."""
    text = inspect.getdoc(Point) or ""
    parts = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", text, re.MULTILINE)
    return {name: " ".join(words.split()) for name, words in parts}


def _options(command: Callable[..., Any]) -> Callable[..., Any]:
    """An option for each attribute of a point."""
    helps = _help()
    for field in reversed(fields(Point)):
        name = field.name.removesuffix("_s").replace("_", "-")
        if isinstance(field.default, bool):
            option = click.option(f"--{name}", field.name, is_flag=True, help=helps[field.name])
        else:
            choices = engine.policies() if field.name == "policy" else _CHOICES.get(field.name)
            option = click.option(
                f"--{name}",
                field.name,
                type=click.Choice(choices) if choices else type(field.default),
                default=field.default,
                show_default=True,
                help=helps[field.name],
            )
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Simulates policies with the scans that routers call."""


@main.command()
@_options
@click.option("--json", "is_json", is_flag=True, help="Print JSON.")
def point(is_json: bool, **options: Any) -> None:
    """Simulate one point. Times are in seconds."""
    try:
        result = engine.simulate(Point(**options))
    except ValueError as reason:
        raise click.UsageError(str(reason)) from None
    if is_json:
        click.echo(json.dumps(result.as_json()))
        return
    table = Table("", "", "standard error", box=None)
    for name in ("mean", "p50", "p90", "p99", "p999"):
        estimate: Estimate = getattr(result, f"{name}_s")
        table.add_row(name, f"{estimate.value * 1e3:,.2f} ms", f"{estimate.error * 1e3:,.2f} ms")
    table.add_row("max", f"{result.max_s * 1e3:,.2f} ms")
    table.add_row("requests", f"{result.measured:,}")
    table.add_row("utilisation", f"{result.utilisation:.3f}")
    table.add_row("in the system", f"{result.in_system:,.2f}")
    table.add_row("by Little's law", f"{result.in_system / result.little:,.2f}")
    table.add_row("most to one node", f"{result.imbalance:.2f} × the mean")
    if options["binding"] != "early":
        table.add_row("waited", f"{result.waited:.1%}")
    if options["cache"]:
        table.add_row("in the cache", f"{result.hit_ratio:.1%}")
    Console().print(table)


@main.command(name="sweep")
@click.option(
    "--study",
    "names",
    multiple=True,
    type=click.Choice(list(studies.STUDIES)),
    help="Only this one; may be given several times. [default: all]",
)
@click.option("--workers", type=int, help="Processes. [default: as many as cores]")
@click.option(
    "--keep", is_flag=True, help="Keep what the file has, and simulate only what it has not."
)
@click.option(
    "--output", type=click.Path(path_type=Path), default=sweep.PATH, show_default="policies.json"
)
def sweep_command(names: tuple[str, ...], workers: int | None, keep: bool, output: Path) -> None:
    """Simulate all points of docs/policies.md; writes a JSON file that `report` reads."""
    kept = sweep.load(output) if keep and output.exists() else None
    points = studies.points(names)
    if kept and not names:
        kept = kept.only(points)
    done = sweep.run(points, workers=workers, kept=kept)
    done.save(output)
    requests = sum(point.requests for point in done.results)
    click.echo(
        f"{len(done.results):,} points, {requests / 1e6:,.0f} million requests in "
        f"{done.seconds:,.0f} s; written: {output}"
    )


@main.command()
@click.option(
    "--input",
    "source",
    type=click.Path(path_type=Path),
    default=sweep.PATH,
    show_default="policies.json",
)
def report(source: Path) -> None:
    """Draw the plots and fill in the figures of docs/policies.md."""
    from bench.sim import page, plots  # matplotlib takes a second to import

    done = sweep.load(source)
    for path in (*plots.draw(done), page.fill(done)):
        click.echo(f"written: {path}")


if __name__ == "__main__":
    main(prog_name="python -m bench.sim")
