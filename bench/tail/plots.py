"""The figures of a run, as PNG and SVG."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bench.tail.stats import mean
from bench.tail.store import Results, Setting, figure
from bench.tail.summary import decode, merged
from bench.tail.systems import BOUND, MAIN
from bench.tail.table import milliseconds, order, setting_title, title_of

# Okabe and Ito's colours, which can be told apart by those who see fewer; and dashes, for print.
_LOOKS: dict[str, tuple[str, str]] = {
    BOUND: ("#000000", ":"),
    MAIN: ("#D55E00", "-"),
    "shmcoord-least-loaded": ("#D55E00", "--"),
    "haproxy-maxconn1": ("#0072B2", "-"),
    "haproxy": ("#0072B2", "--"),
    "nginx": ("#009E73", "-"),
    "round-robin": ("#CC79A7", "-"),
    "weighted-round-robin": ("#CC79A7", "--"),
    "least-known": ("#56B4E9", "-"),
    "old-status": ("#999999", "-"),
    "reuseport": ("#999999", "--"),
}
CURVES = (
    BOUND,
    MAIN,
    "haproxy-maxconn1",
    "haproxy",
    "nginx",
    "least-known",
    "weighted-round-robin",
    "round-robin",
    "old-status",
    "reuseport",
)
"""The systems in the figure of the distribution: more would hide one another."""

_RC = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E0E0E0",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "svg.hashsalt": "shmcoord",
    "svg.fonttype": "none",
}


def _look(system: str) -> dict[str, Any]:
    color, dashes = _LOOKS.get(system, ("#999999", "-"))
    return {"color": color, "linestyle": dashes, "linewidth": 2.4 if system == MAIN else 1.5}


def _milliseconds(axis: Any) -> None:
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axis.set_minor_formatter(NullFormatter())


def spread(wanted: Sequence[float], apart: float) -> list[float]:
    """Positions as near to the wanted ones as can be, in their order, at least so far apart."""
    by_height = sorted(range(len(wanted)), key=lambda i: wanted[i])
    blocks: list[tuple[float, list[int]]] = []  # mean of (wanted - offset), members
    for i in by_height:
        blocks.append((wanted[i], [i]))
        while len(blocks) > 1:
            (low, below), (high, above) = blocks[-2:]
            if high - low >= apart * (len(below) + len(above)) / 2:
                break
            count = len(below) + len(above)
            blocks[-2:] = [((low * len(below) + high * len(above)) / count, below + above)]
    placed = [0.0] * len(wanted)
    for middle, members in blocks:
        for rank, i in enumerate(members):
            placed[i] = middle + (rank - (len(members) - 1) / 2) * apart
    return placed


def _label_ends(axes: Axes, ends: Sequence[tuple[str, float, float]]) -> None:
    """Writes each line's name beside its right end, moved apart where they would overlap."""
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = [to_axes.transform((x, y))[1] for _, x, y in ends]
    line = 11.5 / 72 / (axes.get_position().height * axes.figure.get_size_inches()[1])
    for (system, x, y), height in zip(ends, spread(heights, line), strict=True):
        color = _look(system)["color"]
        axes.annotate(
            title_of(system),
            xy=(x, y),
            xytext=(1.03, height),
            textcoords="axes fraction",
            va="center",
            fontsize=8.5,
            color=color,
            fontweight="bold" if system == MAIN else "normal",
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5, "alpha": 0.6},
            annotation_clip=False,
        )


def _histogram(results: Results, setting: Setting, system: str) -> Any:
    cells = results.of(setting, system).values()
    return merged(decode(cell["histogram"]) for cell in cells)


def distribution(results: Results, setting: Setting) -> Figure:
    """Latency over the percentile: how bad are the worst so many."""
    drawn, axes = plt.subplots(figsize=(9.5, 5.2), layout="none")
    drawn.subplots_adjust(left=0.08, right=0.7, top=0.88, bottom=0.16)
    nines = [k / 20 for k in range(10)] + [1 - 10 ** -(k / 12) for k in range(4, 37)]
    ends = []
    for system in CURVES:
        if system not in results.systems(setting) or not results.of(setting, system):
            continue
        whole = _histogram(results, setting, system)
        xs = [1 / (1 - share) for share in nines]
        ys = [max(1, whole.get_value_at_percentile(share * 100)) / 1e3 for share in nines]
        axes.plot(xs, ys, **_look(system))
        ends.append((system, xs[-1], ys[-1]))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(1, 1000)
    axes.autoscale_view()
    ticks = {1 / (1 - share): f"{share * 100:g} %" for share in (0.0, 0.5, 0.9, 0.99, 0.999)}
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.xaxis.set_minor_formatter(NullFormatter())
    _milliseconds(axes.yaxis)
    axes.set_xlabel("so many of the requests are faster")
    axes.set_ylabel("latency (ms), from the intended arrival")
    axes.set_title(setting_title(setting), loc="left", fontsize=10.5)
    _label_ends(axes, ends)
    return drawn


