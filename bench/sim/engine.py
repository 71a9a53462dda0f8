"""One point of the simulation: what is simulated, and what came out.

The event loop is compiled (`_engine.pyx`); this is its face.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import shmcoord
from bench import native

SOURCE = Path(__file__).with_name("_engine.pyx")

WORKS = ("deterministic", "exponential", "bimodal", "lognormal")
BINDINGS = ("early", "late", "late-random", "bound")
PHASES = ("routers", "same", "nodes")
COSTS = ("request", "work")
LATENCIES = ("work", "queue")

#: 95 % of 5 ms and 5 % of 100 ms.
MEAN_S = 0.95 * 0.005 + 0.05 * 0.100


#: Not a policy of shmcoord: the least queue and, of equal ones, always the first.
LEAST_FIRST = "least-first"


def policies() -> tuple[str, ...]:
    """The names that a point may have: shmcoord's, and one to compare with."""
    return (*shmcoord.POLICIES, LEAST_FIRST)


@cache
def module() -> ModuleType:
    """The compiled engine, built first if need be.

    Raises:
        bench.native.NotBuiltError: it cannot be built here.
    """
    return native.load(SOURCE)


@dataclass(frozen=True)
class Point:
    """What is simulated.

    Attributes:
        policy: a name of `shmcoord.POLICIES`, or LEAST_FIRST.
        nodes: how many nodes; 6 to 10,000 are of interest, any number from 1 works.
        routers: how many routers; each request comes to any of them, as likely.
        load: arriving work as a part of what all nodes can do.
        work: how long requests take: "deterministic", "exponential", "bimodal" (95 % of 5 ms and
            5 % of 100 ms, if the mean is left as it is) or "lognormal".
        mean_s: mean of the work, seconds.
        sigma: standard deviation of the logarithm, for "lognormal".
        capacity: how many requests a node works on at once, each at full speed.
        slow: so many nodes are slow.
        slow_speed: speed of the slow ones; the others have 1.
        weights: whether routers know the speeds, as weights.
        age_s: 0: routers see and move the same live words, as shmcoord's do. Else what they see is
            copied every so many seconds; `math.inf`: never.
        own: whether a router that sees a copy adds what it has sent itself, and takes off what has
            ended of that, since the copy was made. With age_s = inf that is all it knows: least
            requests of a client.
        phases: when copies are made: by each router of all words at its own times ("routers"), by
            all routers at the same times ("same"), or by each node of its own word ("nodes").
        binding: "early": a request goes to a node at once, and queues there; "late": it waits for a
            node that has room, first come first served over all routers; "late-random": so too, but
            any router that waits may be the next; "bound": one first-come queue, and the fastest
            free node: no router could do better without knowing the work.
        burst: mean number of requests that arrive together (geometric); 1: a Poisson stream.
        keys: how many keys there are; 0: requests have none.
        zipf: key k is asked for in proportion to k ** -zipf.
        cache: how many keys a node's cache has room for; 0: there is none.
        hit_factor: what is left of the work when the key is in the cache. `load` is before that.
        cost: what a lease counts for: 1 ("request") or in proportion to its work ("work").
        latency: what a node's smoothed latency is of, for policies that look at it: the time in a
            handler, which begins when a worker is free ("work"), or all the time on the node
            ("queue").
        requests: how many are simulated.
        warmup: how many of them are not counted, at the beginning.
        seed: of all random numbers. What arrives when, and its work, is the same whatever the
            policy.
    """

    policy: str = "least-loaded"
    nodes: int = 6
    routers: int = 6
    load: float = 0.85
    work: str = "bimodal"
    mean_s: float = MEAN_S
    sigma: float = 1.0
    capacity: int = 1
    slow: int = 0
    slow_speed: float = 0.5
    weights: bool = False
    age_s: float = 0.0
    own: bool = False
    phases: str = "routers"
    binding: str = "early"
    burst: float = 1.0
    keys: int = 0
    zipf: float = 1.0
    cache: int = 0
    hit_factor: float = 1.0
    cost: str = "request"
    latency: str = "work"
    requests: int = 1_000_000
    warmup: int = 100_000
    seed: int = 1

    def __post_init__(self) -> None:
        def check(is_right: bool, what: str) -> None:
            if not is_right:
                raise ValueError(f"{what}: {self}")

        check(self.policy in policies(), f"policy must be one of {policies()}")
        check(self.work in WORKS, f"work must be one of {WORKS}")
        check(self.binding in BINDINGS, f"binding must be one of {BINDINGS}")
        check(self.phases in PHASES, f"phases must be one of {PHASES}")
        check(self.cost in COSTS, f"cost must be one of {COSTS}")
        check(self.latency in LATENCIES, f"latency must be one of {LATENCIES}")
        check(1 <= self.nodes <= 100_000, "nodes must be 1 to 100,000")
        check(1 <= self.routers <= 4096, "routers must be 1 to 4,096")
        check(1 <= self.capacity <= 1024, "capacity must be 1 to 1,024")
        check(0 < self.load < 100, "load must be positive")
        check(0 < self.mean_s < 3600, "mean_s must be positive")
        check(0 <= self.slow <= self.nodes, "slow must be 0 to nodes")
        check(0 < self.slow_speed <= 1, "slow_speed must be above 0 and at most 1")
        check(self.age_s >= 0, "age_s must not be negative")
        check(math.isfinite(self.age_s) or self.own, "who never sees a copy must know his own")
        check(self.burst >= 1, "burst must be at least 1")
        check(0 <= self.warmup <= self.requests - 1000, "too few requests behind the warm-up")
        check(0 <= self.cache <= self.keys <= 1_000_000, "cache must be 0 to keys")


