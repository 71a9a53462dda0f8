"""Draws the plots of docs/policies.md: PNG to look at, SVG to zoom into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from bench.children import ROOT
from bench.sim import studies
from bench.sim.crossing import FROM_THE_START, crossing
from bench.sim.engine import LEAST_FIRST
from bench.sim.sweep import Sweep

FOLDER = ROOT / "docs" / "img"

#: Okabe and Ito (2008): told apart also by who sees fewer colours.
COLOURS = {
    "least-loaded": "#0072B2",
    "power-of-two": "#009E73",
    "hot-cold": "#D55E00",
    "affinity": "#CC79A7",
    "round-robin": "#E69F00",
    "random": "#7F7F7F",
    LEAST_FIRST: "#000000",
    "late": "#56B4E9",
    "bound": "#000000",
}
#: A second sign beside the colour.
MARKERS = {
    "least-loaded": "o",
    "power-of-two": "s",
    "hot-cold": "^",
    "affinity": "D",
    "round-robin": "v",
    "random": "x",
    LEAST_FIRST: "P",
    "late": "*",
    "bound": "",
}

STYLE: dict[str, Any] = {
    "figure.dpi": 110,
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.0,
    "svg.fonttype": "none",
    "svg.hashsalt": "shmcoord",
    "legend.frameon": False,
}


def _number(value: float, _place: object = None) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def _log(axis: Any, ticks: Sequence[float]) -> None:
    axis.set_major_locator(FixedLocator(list(ticks)))
    axis.set_major_formatter(FuncFormatter(_number))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def log_x(axes: Axes, ticks: Sequence[float]) -> None:
    """A logarithmic x axis with these ticks."""
    axes.set_xscale("log")
    _log(axes.xaxis, ticks)


def log_y(axes: Axes) -> None:
    """A logarithmic y axis with four to nine round ticks where the data are."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [
            factor * 10.0**power
            for power in range(-3, 8)
            for factor in factors
            if low <= factor * 10.0**power <= high
        ]
        if len(ticks) >= 4:
            break
    _log(axes.yaxis, ticks)


class Labels:
    """Names at the right ends of lines, moved apart where they would overlap."""

    def __init__(self, axes: Axes) -> None:
        self._axes = axes
        self._names: list[tuple[float, str, str]] = []

    def add(self, y: float, name: str, colour: str) -> None:
        """A line of this name ends at y."""
        self._names.append((y, name, colour))

    def draw(self, height: float = 0.056) -> None:
        """Call when the axes have their final scale and limits; `height` is of a line of text."""
        to_part = (self._axes.transData + self._axes.transAxes.inverted()).transform
        x = self._axes.get_xlim()[1]
        rows = sorted((float(to_part((x, y))[1]), name, colour) for y, name, colour in self._names)
        places = [place for place, _, _ in rows]
        halves = [height * (1 + name.count("\n")) / 2 for _, name, _ in rows]
        for _ in range(500):  # push neighbours apart, and everybody below the top
            for i in range(len(places) - 1):
                lack = halves[i] + halves[i + 1] - (places[i + 1] - places[i])
                if lack > 0:
                    places[i] -= lack / 2
                    places[i + 1] += lack / 2
            places[-1] = min(places[-1], 1.0)
        for place, (_, name, colour) in zip(places, rows, strict=True):
            self._axes.text(
                1.02,
                place,
                name,
                color=colour,
                transform=self._axes.transAxes,
                va="center",
                fontsize=9,
                linespacing=1.0,
            )


def line(
    axes: Axes,
    labels: Labels | None,
    xs: Sequence[float],
    ys: Sequence[float],
    name: str,
    *,
    key: str = "",
    dashed: bool = False,
) -> None:
    """One line with its direct label."""
    key = key or name
    axes.plot(
        xs,
        ys,
        color=COLOURS[key],
        marker=MARKERS[key] or None,
        linestyle="--" if dashed else "-",
        markerfacecolor="white" if dashed else COLOURS[key],
    )
    if labels is not None:
        labels.add(ys[-1], name, COLOURS[key])