def _interval(results: Results, setting: Setting, system: str, name: str) -> tuple[float, ...]:
    cells = results.of(setting, system).values()
    found = mean([figure(cell, ("latency_ms", name)) for cell in cells])
    return found.value, found.low, found.high


def ranking(results: Results, setting: Setting) -> Figure:
    """Every system's median and p99, with the interval of each."""
    systems = [name for name in order(results, setting) if results.of(setting, name)]
    systems.sort(key=lambda name: -_interval(results, setting, name, "p99")[0])
    height = 1.5 + 0.33 * len(systems)
    drawn, axes = plt.subplots(figsize=(9.5, height), layout="none")
    drawn.subplots_adjust(left=0.3, right=0.98, top=1 - 0.4 / height, bottom=0.75 / height)
    for row, system in enumerate(systems):
        for name, marker, filled in (("p50", "o", False), ("p99", "o", True)):
            value, low, high = _interval(results, setting, system, name)
            color = _look(system)["color"]
            axes.plot([low, high], [row, row], color=color, linewidth=2.5, alpha=0.45)
            face = color if filled else "white"
            axes.plot(value, row, marker, color=color, markerfacecolor=face, markersize=7)
            axes.annotate(
                milliseconds(value),
                (value, row),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=7.5,
                color="#444444",
            )
    axes.set_yticks(range(len(systems)), [title_of(name) for name in systems])
    for label, system in zip(axes.get_yticklabels(), systems, strict=True):
        label.set_fontweight("bold" if system == MAIN else "normal")
    axes.set_ylim(-0.6, len(systems) - 0.2)
    axes.set_xscale("log")
    _milliseconds(axes.xaxis)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("latency (ms): ○ median, ● p99; the bars are 95 % confidence intervals")
    axes.set_title(setting_title(setting), loc="left", fontsize=10.5)
    return drawn


def _against(
    results: Results,
    settings: Sequence[Setting],
    at: Callable[[Setting], float],
    label: str,
    title: str,
) -> Figure:
    """The p99 of each system as something changes."""
    drawn, axes = plt.subplots(figsize=(9.5, 4.6), layout="none")
    drawn.subplots_adjust(left=0.08, right=0.7, top=0.9, bottom=0.16)
    ends = []
    for system in _LOOKS:
        points = [
            (at(setting), *_interval(results, setting, system, "p99"))
            for setting in settings
            if results.of(setting, system)
        ]
        if len(points) < 3:
            continue
        xs, values, lows, highs = zip(*sorted(points), strict=True)
        look = _look(system)
        axes.plot(xs, values, marker="o", markersize=4, **look)
        axes.fill_between(xs, lows, highs, color=look["color"], alpha=0.12, linewidth=0)
        ends.append((system, xs[-1], values[-1]))
    axes.set_yscale("log")
    _milliseconds(axes.yaxis)
    axes.set_xlabel(label)
    axes.set_ylabel("p99 of the latency (ms)")
    axes.set_title(title, loc="left", fontsize=10.5)
    ticks = sorted({at(setting) for setting in settings})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    _label_ends(axes, ends)
    return drawn


def _plain(results: Results, **wanted: object) -> list[Setting]:
    """Settings that differ from the standard one in nothing else; of each kind the longest."""
    standard = {"shape": "bimodal", "arrivals": "poisson", "in_flight": 0} | wanted
    kinds: dict[tuple[object, ...], Setting] = {}
    for setting in results.settings():
        if all(getattr(setting, name) == value for name, value in standard.items()):
            kind = (setting.load, setting.routers)
            if kind not in kinds or kinds[kind].seconds < setting.seconds:
                kinds[kind] = setting
    return list(kinds.values())


def figures(results: Results) -> Iterable[tuple[str, Figure]]:
    """Every figure that the results are enough for, by name."""
    with mpl.rc_context(_RC):
        for setting in _plain(results, routers=6):
            if setting.load in (0.7, 0.85):
                yield f"distribution-{setting.load * 100:.0f}", distribution(results, setting)
                yield f"ranking-{setting.load * 100:.0f}", ranking(results, setting)
        loads = [each for each in _plain(results, routers=6) if each.load <= 1]
        if len(loads) > 2:
            yield (
                "loads",
                _against(
                    results,
                    loads,
                    lambda setting: setting.load * 100,
                    "load (% of the capacity)",
                    "bimodal work, Poisson arrivals, 6 routers",
                ),
            )
        routers = _plain(results, load=0.85)
        if len(routers) > 2:
            yield (
                "routers",
                _against(
                    results,
                    routers,
                    lambda setting: setting.routers,
                    "router processes",
                    "85 % load, bimodal work, Poisson arrivals",
                ),
            )


def save(results: Results, folder: Path, footer: str) -> list[str]:
    """Writes every figure as tail-NAME.png and .svg; returns the names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for name, drawn in figures(results):
        drawn.text(0.005, 0.005, footer, fontsize=6.5, color="#666666")
        drawn.savefig(folder / f"tail-{name}.png", dpi=160, bbox_inches="tight")
        drawn.savefig(folder / f"tail-{name}.svg", metadata={"Date": None}, bbox_inches="tight")
        plt.close(drawn)
        names.append(name)
    return names
