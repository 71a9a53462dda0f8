"""What the sweep simulates: the points behind each figure and table of docs/policies.md.

A study is a set of points. The page and the plots ask for results by the same functions that make
the points here, so that nothing can be shown that was not simulated as it says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import shmcoord
from bench.sim.engine import LEAST_FIRST, Point

#: Ages of copies, seconds; 0 is the live word.
AGES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
LOADS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
#: Groups and routers for which the ages are compared.
GROUPS = (6, 32, 256)
ROUTERS = (1, 6, 32, 256)
#: Groups in which everybody sees live words.
SIZES = (6, 16, 64, 256, 1024, 4096, 10_000)
#: Routers that know their own requests alone.
ALONE = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BURSTS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
CAPACITIES = (1, 2, 4, 8, 16)
WORKS = ("deterministic", "exponential", "bimodal", "lognormal")
HIT_FACTORS = (1.0, 0.8, 0.6, 0.4, 0.2)
SLOW_SPEEDS = (1.0, 0.75, 0.5, 0.25)

#: The load of the comparisons in which it does not vary.
LOAD = 0.7


def known(*names: str) -> tuple[str, ...]:
    """Those of the names that are policies of this version, in this order."""
    return tuple(name for name in names if name in shmcoord.POLICIES)


#: Those that choose by load, and those that do not look at it: copies of any age are all one to
#: these.
LOOKING = known("least-loaded", "power-of-two", "hot-cold")
BLIND = known("round-robin", "random")
PLAIN = (*LOOKING, *BLIND)


def sized(point: Point) -> Point:
    """The point with as many requests as it takes to become stationary, and a million more."""
    warmup = max(200_000, 400 * point.nodes)
    measured = max(1_000_000, 1000 * point.nodes)
    if point.load >= 0.9:
        measured = max(measured, 3_000_000)
    if point.nodes > 2000 and point.age_s == 0.0:  # short queues: soon as they will always be
        warmup, measured = 1_000_000, 1_000_000
    return replace(point, requests=warmup + measured, warmup=warmup)


def at_age(
    policy: str,
    age_s: float,
    *,
    nodes: int = 6,
    routers: int = 6,
    load: float = LOAD,
    own: bool = False,
) -> Point:
    """A policy on copies of this age; each router copies at its own times."""
    if policy in BLIND or age_s == 0.0:
        age_s, own = 0.0, False
    return sized(
        Point(policy=policy, age_s=age_s, nodes=nodes, routers=routers, load=load, own=own)
    )


def ages() -> Iterator[Point]:
    """Six nodes, six routers, copies of any age."""
    for age_s in (0.0, *AGES):
        for policy in PLAIN:
            yield at_age(policy, age_s)
        for policy in LOOKING:
            yield at_age(policy, age_s, own=True)


def crossings() -> Iterator[Point]:
    """The same for other groups, numbers of routers and loads."""
    for policy in (*known("least-loaded", "power-of-two"), *BLIND):
        for age_s in (0.0, *AGES):
            for nodes in GROUPS:
                for routers in ROUTERS:
                    yield at_age(policy, age_s, nodes=nodes, routers=routers)
            for load in LOADS:
                yield at_age(policy, age_s, load=load)


HERD_RULES: tuple[tuple[str, str], ...] = (
    (LEAST_FIRST, "the least, of equals the first"),
    *((name, name) for name in PLAIN),
)


def herd_point(policy: str, age_s: float, phases: str) -> Point:
    """Half load, six nodes, status two seconds old."""
    return sized(Point(policy=policy, load=0.5, age_s=age_s, phases=phases))


def herd() -> Iterator[Point]:
    """The prototype's way."""
    for policy, _ in HERD_RULES:
        yield herd_point(policy, 0.0, "same")
        for phases in ("same", "nodes", "routers"):
            yield herd_point(policy, 2.0, phases)


def at_load(policy: str, load: float, *, binding: str = "early", work: str = "bimodal") -> Point:
    """Six nodes, six routers, live words."""
    if binding in ("late", "bound"):
        policy = "least-loaded"  # among equal nodes any is as good
    return sized(Point(policy=policy, load=load, binding=binding, work=work))


def loads() -> Iterator[Point]:
    """Live words at any load."""
    for load in LOADS:
        for policy in PLAIN:
            yield at_load(policy, load)
        for binding in ("late", "late-random", "bound"):
            yield at_load("least-loaded", load, binding=binding)
        yield alone(6, load=load)


def works() -> Iterator[Point]:
    """Live words, any work."""
    for work in WORKS:
        for load in (0.7, 0.85):
            for policy in PLAIN:
                yield at_load(policy, load, work=work)
            for binding in ("late", "bound"):
                yield at_load("least-loaded", load, binding=binding, work=work)


def of_size(policy: str, nodes: int, *, binding: str = "early") -> Point:
    """A group of this size, six routers, live words, high load."""
    return sized(Point(policy=policy, nodes=nodes, load=0.85, binding=binding))


def sizes() -> Iterator[Point]:
    """Groups from 6 to 10,000 nodes."""
    for nodes in SIZES:
        for policy in PLAIN:
            # What does not look at the load has queues that take long to settle, and that do not
            # depend on how many others there are.
            if policy not in BLIND or nodes <= 256:
                yield of_size(policy, nodes)
        yield of_size("least-loaded", nodes, binding="bound")


