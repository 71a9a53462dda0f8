"""The simulator against theory, and against the routers whose scan it calls.

What theory says is held to the run's own standard error. Each check has its negative control: the
same comparison with a theory, or a simulation, that is a little wrong must not pass.
"""

from __future__ import annotations

import ctypes
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import shmcoord
import shmcoord.picker
from shmcoord import Router, Segment

pytest.importorskip("Cython", reason="Cython is not installed (extra `test`)")
pytest.importorskip("setuptools", reason="setuptools is not installed (extra `test`)")

from bench.native import NotBuiltError
from bench.sim import engine
from bench.sim.engine import (
    LEAST_FIRST,
    MEAN_S,
    BookkeepingError,
    Estimate,
    Point,
    Result,
    simulate,
)


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    try:
        engine.module()
    except NotBuiltError as reason:
        pytest.skip(str(reason))


#: One exponential server unless said otherwise.
QUEUE = Point(nodes=1, routers=1, load=0.7, work="exponential", requests=2_000_000, warmup=200_000)


def agrees(estimate: Estimate, theory: float, *, sigmas: float = 4.0, part: float = 0.0) -> bool:
    """Whether a figure is as theory says: within its standard errors, and `part` of itself.

    With 20 parts the error is itself an estimate (19 degrees of freedom): more than 4 of them off
    is seen once in 1,300 runs; the seeds are fixed, so a run that passes always does. An error of
    more than 2 % would agree with everything.
    """
    assert estimate.error < 0.02 * estimate.value
    return abs(estimate.value - theory) < sigmas * estimate.error + part * theory


# --- one queue


def test_mean_and_p99_of_mm1() -> None:
    result = simulate(QUEUE)
    mean_s = MEAN_S / (1 - 0.7)
    assert agrees(result.mean_s, mean_s)
    # The time in the system is exponential too. 1 %: the histogram.
    for estimate, q in ((result.p50_s, 0.5), (result.p90_s, 0.9), (result.p99_s, 0.99)):
        assert agrees(estimate, -math.log(1 - q) * mean_s, part=0.01)


def test_a_wrong_number_of_servers_is_found() -> None:
    result = simulate(replace(QUEUE, nodes=2))
    assert not agrees(result.mean_s, MEAN_S / (1 - 0.7))
    assert not agrees(result.p99_s, -math.log(0.01) * MEAN_S / (1 - 0.7), part=0.01)
    assert not agrees(simulate(QUEUE).mean_s, MEAN_S / (1 - 0.69)), "a load 1 % off"


def pollaczek_khinchine(load: float, variance: float) -> float:
    """Mean time in an M/G/1 queue; `variance` of the work relative to its squared mean."""
    return MEAN_S * (1 + load * (1 + variance) / (2 * (1 - load)))


BIMODAL = (0.95 * 0.005**2 + 0.05 * 0.1**2) / MEAN_S**2 - 1


@pytest.mark.parametrize(
    ("work", "variance"),
    [
        ("deterministic", 0.0),
        ("exponential", 1.0),
        ("bimodal", BIMODAL),
        ("lognormal", math.exp(0.5**2) - 1),
    ],
)
def test_mean_of_mg1(work: str, variance: float) -> None:
    result = simulate(replace(QUEUE, work=work, sigma=0.5))
    assert agrees(result.mean_s, pollaczek_khinchine(0.7, variance))
    assert not agrees(result.mean_s, pollaczek_khinchine(0.7, 1.1 * variance + 0.1))


def test_groups_that_arrive_together() -> None:
    """M[X]/M/1 with geometric groups of mean B: the mean time is B times that of M/M/1."""
    result = simulate(replace(QUEUE, burst=4.0, load=0.5))
    assert agrees(result.mean_s, 4.0 * MEAN_S / (1 - 0.5))
    assert not agrees(result.mean_s, 3.8 * MEAN_S / (1 - 0.5))


def test_a_slow_node_takes_longer() -> None:
    slow = replace(QUEUE, slow=1, slow_speed=0.5)
    assert agrees(simulate(slow).mean_s, MEAN_S / 0.5 / (1 - 0.7))
    assert not agrees(simulate(replace(slow, slow=0)).mean_s, MEAN_S / 0.5 / (1 - 0.7))


# --- one queue in front of many servers


