"""Fills in the figures of docs/policies.md: what stands between its markers is written here.

A marker is a pair of comments, `<!-- sim:NAME -->` and `<!-- /sim:NAME -->`; what is between them
is the block of that name. The sentences around them are written by hand and name no figures; what
they claim is in `claims.py`, and is checked against every sweep.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from bench.children import ROOT
from bench.sim import claims, studies
from bench.sim.crossing import FROM_THE_START, crossing
from bench.sim.engine import Point
from bench.sim.studies import BLIND, KEYED, PLAIN
from bench.sim.sweep import Sweep

PATH = ROOT / "docs" / "policies.md"


class MarkerError(ValueError):
    """The page and the blocks do not fit together."""


def ms(value: float) -> str:
    """Milliseconds with two or three digits."""
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"


def table(head: Iterable[str], rows: Iterable[Iterable[str]], *, left: int = 1) -> str:
    """A Markdown table; the columns behind the first `left` are numbers."""
    names = list(head)
    rule = ["---"] * left + ["---:"] * (len(names) - left)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (names, rule, *map(list, rows)))


def about(sweep: Sweep) -> str:
    """Where, when and how much."""
    machine = sweep.machine
    requests = sum(point.requests for point in sweep.results)
    version = machine["packages"]["shmcoord"]
    return (
        f"Simulated on {sweep.swept_at[:10]} with shmcoord {version} (commit "
        f"{machine['commit']}), {machine['python']}, on {machine['cores']} cores of "
        f"{machine['cpu']}, {machine['kernel']}: {len(sweep.results):,} points, "
        f"{requests / 1e9:.1f} thousand million requests, {sweep.seconds / 60:.0f} minutes."
    )


def herd(sweep: Sweep) -> str:
    """Half load, status two seconds old."""
    rows = []
    for policy, name in studies.HERD_RULES:
        cells = [name]
        for age_s, phases in ((0.0, "same"), (2.0, "same"), (2.0, "nodes"), (2.0, "routers")):
            point = studies.herd_point(policy, age_s, phases)
            cells.append(f"{ms(sweep.ms(point, 'p50_s'))} / {ms(sweep.ms(point))}")
        rows.append(cells)
    head = (
        "median / p99, ms",
        "live",
        "2 s old, all copied at the same moment",
        "2 s old, each node publishes at its own",
        "2 s old, each router copies at its own",
    )
    return table(head, rows)


def _age(age_s: float | None) -> str:
    if age_s is None:
        return "> 2,000 ms"
    if age_s <= FROM_THE_START:
        return f"≤ {1e3 * FROM_THE_START:.0f} ms"
    return f"{ms(1e3 * age_s)} ms"


#: Who is beaten by whom.
PAIRS = (
    ("least-loaded", "power-of-two"),
    ("least-loaded", "round-robin"),
    ("least-loaded", "random"),
    ("power-of-two", "round-robin"),
    ("power-of-two", "random"),
)


def crossings(sweep: Sweep) -> str:
    """By group and number of routers."""
    head = ("nodes", "routers", *(f"{rival} beats {policy}" for policy, rival in PAIRS))
    rows = [
        [
            str(nodes),
            str(routers),
            *(_age(crossing(sweep, *pair, nodes=nodes, routers=routers)) for pair in PAIRS),
        ]
        for nodes in studies.GROUPS
        for routers in studies.ROUTERS
    ]
    return table(head, rows, left=0)


def crossings_by_load(sweep: Sweep) -> str:
    """Six nodes, six routers."""
    head = ("load", *(f"{rival} beats {policy}" for policy, rival in PAIRS))
    rows = [
        [f"{load:.0%}", *(_age(crossing(sweep, *pair, load=load)) for pair in PAIRS)]
        for load in studies.LOADS
    ]
    return table(head, rows, left=0)


def loads(sweep: Sweep) -> str:
    """Live words."""
    some = (0.3, 0.5, 0.7, 0.85, 0.95)
    kinds: list[tuple[str, Callable[[float], Point]]] = [
        (policy, lambda load, policy=policy: studies.at_load(policy, load)) for policy in PLAIN
    ]
    kinds.append(("least requests, each router alone", lambda load: studies.alone(6, load=load)))
    for binding, name in (
        ("late", "waiting for capacity, first come first served"),
        ("late-random", "waiting for capacity, any router woken"),
        ("bound", "one first-come queue (bound)"),
    ):
        kinds.append(
            (name, lambda load, b=binding: studies.at_load("least-loaded", load, binding=b))
        )
    rows = [
        [
            name,
            *(f"{ms(sweep.ms(make(load), 'p50_s'))} / {ms(sweep.ms(make(load)))}" for load in some),
        ]
        for name, make in kinds
    ]
    return table(("median / p99, ms", *(f"{load:.0%}" for load in some)), rows)


def works(sweep: Sweep) -> str:
    """P99 over that of the one queue."""
    head = ["p99 over the bound's"]
    head += [f"{work}, {load:.0%}" for work in studies.WORKS for load in (0.7, 0.85)]
    kinds = [(policy, policy, "early") for policy in PLAIN]
    kinds.append(("waiting for capacity", "least-loaded", "late"))
    rows = []
    for name, policy, binding in kinds:
        cells = [name]
        for work in studies.WORKS:
            for load in (0.7, 0.85):
                bound = studies.at_load("least-loaded", load, work=work, binding="bound")
                point = studies.at_load(policy, load, work=work, binding=binding)
                cells.append(f"{sweep.ms(point) / sweep.ms(bound):.2f}")
        rows.append(cells)
    return table(head, rows)


def sizes(sweep: Sweep) -> str:
    """Mean and p99 by group."""
    rows = []
    for policy in PLAIN:
        cells = [policy]
        for nodes in studies.SIZES:
            if policy in BLIND and nodes > 256:
                cells.append("as before")
                continue
            point = studies.of_size(policy, nodes)
            cells.append(f"{ms(sweep.ms(point, 'mean_s'))} / {ms(sweep.ms(point))}")
        rows.append(cells)
    cells = ["one queue (bound)"]
    for nodes in studies.SIZES:
        point = studies.of_size("least-loaded", nodes, binding="bound")
        cells.append(f"{ms(sweep.ms(point, 'mean_s'))} / {ms(sweep.ms(point))}")
    rows.append(cells)
    return table(("mean / p99, ms", *(f"{n:,} nodes" for n in studies.SIZES)), rows)


def keeps_up(sweep: Sweep, point: Point) -> bool:
    """Whether the nodes did as much work as arrived; else some queue grows for ever."""
    return float(sweep.of(point)["utilisation"]) > 0.985 * point.load


def slow(sweep: Sweep) -> str:
    """A sixth of the nodes slow."""
    kinds = [
        (f"{policy}{', speeds as weights' if weights else ''}", policy, weights, "early")
        for policy in PLAIN
        for weights in (False, True)
    ]
    kinds.append(("waiting for capacity", "least-loaded", False, "late"))
    kinds.append(("one queue, the fastest free node (bound)", "least-loaded", False, "bound"))
    head = ["mean / p99, ms"]
    head += [f"{n // 6} of {n} at {s:g}" for n in (6, 48) for s in studies.SLOW_SPEEDS]
    rows = []
    for name, policy, weights, binding in kinds:
        cells = [name]
        for nodes in (6, 48):
            for speed in studies.SLOW_SPEEDS:
                point = studies.with_slow(
                    policy, speed, weights=weights, nodes=nodes, binding=binding
                )
                cells.append(
                    f"{ms(sweep.ms(point, 'mean_s'))} / {ms(sweep.ms(point))}"
                    if keeps_up(sweep, point)
                    else "never settles"
                )
        rows.append(cells)
    return table(head, rows)


def affinity(sweep: Sweep) -> str:
    """Six nodes: hits, p99 and the busiest node."""
    head = ["", "keys found in the cache", "most to one node"]
    head += [f"p99, ms: a hit saves {1 - factor:.0%}" for factor in studies.HIT_FACTORS]
    rows = []
    for policy in KEYED:
        first = sweep.of(studies.keyed(policy, studies.HIT_FACTORS[0]))
        cells = [policy, f"{first['hit_ratio']:.0%}", f"{first['imbalance']:.2f} × the mean"]
        cells += [ms(sweep.ms(studies.keyed(policy, factor))) for factor in studies.HIT_FACTORS]
        rows.append(cells)
    return table(head, rows)


def bursts(sweep: Sweep) -> str:
    """P99 by the size of bursts."""
    kinds = [(policy, policy, "early") for policy in PLAIN]
    kinds += [
        ("waiting for capacity", "least-loaded", "late"),
        ("one queue (bound)", "least-loaded", "bound"),
    ]
    rows = [
        [name, *(ms(sweep.ms(studies.bursty(policy, b, binding=binding))) for b in studies.BURSTS)]
        for name, policy, binding in kinds
    ]
    return table(("p99, ms", *(f"bursts of {b:g}" for b in studies.BURSTS)), rows)


def capacities(sweep: Sweep) -> str:
    """Early and late, by capacity."""
    rows = []
    for binding, name in (
        ("early", "least-loaded, at once"),
        ("late", "waiting for capacity"),
        ("late-random", "the same, any router woken"),
    ):
        cells = [name]
        for capacity in studies.CAPACITIES:
            point = studies.wide(capacity, binding=binding)
            cells.append(f"{ms(sweep.ms(point))} / {ms(sweep.ms(point, 'p999_s'))}")
        rows.append(cells)
    return table(("p99 / p99.9, ms", *(f"capacity {c}" for c in studies.CAPACITIES)), rows)


def costs(sweep: Sweep) -> str:
    """Cost outstanding or requests outstanding."""
    rows = []
    for cost, name in (("request", "least requests"), ("work", "least cost")):
        cells = [name]
        for sigma in studies.SIGMAS:
            point = studies.costly(cost, sigma=sigma)
            cells.append(
                f"{ms(sweep.ms(point, 'mean_s'))} / {ms(sweep.ms(point, 'p50_s'))} / "
                f"{ms(sweep.ms(point))}"
            )
        rows.append(cells)
    head = ("mean / median / p99, ms", *(f"σ = {sigma:g}" for sigma in studies.SIGMAS))
    return table(head, rows)


BLOCKS: dict[str, Callable[[Sweep], str]] = {
    block.__name__.replace("_", "-"): block
    for block in (
        about,
        herd,
        crossings,
        crossings_by_load,
        loads,
        works,
        sizes,
        slow,
        affinity,
        bursts,
        capacities,
        costs,
    )
}

_MARKED = re.compile(r"(<!-- sim:([a-z-]+) -->\n).*?(<!-- /sim:\2 -->)", re.DOTALL)


def filled(text: str, sweep: Sweep) -> str:
    """The page with its figures.

    Raises:
        MarkerError: the page lacks a block, or has one that nobody writes.
    """
    names = [match[2] for match in _MARKED.finditer(text)]
    if sorted(names) != sorted(BLOCKS):
        raise MarkerError(f"the page has the blocks {sorted(names)}, not {sorted(BLOCKS)}")
    return _MARKED.sub(lambda match: f"{match[1]}\n{BLOCKS[match[2]](sweep)}\n\n{match[3]}", text)


def fill(sweep: Sweep, path: Path = PATH) -> Path:
    """Writes the page, if what it claims is so.

    Raises:
        ClaimError: a sentence of the page is not what the sweep shows; the page says so no more.
    """
    claims.check(sweep)
    path.write_text(filled(path.read_text(encoding="utf-8"), sweep), encoding="utf-8")
    return path