@dataclass(frozen=True)
class Estimate:
    """A measured figure with its standard error, from 20 consecutive parts of the run."""

    value: float
    error: float


@dataclass(frozen=True)
class Result:
    """What came out: times from arrival to end.

    Attributes:
        mean_s, p50_s, p90_s, p99_s, p999_s: over all requests behind the warm-up.
        max_s: the longest.
        measured: how many requests that are.
        utilisation: part of the nodes' speed that was at work, until the last arrival.
        arrival_rate: requests per second.
        in_system: mean number of requests waiting and in work.
        waited: part of the requests that found no room (late binding).
        hit_ratio: part of the requests whose key was in the node's cache.
        at_least: part of the nodes that hold at least 1, 2, .. requests, over time.
        imbalance: requests of the node with the most over the mean of all.
        raw: all that the engine says.
    """

    mean_s: Estimate
    p50_s: Estimate
    p90_s: Estimate
    p99_s: Estimate
    p999_s: Estimate
    max_s: float
    measured: int
    utilisation: float
    arrival_rate: float
    in_system: float
    waited: float
    hit_ratio: float
    at_least: tuple[float, ...]
    imbalance: float
    raw: dict[str, Any]

    @property
    def little(self) -> float:
        """Mean number in the system over rate times mean time: 1, by Little's law."""
        return self.in_system / (self.arrival_rate * self.mean_s.value)

    def as_json(self) -> dict[str, Any]:
        """As plain data."""
        data = asdict(self)
        data["at_least"] = [part for part in self.at_least[:16] if part > 0]
        del data["raw"]
        return data


class BookkeepingError(AssertionError):
    """The simulation contradicts itself."""


def _estimate(raw: dict[str, Any], key: str) -> Estimate:
    parts = [batch[key] for batch in raw["batches"]]
    mean = sum(parts) / len(parts)
    variance = sum((part - mean) ** 2 for part in parts) / (len(parts) - 1)
    return Estimate(raw["summary"][key], math.sqrt(variance / len(parts)))


def check(point: Point, raw: dict[str, Any]) -> None:
    """What must hold in every run, from the first arrival to the last departure.

    Little's law, without any chance in it: the time that all requests were there, summed over
    requests, is the number of requests there, summed over time. And the work done by the nodes is
    what the requests asked for.

    Raises:
        BookkeepingError: it does not hold.
    """
    if raw["finished"] != point.requests:
        raise BookkeepingError(f"{raw['finished']} of {point.requests} requests have ended")
    for one, other in (("whole_area", "whole_sojourn"), ("whole_busy", "whole_work")):
        if not math.isclose(raw[one], raw[other], rel_tol=1e-6):
            raise BookkeepingError(f"{one} {raw[one]} is not {other} {raw[other]}")


def simulate(point: Point) -> Result:
    """Runs one point; a million requests to six nodes take less than a second."""
    raw = module().Engine(**asdict(point)).run()
    check(point, raw)
    estimates = {
        key: _estimate(raw, key) for key in ("mean_s", "p50_s", "p90_s", "p99_s", "p999_s")
    }
    sent = raw["sent"]
    return Result(
        **estimates,
        max_s=raw["max_s"],
        measured=raw["measured"],
        utilisation=raw["utilisation"],
        arrival_rate=raw["arrival_rate"],
        in_system=raw["in_system"],
        waited=raw["waited"],
        hit_ratio=raw["hit_ratio"],
        at_least=tuple(raw["at_least"]),
        imbalance=max(sent) * len(sent) / sum(sent),
        raw=raw,
    )