def erlang_c(servers: int, load: float) -> float:
    """The part of the requests that wait (Erlang 1917)."""
    offered = servers * load
    blocked = 1.0
    for k in range(1, servers + 1):
        blocked = offered * blocked / (k + offered * blocked)
    return blocked / (1 - load * (1 - blocked))


def mean_of_mmc(servers: int, load: float) -> float:
    return MEAN_S + erlang_c(servers, load) * MEAN_S / (servers * (1 - load))


@pytest.mark.parametrize("binding", ["late", "bound"])
@pytest.mark.parametrize(("nodes", "capacity"), [(6, 1), (3, 4)])
def test_erlang_c_with_late_binding(binding: str, nodes: int, capacity: int) -> None:
    point = replace(QUEUE, nodes=nodes, capacity=capacity, routers=6, load=0.85, binding=binding)
    result = simulate(point)
    servers = nodes * capacity
    assert agrees(result.mean_s, mean_of_mmc(servers, 0.85))
    assert result.waited == pytest.approx(erlang_c(servers, 0.85), rel=0.01)
    assert not agrees(result.mean_s, mean_of_mmc(servers + 1, 0.85))
    assert result.waited != pytest.approx(erlang_c(servers + 1, 0.85), rel=0.01)
    early = simulate(replace(point, binding="early"))
    assert not agrees(early.mean_s, mean_of_mmc(servers, 0.85))


@pytest.mark.parametrize("policy", shmcoord.POLICIES)
def test_late_binding_is_the_bound_whatever_the_policy(policy: str) -> None:
    """Among equal nodes it does not matter who takes the next: the times are the very same."""
    point = Point(policy=policy, routers=3, requests=100_000, warmup=10_000)
    late, bound = (simulate(replace(point, binding=binding)) for binding in ("late", "bound"))
    assert late.raw["summary"] == bound.raw["summary"]
    assert simulate(replace(point, binding="early")).mean_s.value > bound.mean_s.value * 1.02


def test_a_queue_that_is_not_first_come_has_the_same_mean_and_a_longer_tail() -> None:
    fair = simulate(Point(binding="late"))
    lottery = simulate(Point(binding="late-random"))
    assert lottery.mean_s.value == pytest.approx(fair.mean_s.value, rel=0.005)
    assert lottery.p999_s.value > 1.1 * fair.p999_s.value


# --- many queues


MANY = Point(nodes=500, routers=4, load=0.8, work="exponential", requests=2_000_000, warmup=400_000)


def is_tail(result: Result, theory: Callable[[float, int], float]) -> bool:
    """Whether the parts of the queues that hold at least 1 to 4 are as theory says, within 2 %.

    The load is the run's own: by chance a little more or less arrives, and its fifteenth power
    differs by fifteen times as much.
    """
    assert result.utilisation == pytest.approx(0.8, rel=0.005)
    return all(
        result.at_least[k - 1] == pytest.approx(theory(result.utilisation, k), rel=0.02)
        for k in range(1, 5)
    )


def one_choice(load: float, k: int) -> float:
    return float(load**k)


def two_choices(load: float, k: int) -> float:
    """Vvedenskaya, Dobrushin and Karpelevich 1996; Mitzenmacher 1996."""
    return float(load ** (2**k - 1))


def test_the_tail_of_random() -> None:
    result = simulate(replace(MANY, policy="random", nodes=100))
    assert is_tail(result, one_choice)
    assert not is_tail(result, two_choices)


def test_the_tail_of_two_choices() -> None:
    """The theory is of infinitely many nodes; among 4,000 a queue of 5 is one in a thousand."""
    point = replace(MANY, policy="power-of-two", nodes=4000)
    result = simulate(point)
    assert is_tail(result, two_choices)
    assert not is_tail(result, one_choice)
    assert not is_tail(simulate(replace(MANY, policy="least-loaded")), two_choices)


# --- what holds in every run

ALL_KINDS = [
    Point(),
    Point(policy="random", work="lognormal", routers=16, nodes=40),
    Point(policy="round-robin", age_s=0.1, load=0.5),
    Point(age_s=0.1, own=True, phases="nodes", load=0.7),
    Point(age_s=math.inf, own=True),
    Point(policy=LEAST_FIRST, age_s=0.02, phases="same", load=0.4),
    Point(binding="late", capacity=3, slow=2),
    Point(binding="late-random", burst=5.0),
    Point(binding="bound", slow=3, slow_speed=0.25),
    Point(slow=2, weights=True, capacity=2, load=0.7),
    Point(cost="work", work="lognormal"),
]