def _save(figure: Figure, name: str) -> list[Path]:
    FOLDER.mkdir(parents=True, exist_ok=True)
    paths = []
    for suffix in ("png", "svg"):
        path = FOLDER / f"policies-{name}.{suffix}"
        # No date inside: the same results give the same file.
        figure.savefig(
            path, bbox_inches="tight", metadata={"Date": None} if suffix == "svg" else {}
        )
        paths.append(path)
    plt.close(figure)
    return paths


def draw_ages(sweep: Sweep) -> Figure:
    """Median and p99 by the age of what routers see."""
    figure, both = plt.subplots(1, 2, figsize=(10.5, 4.2))
    live = studies.AGES[0] / 2  # where "live" is drawn on a logarithmic axis
    xs = [live * 1e3, *(age * 1e3 for age in studies.AGES)]
    for axes, key, title in zip(both, ("p50_s", "p99_s"), ("median", "p99"), strict=True):
        labels = Labels(axes) if key == "p99_s" else None
        for policy in studies.PLAIN:
            ys = [sweep.ms(studies.at_age(policy, age), key) for age in (0.0, *studies.AGES)]
            line(axes, labels, xs, ys, policy)
        ys = [
            sweep.ms(studies.at_age("least-loaded", age, own=True), key)
            for age in (0.0, *studies.AGES)
        ]
        line(
            axes, labels, xs, ys, "least-loaded,\nown sends added", key="least-loaded", dashed=True
        )
        log_x(axes, [1, 10, 100, 1000])
        axes.set_xlim(xs[0] * 0.8, xs[-1] * 1.15)
        log_y(axes)
        axes.set_xticks([live * 1e3, 1, 10, 100, 1000], ["live", "1", "10", "100", "1,000"])
        axes.set_title(title)
        axes.set_xlabel("age of the information, ms")
        axes.set_ylabel("time from arrival to end, ms")
        if labels:
            labels.draw()
    figure.tight_layout(w_pad=2.5)
    return figure


def draw_crossings(sweep: Sweep) -> Figure:
    """From which age on looking at the load loses."""
    figure, both = plt.subplots(1, 2, figsize=(10.5, 3.9), sharey=True)
    tops = []
    ends = []
    for axes, winner, title in zip(
        both,
        ("power-of-two", "round-robin"),
        ("power-of-two beats least-loaded", "round-robin beats least-loaded"),
        strict=True,
    ):
        labels = Labels(axes)
        for nodes, colour in zip(studies.GROUPS, ("#9ECAE1", "#4292C6", "#08306B"), strict=True):
            ys = []
            for routers in studies.ROUTERS:
                age = crossing(sweep, "least-loaded", winner, nodes=nodes, routers=routers)
                ys.append(1e3 * (2.0 if age is None else max(age, FROM_THE_START)))
            axes.plot(studies.ROUTERS, ys, color=colour, marker="o")
            labels.add(ys[-1], f"{nodes} nodes", colour)
            tops += ys
        log_x(axes, studies.ROUTERS)
        axes.set_yscale("log")
        axes.set_title(f"from here on {title}")
        axes.set_xlabel("routers")
        ends.append(labels)

    both[0].set_ylim(min(tops) * 0.6, max(tops) * 1.6)
    log_y(both[0])
    both[0].set_ylabel("age of the information, ms (p99)")
    for labels in ends:
        labels.draw()
    figure.tight_layout(w_pad=2.5)
    return figure


