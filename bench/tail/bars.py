"""What must be reached, and whether it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.tail.cell import OVERLOAD_DEADLINE_S
from bench.tail.stats import Estimate, mean, ratio
from bench.tail.store import Results, Setting, figure, paired
from bench.tail.systems import BOUND, MAIN

P50 = ("latency_ms", "p50")
P99 = ("latency_ms", "p99")
_CPU = ("cpu_us",)
REFUSED_WITHIN_S = OVERLOAD_DEADLINE_S / 10
"""Early is a refusal that leaves nine tenths of the time for another try."""


@dataclass(frozen=True)
class Bar:
    """One line of the table of bars.

    Attributes:
        what: for people.
        against: the system that shmcoord is held against, "" for none.
        setting: where.
        limit: the number.
        sign: "<=", "<" or ">=": on which side of the limit it must be.
        found: what was measured; None if it was not.
    """

    what: str
    against: str
    setting: str
    limit: float
    sign: str
    found: Estimate | None

    @property
    def reached(self) -> bool | None:
        """Whether the bar is reached; None if it was not measured."""
        if self.found is None:
            return None
        value = self.found.value
        if self.sign == ">=":
            return value >= self.limit
        return value < self.limit if self.sign == "<" else value <= self.limit


def compare(
    results: Results, setting: Setting, subject: str, reference: str, path: Sequence[str]
) -> Estimate | None:
    """The ratio of a figure of two systems, or None if they were not both measured."""
    pairs = list(paired(results, setting, (subject, reference), path))
    return ratio(*zip(*pairs, strict=True)) if pairs else None


def compare_cpu(
    results: Results, setting: Setting, subject: str, reference: str
) -> Estimate | None:
    """The same for the CPU time per request of everybody who took part."""
    cells = [results.of(setting, system) for system in (subject, reference)]
    seeds = sorted(set(cells[0]) & set(cells[1]))
    if not seeds:
        return None
    sums = [[sum(each[seed]["cpu_us"].values()) for seed in seeds] for each in cells]
    return ratio(*sums)


def _one(results: Results, **wanted: object) -> Setting | None:
    """The setting of that kind; of several the one that was measured longest."""
    wanted = {"shape": "bimodal", "arrivals": "poisson", "routers": 6, "in_flight": 0} | wanted
    fitting = [
        setting
        for setting in results.settings()
        if all(getattr(setting, name) == value for name, value in wanted.items())
    ]
    return max(fitting, key=lambda setting: setting.seconds, default=None)


def _latency(results: Results) -> list[Bar]:
    bars = []
    limits = (
        (BOUND, {0.7: 1.1, 0.85: 1.1}, False),
        ("haproxy-maxconn1", {0.7: 1.0, 0.85: 1.0}, True),
        ("haproxy", {0.85: 0.85}, True),
        ("nginx", {0.85: 0.85}, True),
        ("round-robin", {0.7: 0.4, 0.85: 0.4}, True),
        ("weighted-round-robin", {0.7: 0.4, 0.85: 0.4}, True),
    )
    for load in (0.7, 0.85):
        setting = _one(results, load=load)
        for against, p99, has_median in limits:
            for what, path, limit, sign in (
                ("p99", P99, p99.get(load), "<="),
                ("median", P50, 1.0 if has_median else None, "<"),
            ):
                if limit is not None:
                    found = setting and compare(results, setting, MAIN, against, path)
                    bars.append(
                        Bar(what, against, f"{load * 100:.0f} % load", limit, sign, found or None)
                    )
    return bars


def _cpu(results: Results) -> list[Bar]:
    setting = next((each for each in results.settings() if each.in_flight), None)
    return [
        Bar(
            "CPU per request",
            against,
            "16 in flight",
            limit,
            sign,
            compare_cpu(results, setting, MAIN, against) if setting else None,
        )
        for against, limit, sign in (
            ("haproxy-maxconn1", 1.0, "<"),
            ("haproxy", 0.8, "<="),
            ("nginx", 0.8, "<="),
        )
    ]


def _overload(results: Results) -> list[Bar]:
    setting = _one(results, load=1.2)
    cells = list(results.of(setting, MAIN).values()) if setting else []
    goodput = after = late = None
    if cells:
        goodput = mean([figure(c, ("goodput",)) / figure(c, ("capacity",)) for c in cells])
        late = mean([(c["late"] + c["failed"]) / c["requests"] for c in cells])
        refused = [c["refused_after_ms"]["p99"] for c in cells if c["refused"]]
        after = mean(refused) if refused else None
    where = "120 % load"
    return [
        Bar("goodput, part of the capacity", "", where, 0.95, ">=", goodput),
        Bar("99 % of refusals within (ms)", "", where, REFUSED_WITHIN_S * 1e3, "<=", after),
        Bar("too late or failed, part of all", "", where, 0.01, "<=", late),
    ]


def bars(results: Results) -> list[Bar]:
    """All bars, with what was found."""
    return [*_latency(results), *_cpu(results), *_overload(results)]
