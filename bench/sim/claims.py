"""What the sentences of docs/policies.md say, as conditions on a sweep.

A new picker, or a new sweep, may make a sentence wrong: then the page is not written, and the
sentence is named.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from bench.sim import studies
from bench.sim.crossing import crossing
from bench.sim.engine import LEAST_FIRST
from bench.sim.studies import BLIND, LOOKING, PLAIN
from bench.sim.sweep import Sweep


class ClaimError(AssertionError):
    """The page says what the sweep does not show."""


def least_loaded_is_best_live(sweep: Sweep) -> bool:
    """Live, least-loaded is the best of those that send at once, at any load."""
    return all(
        sweep.ms(studies.at_load("least-loaded", load), key)
        <= 1.01 * sweep.ms(studies.at_load(policy, load), key)
        for load in studies.LOADS
        for policy in PLAIN
        for key in ("mean_s", "p99_s")
    )


def who_is_alone_loses_more_with_more_routers(sweep: Sweep) -> bool:
    """Who counts only his own requests is the worse off the more routers there are."""
    alone = [sweep.ms(studies.alone(count)) for count in studies.ALONE]
    live = [sweep.ms(studies.shared(count)) for count in studies.ALONE]
    return (
        all(later > 0.97 * sooner for sooner, later in itertools.pairwise(alone))
        and alone[-1] > 2 * live[-1]
        and max(live) < 1.05 * min(live)
    )


def equal_work_forgives_round_robin(sweep: Sweep) -> bool:
    """With work that is always the same, round-robin loses least."""

    def over_bound(work: str) -> float:
        point = studies.at_load("round-robin", 0.7, work=work)
        bound = studies.at_load("least-loaded", 0.7, work=work, binding="bound")
        return sweep.ms(point) / sweep.ms(bound)

    return over_bound("deterministic") == min(map(over_bound, studies.WORKS))


def waiting_is_the_bound(sweep: Sweep) -> bool:
    """Waiting first come first served is the one queue; if any router is woken, the tail grows."""
    return all(
        sweep.of(studies.at_load("", load, binding="late"))["p99_s"]
        == sweep.of(studies.at_load("", load, binding="bound"))["p99_s"]
        and sweep.ms(studies.at_load("least-loaded", load, binding="late-random"), "p999_s")
        > sweep.ms(studies.at_load("", load, binding="late"), "p999_s")
        for load in (0.7, 0.85, 0.95)
    )


def many_at_once_make_binding_indifferent(sweep: Sweep) -> bool:
    """From some ten at once per node on, early and late are all one."""
    return all(
        sweep.ms(studies.wide(16, work=work))
        < 1.05 * sweep.ms(studies.wide(16, work=work, binding="late"))
        for work in studies.WORKS
    ) and sweep.ms(studies.wide(1)) > 1.2 * sweep.ms(studies.wide(1, binding="late"))


def the_first_of_equals_herds_worst(sweep: Sweep) -> bool:
    """The prototype's way has a median near 1,936 ms; ties at random take off most of it."""
    worst = sweep.ms(studies.herd_point(LEAST_FIRST, 2.0, "same"), "p50_s")
    ours = sweep.ms(studies.herd_point("least-loaded", 2.0, "same"), "p50_s")
    turns = sweep.ms(studies.herd_point("round-robin", 2.0, "same"), "p50_s")
    apart = sweep.ms(studies.herd_point("least-loaded", 2.0, "routers"), "p50_s")
    by_latency = sweep.ms(studies.herd_point("hot-cold", 2.0, "same"), "p50_s")
    return (
        1800 < worst < 2100
        and turns < 6
        and ours < worst / 5
        and apart < ours
        and by_latency > worst / 2
    )


def old_load_is_worse_than_none(sweep: Sweep) -> bool:
    """At two seconds round-robin beats all that look, and at 100 ms two choices beat the least."""
    return all(
        sweep.ms(studies.at_age("round-robin", 2.0)) < sweep.ms(studies.at_age(policy, 2.0))
        for policy in LOOKING
    ) and sweep.ms(studies.at_age("power-of-two", 0.1)) < sweep.ms(
        studies.at_age("least-loaded", 0.1)
    )


def own_sends_help_at_any_age(sweep: Sweep) -> bool:
    """With own sends added, least-loaded on six routers is the best on copies of any age."""
    return all(
        sweep.ms(studies.at_age("least-loaded", age, own=True))
        < 1.01 * sweep.ms(studies.at_age(policy, age))
        for age in studies.AGES
        for policy in PLAIN
    )


def the_number_of_nodes_matters_little(sweep: Sweep) -> bool:
    """The age at which round-robin beats least-loaded differs little by nodes."""
    for routers in studies.ROUTERS:
        ages = [
            crossing(sweep, "least-loaded", "round-robin", nodes=nodes, routers=routers)
            for nodes in studies.GROUPS
        ]
        known = [age for age in ages if age is not None]
        if len(known) == len(ages) and max(known) > 4 * min(known):
            return False
    return True