def alone(routers: int, *, load: float = 0.85, policy: str = "least-loaded") -> Point:
    """Routers that know nothing but their own requests: least requests in each client."""
    return sized(Point(policy=policy, routers=routers, load=load, age_s=math.inf, own=True))


def shared(routers: int, *, load: float = 0.85, policy: str = "least-loaded") -> Point:
    """Routers that see the live words."""
    return sized(Point(policy=policy, routers=routers, load=load))


def routers() -> Iterator[Point]:
    """What each more router costs those who do not share."""
    for count in ALONE:
        yield alone(count)
        yield shared(count)
        yield at_age("least-loaded", 0.1, routers=count, load=0.85, own=True)
        for policy in BLIND:
            yield shared(count, policy=policy)


def with_slow(
    policy: str, speed: float, *, weights: bool = False, binding: str = "early", nodes: int = 6
) -> Point:
    """One node of six is slower than the others."""
    if binding == "bound":
        policy = "least-loaded"
    return sized(
        Point(
            policy=policy,
            nodes=nodes,
            load=LOAD,
            slow=max(1, nodes // 6) if speed < 1.0 else 0,
            slow_speed=speed if speed < 1.0 else 0.5,
            weights=weights and speed < 1.0,
            binding=binding,
        )
    )


def slow() -> Iterator[Point]:
    """One slow node among six, and a sixth of 48."""
    for nodes in (6, 48):
        for speed in SLOW_SPEEDS:
            for policy in PLAIN:
                for weights in (False, True):
                    yield with_slow(policy, speed, weights=weights, nodes=nodes)
            yield with_slow("least-loaded", speed, binding="late", nodes=nodes)
            yield with_slow("least-loaded", speed, binding="bound", nodes=nodes)


def bursty(policy: str, burst: float, *, binding: str = "early") -> Point:
    """Requests that come in groups."""
    return sized(Point(policy=policy, load=LOAD, burst=burst, binding=binding))


def bursts() -> Iterator[Point]:
    """Groups of up to fifty."""
    for burst in BURSTS:
        for policy in PLAIN:
            yield bursty(policy, burst)
        for binding in ("late", "bound"):
            yield bursty("least-loaded", burst, binding=binding)


def wide(capacity: int, *, binding: str = "early", work: str = "bimodal") -> Point:
    """Six nodes that take more than one request at once."""
    return sized(Point(load=0.85, capacity=capacity, binding=binding, work=work))


def capacities() -> Iterator[Point]:
    """What late binding is worth when a node does several things at once."""
    for capacity in CAPACITIES:
        for work in WORKS:
            for binding in ("early", "late", "late-random", "bound"):
                yield wide(capacity, binding=binding, work=work)


#: 10,000 keys asked for by Zipf's law; each node's cache holds a tenth of them.
KEYS, CACHE = 10_000, 1000


def keyed(
    policy: str, hit_factor: float, *, nodes: int = 6, load: float = LOAD, zipf: float = 0.9
) -> Point:
    """Work that is less where the key was used before."""
    return sized(
        Point(
            policy=policy,
            nodes=nodes,
            load=load,
            work="exponential",
            keys=KEYS,
            zipf=zipf,
            cache=CACHE,
            hit_factor=hit_factor,
        )
    )


KEYED = (*known("affinity"), *PLAIN)


def affinity() -> Iterator[Point]:
    """What affinity costs where nothing is cached, and gains where much is."""
    for policy in KEYED:
        for hit_factor in HIT_FACTORS:
            for nodes in (6, 24):
                yield keyed(policy, hit_factor, nodes=nodes)


def costly(cost: str, *, sigma: float, policy: str = "least-loaded", load: float = 0.85) -> Point:
    """Lognormal lengths that are known beforehand, and counted or not."""
    return sized(Point(policy=policy, load=load, work="lognormal", sigma=sigma, cost=cost))


SIGMAS = (0.5, 1.0, 1.5)


def costs() -> Iterator[Point]:
    """Least cost outstanding against least requests."""
    for sigma in SIGMAS:
        for cost in ("request", "work"):
            yield costly(cost, sigma=sigma)
        yield sized(Point(load=0.85, work="lognormal", sigma=sigma, binding="bound"))


STUDIES: dict[str, Callable[[], Iterator[Point]]] = {
    study.__name__: study
    for study in (
        herd,
        ages,
        crossings,
        loads,
        works,
        sizes,
        routers,
        slow,
        bursts,
        capacities,
        affinity,
        costs,
    )
}


def points(names: tuple[str, ...] = ()) -> list[Point]:
    """The points of these studies, or of all, each once."""
    return list(
        dict.fromkeys(point for name in (names or tuple(STUDIES)) for point in STUDIES[name]())
    )


def expense(point: Point) -> float:
    """About how long a point takes, in no unit: to begin with the longest."""
    per_request = 1.0 + point.nodes / (15.0 if point.policy in BLIND else 400.0)
    if 0 < point.age_s < math.inf:
        rate = point.load * point.nodes * point.capacity / point.mean_s
        per_request += point.routers * point.nodes / (rate * point.age_s) / 100
    return per_request * point.requests