def draw_loads(sweep: Sweep) -> Figure:
    """P99 and median by load, live words."""
    figure, both = plt.subplots(1, 2, figsize=(10.5, 4.2))
    xs = [100 * load for load in studies.LOADS]
    for axes, key, title in zip(both, ("p50_s", "p99_s"), ("median", "p99"), strict=True):
        labels = Labels(axes) if key == "p99_s" else None
        for policy in studies.PLAIN:
            ys = [sweep.ms(studies.at_load(policy, load), key) for load in studies.LOADS]
            line(axes, labels, xs, ys, policy)
        ys = [sweep.ms(studies.alone(6, load=load), key) for load in studies.LOADS]
        line(
            axes,
            labels,
            xs,
            ys,
            "least requests,\neach router alone",
            key="least-loaded",
            dashed=True,
        )
        ys = [
            sweep.ms(studies.at_load("least-loaded", load, binding="late"), key)
            for load in studies.LOADS
        ]
        line(axes, labels, xs, ys, "waiting for capacity", key="late")
        log_y(axes)
        axes.set_title(title)
        axes.set_xlabel("load, % of what all nodes can do")
        axes.set_ylabel("time from arrival to end, ms")
        if labels:
            labels.draw()
    figure.tight_layout(w_pad=2.5)
    return figure


def draw_sizes(sweep: Sweep) -> Figure:
    """P99 by the size of the group."""
    figure, axes = plt.subplots(figsize=(6.4, 3.9))
    labels = Labels(axes)
    for policy in studies.PLAIN:
        sizes = [n for n in studies.SIZES if policy not in studies.BLIND or n <= 256]
        ys = [sweep.ms(studies.of_size(policy, nodes)) for nodes in sizes]
        line(axes, None, sizes, ys, policy)
        labels.add(ys[-1], policy, COLOURS[policy])
    ys = [sweep.ms(studies.of_size("least-loaded", n, binding="bound")) for n in studies.SIZES]
    line(axes, labels, studies.SIZES, ys, "one queue (bound)", key="bound", dashed=True)
    log_x(axes, studies.SIZES)
    log_y(axes)
    axes.set_xlabel("nodes")
    axes.set_ylabel("p99, ms")
    labels.draw()
    return figure


def draw_routers(sweep: Sweep) -> Figure:
    """P99 by the number of routers that do not share."""
    figure, axes = plt.subplots(figsize=(6.4, 3.9))
    labels = Labels(axes)
    xs = studies.ALONE
    for name, make, key, dashed in (
        ("shared, live", lambda r: studies.shared(r), "least-loaded", False),
        (
            "100 ms old,\nown sends added",
            lambda r: studies.at_age("least-loaded", 0.1, routers=r, load=0.85, own=True),
            "late",
            False,
        ),
        ("own requests only", lambda r: studies.alone(r), "least-loaded", True),
        ("round-robin", lambda r: studies.shared(r, policy="round-robin"), "round-robin", False),
        ("random", lambda r: studies.shared(r, policy="random"), "random", False),
    ):
        line(axes, labels, xs, [sweep.ms(make(r)) for r in xs], name, key=key, dashed=dashed)
    log_x(axes, xs)
    log_y(axes)
    axes.set_xlabel("routers")
    axes.set_ylabel("p99, ms")
    labels.draw()
    return figure


def draw_slow(sweep: Sweep) -> Figure:
    """P99 where a sixth of the nodes is slow and nobody said so."""
    figure, both = plt.subplots(1, 2, figsize=(10.5, 4.0), sharey=True)
    right = Labels(both[1])
    for axes, nodes in zip(both, (6, 48), strict=True):
        labels = right if axes is both[1] else None
        xs = studies.SLOW_SPEEDS
        for policy in studies.LOOKING:
            ys = [sweep.ms(studies.with_slow(policy, s, nodes=nodes), "mean_s") for s in xs]
            line(axes, labels, xs, ys, policy)
        ys = [
            sweep.ms(studies.with_slow("least-loaded", s, weights=True, nodes=nodes), "mean_s")
            for s in xs
        ]
        line(
            axes,
            labels,
            xs,
            ys,
            "least-loaded,\nspeeds as weights",
            key="least-loaded",
            dashed=True,
        )
        ys = [
            sweep.ms(studies.with_slow("least-loaded", s, nodes=nodes, binding="late"), "mean_s")
            for s in xs
        ]
        line(axes, labels, xs, ys, "waiting for capacity", key="late")
        ys = [
            sweep.ms(studies.with_slow("least-loaded", s, nodes=nodes, binding="bound"), "mean_s")
            for s in xs
        ]
        line(axes, labels, xs, ys, "one queue (bound)", key="bound", dashed=True)
        axes.set_title(f"{nodes // 6} of {nodes} nodes slow")
        axes.set_xlabel("speed of the slow nodes")
        axes.set_ylabel("mean time from arrival to end, ms" if nodes == 6 else "")

    both[0].invert_xaxis()
    both[1].invert_xaxis()
    both[0].set_ylim(0, None)
    for axes in both:
        axes.set_xticks(studies.SLOW_SPEEDS)
    right.draw()
    figure.tight_layout(w_pad=2.5)
    return figure