@pytest.mark.parametrize("point", ALL_KINDS, ids=range(len(ALL_KINDS)))
def test_littles_law_and_utilisation(point: Point) -> None:
    # What binds early and knows nothing of a slow node may drown it; these do not.
    result = simulate(replace(point, requests=500_000, warmup=50_000))
    assert result.little == pytest.approx(1.0, rel=0.01)
    assert result.utilisation == pytest.approx(point.load, rel=0.02)
    assert sum(result.raw["sent"]) >= result.measured * 0.99


def test_a_run_that_loses_a_request_or_time_is_refused() -> None:
    point = Point(requests=20_000, warmup=2_000)
    raw = simulate(point).raw
    engine.check(point, raw)
    for key in ("finished", "whole_area", "whole_work"):
        with pytest.raises(BookkeepingError):
            engine.check(point, {**raw, key: raw[key] * 0.9999})


def test_the_same_seed_is_the_same_run() -> None:
    point = Point(requests=50_000, warmup=5_000, age_s=0.05, policy="random")
    assert simulate(point) == simulate(point)
    assert simulate(point) != simulate(replace(point, seed=2))


def test_what_arrives_does_not_depend_on_the_policy() -> None:
    points = [
        Point(requests=50_000, warmup=5_000, policy=policy, age_s=age_s)
        for policy in engine.policies()
        for age_s in (0.0, 0.3)
    ]
    raws = [simulate(point).raw for point in points]
    assert len({raw["arrival_rate"] for raw in raws}) == 1
    assert max(raw["whole_work"] for raw in raws) == pytest.approx(
        min(raw["whole_work"] for raw in raws), rel=1e-9
    )


@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_the_histogram_is_one_percent_right(spread: float) -> None:
    chance = random.Random(5)
    values = [chance.lognormvariate(-4.0, spread) for _ in range(20_000)]
    exact = sorted(values)
    for q in (0.01, 0.5, 0.9, 0.99, 0.999):
        want = exact[math.ceil(q * len(values)) - 1]
        assert engine.module().quantile_of(values, q) == pytest.approx(want, rel=0.01)
        shifted = [value * 1.02 for value in values]
        assert engine.module().quantile_of(shifted, q) != pytest.approx(want, rel=0.01)


# --- what routers know


def test_a_single_router_needs_no_shared_words() -> None:
    """It knows all there is, if it counts its own: the same picks, so the same times."""
    live = simulate(Point(routers=1, requests=100_000, warmup=10_000))
    for point in (Point(age_s=math.inf, own=True), Point(age_s=0.3, own=True)):
        alone = simulate(replace(point, routers=1, requests=100_000, warmup=10_000))
        assert alone.raw["summary"] == live.raw["summary"]
    two = simulate(Point(routers=2, requests=100_000, warmup=10_000, age_s=math.inf, own=True))
    assert two.raw["summary"] != live.raw["summary"]


def test_fresh_copies_are_nearly_live_and_old_ones_are_not() -> None:
    live = simulate(Point(load=0.7)).p99_s.value
    assert simulate(Point(load=0.7, age_s=1e-4)).p99_s.value == pytest.approx(live, rel=0.05)
    assert simulate(Point(load=0.7, age_s=0.2)).p99_s.value > 1.5 * live


def test_the_herd_on_old_status() -> None:
    """As it was measured with real processes: a median of 1,936 ms, where round robin has 5 ms."""
    herd = Point(policy=LEAST_FIRST, load=0.5, age_s=2.0, phases="same")
    assert simulate(herd).p50_s.value == pytest.approx(1.936, rel=0.1)
    turns = replace(herd, policy="round-robin")
    assert simulate(turns).p50_s.value == pytest.approx(0.005, rel=0.01)
    assert simulate(replace(herd, age_s=0.0)).p50_s.value == pytest.approx(0.005, rel=0.01)