def more_routers_herd_later(sweep: Sweep) -> bool:
    """The more routers, each with its own copy times, the older the copies may be."""
    for nodes in studies.GROUPS:
        for rival in ("power-of-two", "round-robin"):
            ages = [
                crossing(sweep, "least-loaded", rival, nodes=nodes, routers=routers) or 2.0
                for routers in studies.ROUTERS
            ]
            if ages != sorted(ages) or ages[-1] < 2 * ages[0]:
                return False
    return True


def two_choices_lose_to_none_in_the_end(sweep: Sweep) -> bool:
    """Round-robin beats two choices later than it beats the least; at low load soon."""

    def age(policy: str, load: float) -> float:
        return crossing(sweep, policy, "round-robin", load=load) or 2.0

    return (
        all(
            age("power-of-two", load) > age("least-loaded", load)
            for load in studies.LOADS
            if load >= 0.5
        )
        and age("power-of-two", 0.3) < age("power-of-two", 0.7) / 2
        and age("power-of-two", 0.95) > 2 * age("power-of-two", 0.7)
    )


def slow_nodes(sweep: Sweep) -> bool:
    """Hot-cold gains with very slow nodes, loses among equal ones; blind ones do not keep up."""

    def mean(policy: str, speed: float, nodes: int = 6) -> float:
        return sweep.ms(studies.with_slow(policy, speed, nodes=nodes), "mean_s")

    return (
        mean("hot-cold", 0.25) < mean("least-loaded", 0.25)
        and mean("hot-cold", 0.25, 48) < mean("least-loaded", 0.25, 48)
        and mean("hot-cold", 1.0) > mean("least-loaded", 1.0)
        and all(mean(policy, 0.5) > 20 * mean("least-loaded", 0.5) for policy in BLIND)
    )


def affinity_pays(sweep: Sweep) -> bool:
    """Affinity costs a little where hits save nothing, and wins where they save much."""

    def p99(policy: str, factor: float) -> float:
        return sweep.ms(studies.keyed(policy, factor))

    return (
        p99("least-loaded", 1.0) < p99("affinity", 1.0) < 1.5 * p99("least-loaded", 1.0)
        and p99("affinity", 0.4) < p99("least-loaded", 0.4)
        and sweep.of(studies.keyed("affinity", 1.0))["imbalance"] < 1.3
    )


def bursts_level(sweep: Sweep) -> bool:
    """The larger the burst, the less the policy matters."""

    def ratio(burst: float) -> float:
        return sweep.ms(studies.bursty("round-robin", burst)) / sweep.ms(
            studies.bursty("least-loaded", burst)
        )

    return ratio(studies.BURSTS[-1]) < ratio(studies.BURSTS[0]) / 1.5


def known_costs_help(sweep: Sweep) -> bool:
    """Least cost beats least requests where lengths vary."""
    return all(
        sweep.ms(studies.costly("work", sigma=sigma), "mean_s")
        < sweep.ms(studies.costly("request", sigma=sigma), "mean_s")
        for sigma in studies.SIGMAS
    )


def many_nodes_are_easy(sweep: Sweep) -> bool:
    """In groups of hundreds least-loaded is at the bound, and round-robin as far off as ever."""
    at = {
        (policy, n): sweep.ms(studies.of_size(policy, n), "mean_s")
        for policy in ("least-loaded", "round-robin", "power-of-two")
        for n in (6, 256)
    }
    bound = sweep.ms(studies.of_size("least-loaded", 256, binding="bound"), "mean_s")
    return (
        at["least-loaded", 256] < 1.02 * bound
        and at["round-robin", 256] > 0.8 * at["round-robin", 6]
        and at["power-of-two", 256] > 2 * bound
    )


CLAIMS: tuple[Callable[[Sweep], bool], ...] = (
    least_loaded_is_best_live,
    who_is_alone_loses_more_with_more_routers,
    equal_work_forgives_round_robin,
    waiting_is_the_bound,
    many_at_once_make_binding_indifferent,
    the_first_of_equals_herds_worst,
    old_load_is_worse_than_none,
    own_sends_help_at_any_age,
    the_number_of_nodes_matters_little,
    more_routers_herd_later,
    two_choices_lose_to_none_in_the_end,
    slow_nodes,
    affinity_pays,
    bursts_level,
    known_costs_help,
    many_nodes_are_easy,
)


def check(sweep: Sweep) -> None:
    """Holds every claim against the sweep.

    Raises:
        ClaimError: with the claims that are not so.
    """
    wrong = [f"{claim.__name__}: {claim.__doc__}" for claim in CLAIMS if not claim(sweep)]
    if wrong:
        raise ClaimError(
            "docs/policies.md claims what the sweep does not show:\n" + "\n".join(wrong)
        )