def draw_affinity(sweep: Sweep) -> Figure:
    """What affinity gains by how much a cached key saves."""
    figure, both = plt.subplots(1, 2, figsize=(10.5, 3.9), sharey=True)
    xs = [100 * (1 - factor) for factor in studies.HIT_FACTORS]
    right = Labels(both[1])
    for axes, nodes in zip(both, (6, 24), strict=True):
        labels = right if axes is both[1] else None
        for policy in studies.KEYED:
            if policy in studies.BLIND:
                continue
            ys = [
                sweep.ms(studies.keyed(policy, factor, nodes=nodes))
                for factor in studies.HIT_FACTORS
            ]
            line(axes, labels, xs, ys, policy)
        axes.set_title(f"{nodes} nodes")
        axes.set_xlabel("work that a cached key saves, %")
        axes.set_ylabel("p99, ms" if nodes == 6 else "")

    both[0].set_ylim(0, None)
    right.draw()
    figure.tight_layout(w_pad=2.5)
    return figure


def draw_bursts(sweep: Sweep) -> Figure:
    """P99 by how many requests arrive together."""
    figure, axes = plt.subplots(figsize=(6.4, 3.9))
    labels = Labels(axes)
    xs = studies.BURSTS
    for policy in studies.PLAIN:
        line(axes, labels, xs, [sweep.ms(studies.bursty(policy, b)) for b in xs], policy)
    ys = [sweep.ms(studies.bursty("least-loaded", b, binding="late")) for b in xs]
    line(axes, labels, xs, ys, "waiting for capacity", key="late")
    log_x(axes, xs)
    log_y(axes)
    axes.set_xlabel("requests that arrive together (mean)")
    axes.set_ylabel("p99, ms")
    labels.draw()
    return figure


def draw_binding(sweep: Sweep) -> Figure:
    """What binding early costs, by how many requests a node takes at once."""
    figure, axes = plt.subplots(figsize=(6.4, 3.9))
    labels = Labels(axes)
    colours = ("#999999", "#E69F00", "#0072B2", "#D55E00")
    for work, colour, marker in zip(studies.WORKS, colours, "vso^", strict=True):
        ys = [
            sweep.ms(studies.wide(c, work=work))
            / sweep.ms(studies.wide(c, binding="late", work=work))
            for c in studies.CAPACITIES
        ]
        axes.plot(studies.CAPACITIES, ys, color=colour, marker=marker)
        labels.add(ys[-1], work, colour)
    axes.axhline(1.0, color="#555555", linewidth=0.8)
    log_x(axes, studies.CAPACITIES)
    axes.set_xlabel("requests that a node takes at once")
    axes.set_ylabel("p99 of binding early / of waiting for capacity")
    labels.draw()
    return figure


PLOTS: dict[str, Callable[[Sweep], Figure]] = {
    "age": draw_ages,
    "crossing": draw_crossings,
    "load": draw_loads,
    "size": draw_sizes,
    "routers": draw_routers,
    "slow": draw_slow,
    "affinity": draw_affinity,
    "burst": draw_bursts,
    "binding": draw_binding,
}


def draw(sweep: Sweep) -> list[Path]:
    """Writes all plots; returns the files."""
    with plt.rc_context(STYLE):
        return [path for name, make in PLOTS.items() for path in _save(make(sweep), name)]