def test_a_cache_keeps_what_was_used_last() -> None:
    point = replace(QUEUE, keys=1000, zipf=0.0, cache=250, load=0.5, hit_factor=0.5)
    result = simulate(point)
    # All keys alike: any 250 of 1,000 are as good as others.
    assert result.hit_ratio == pytest.approx(0.25, rel=0.01)
    assert result.utilisation == pytest.approx(0.5 * (1 - 0.25 * 0.5), rel=0.01)
    assert simulate(replace(point, cache=1000)).hit_ratio > 0.999
    # With unequal keys the least recently used one is the right one to drop: Che's approximation.
    weights = [1 / (k + 1) for k in range(1000)]
    parts = [weight / sum(weights) for weight in weights]

    def filled(time: float) -> float:
        return sum(1 - math.exp(-part * time) for part in parts)

    low, high = 0.0, 1e6
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if filled(middle) < 250 else (low, middle)
    che = sum(part * (1 - math.exp(-part * low)) for part in parts)
    assert simulate(replace(point, zipf=1.0)).hit_ratio == pytest.approx(che, rel=0.01)
    assert che > 0.6


# --- the scan is the one that routers call


def address_in_picker(policy: str) -> int:
    """Where shmcoord.picker itself says that a policy's machine code is."""
    capsule = shmcoord.picker.__pyx_capi__["find_policy"]  # type: ignore[attr-defined]
    name = ctypes.pythonapi.PyCapsule_GetName
    name.restype, name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    find = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object)(pointer(capsule, name(capsule)))
    return int(find(policy))


def module_at(address: int) -> str:
    """The file that is mapped there."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(part, 16) for part in line.split()[0].split("-"))
        if low <= address < high:
            return Path(line.split()[-1]).name
    raise LookupError(hex(address))


@pytest.mark.parametrize("policy", shmcoord.POLICIES)
def test_the_scan_is_the_pickers(policy: str) -> None:
    address = engine.module().scan_address(policy)
    assert address == address_in_picker(policy)
    assert module_at(address) == Path(shmcoord.picker.__file__).name


def test_what_is_not_the_pickers_is_told_apart() -> None:
    address = engine.module().scan_address(LEAST_FIRST)
    assert module_at(address) != Path(shmcoord.picker.__file__).name
    with pytest.raises(ValueError, match="no policy"):
        address_in_picker(LEAST_FIRST)


@pytest.mark.parametrize("policy", shmcoord.POLICIES)
@pytest.mark.parametrize("loads", [[3, 1, 2, 1, 1, 7], [0, 2, 0, 0, 5, 0, 1, 0, 9, 0, 0, 3]])
@pytest.mark.parametrize("keys", [[], ["a", "b", "c", "d", "e"]], ids=["no-key", "keys"])
def test_a_router_picks_the_same(name: str, policy: str, loads: list[int], keys: list[str]) -> None:
    """Same words, same random state: the same node, two hundred times in a row."""
    with Segment.open(name, slots=16, leases=8) as segment:
        nodes = [segment.join(f"n{i}", group="G", endpoint=f"n{i}:1") for i in range(len(loads))]
        for node, load in zip(nodes, loads, strict=True):
            node.waiting = load
        with Router(segment, policy=policy, seed=42) as router:
            picks = [
                int(router.pick("G", key=keys[i % len(keys)] if keys else None).node[1:])
                for i in range(200)
            ]
    state = (42 * 0x9E3779B97F4A7C15) % 2**64 | 1
    names = [f"n{i}" for i in range(len(loads))]
    choose = engine.module().choose
    assert choose(policy, loads, state, 200, names, keys) == picks
    if policy == "affinity" and keys:
        assert choose(policy, loads, state, 200, names[::-1], keys) != picks
    elif len(set(picks)) > 1:
        assert choose(policy, loads, state + 2**40, 200, names, keys) != picks
    else:
        assert choose(policy, loads[::-1], state, 200, names, keys) != picks


@pytest.mark.parametrize(
    "wrong",
    [
        {"policy": "none"},
        {"work": "none"},
        {"binding": "none"},
        {"phases": "none"},
        {"nodes": 0},
        {"routers": 0},
        {"capacity": 0},
        {"load": 0.0},
        {"age_s": -1.0},
        {"age_s": math.inf},
        {"slow": 7},
        {"slow_speed": 0.0},
        {"burst": 0.5},
        {"cache": 5},
        {"cost": "none"},
        {"requests": 100_500},
    ],
    ids=lambda wrong: "-".join(wrong),
)
def test_a_point_that_makes_no_sense_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"must|few"):
        Point(**wrong)  # type: ignore[arg-type]
