"""From which age of the information on one policy beats another."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bench.sim import studies
from bench.sim.sweep import Sweep

#: What `first_crossing` gives where the rival wins at every age: the youngest copies.
FROM_THE_START = studies.AGES[0]


def first_crossing(ages: Sequence[float], ratios: Sequence[float]) -> float | None:
    """The age from which on the ratio is above 1, between two ages by logarithms.

    Args:
        ages: increasing.
        ratios: a time of the one over that of its rival, at each age.

    Returns:
        None if the ratio is not above 1 at the last age; the first age if it is above 1 everywhere.
    """
    if ratios[-1] <= 1:
        return None
    last_below = max((i for i, ratio in enumerate(ratios) if ratio <= 1), default=None)
    if last_below is None:
        return ages[0]
    low, high = math.log(ratios[last_below]), math.log(ratios[last_below + 1])
    part = -low / (high - low)
    step = math.log(ages[last_below + 1] / ages[last_below])
    return ages[last_below] * math.exp(part * step)


def crossing(
    sweep: Sweep,
    policy: str,
    rival: str,
    *,
    nodes: int = 6,
    routers: int = 6,
    load: float = studies.LOAD,
    key: str = "p99_s",
) -> float | None:
    """From which age on, seconds, the rival's p99 (or another time) is below the policy's.

    Both are on copies of the same age, each router with its own. None: not up to 2 s.
    """
    ratios = []
    for age_s in studies.AGES:
        of_both = [
            sweep.ms(studies.at_age(name, age_s, nodes=nodes, routers=routers, load=load), key)
            for name in (policy, rival)
        ]
        ratios.append(of_both[0] / of_both[1])
    return first_crossing(studies.AGES, ratios)
