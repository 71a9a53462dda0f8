"""The requests of a run, drawn from a seed: when each arrives, where, and how much work it is.

A trace depends on its shape, its arrivals, its load, its length and its seed, and on nothing else:
every system is given exactly the same one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

NODES = 6
MEAN_WORK_S = 0.95 * 0.005 + 0.05 * 0.100  # 9.75 ms, in every shape

BURST_FACTOR = 3.0
"""In a burst, requests arrive this many times as fast as between bursts."""
BURST_S = 0.050
QUIET_S = 0.200
"""Mean lengths of a burst and of the time between two; both are exponential."""


@dataclass(frozen=True)
class Shape:
    """How much work the requests are, and how fast each node does it.

    Attributes:
        name: in the command line and in the results.
        title: for people.
        draw: n works in seconds.
        speeds: of each node; 1 does a second's work in a second.
    """

    name: str
    title: str
    draw: Callable[[np.random.Generator, int], NDArray[np.float64]]
    speeds: tuple[float, ...] = (1.0,) * NODES


def _bimodal(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    return np.where(rng.random(n) < 0.05, 0.100, 0.005)


def _exponential(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    return rng.exponential(MEAN_WORK_S, n)


def _deterministic(_rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    return np.full(n, MEAN_WORK_S)


SHAPES = MappingProxyType(
    {
        shape.name: shape
        for shape in (
            Shape("bimodal", "95 % of 5 ms, 5 % of 100 ms", _bimodal),
            Shape("exponential", "exponential, mean 9.75 ms", _exponential),
            Shape("deterministic", "9.75 ms each", _deterministic),
            Shape(
                "half-speed",
                "95 % of 5 ms, 5 % of 100 ms, one node at half speed",
                _bimodal,
                (1.0,) * (NODES - 1) + (0.5,),
            ),
        )
    }
)


@dataclass(frozen=True)
class Trace:
    """Requests in the order of their arrival.

    Attributes:
        arrival_s: when each arrives, from the start of the run.
        work_s: how long a node of speed 1 works on it.
        draw: a uniform number per request, for whatever else is drawn (its router, its key).
        seconds: length of the run.
    """

    arrival_s: NDArray[np.float64]
    work_s: NDArray[np.float64]
    draw: NDArray[np.float64]
    seconds: float

    def of_router(self, router: int, routers: int) -> NDArray[np.int64]:
        """Indices of the requests that arrive at one of the routers (each at one, at random)."""
        return np.flatnonzero((self.draw * routers).astype(np.int64) == router)


def poisson(rng: np.random.Generator, rate: float, seconds: float) -> NDArray[np.float64]:
    """Arrivals of a Poisson process of so many per second."""
    n = rng.poisson(rate * seconds)
    return np.sort(rng.random(n)) * seconds


def bursty(rng: np.random.Generator, rate: float, seconds: float) -> NDArray[np.float64]:
    """Arrivals of a Markov-modulated Poisson process of two states with the same mean rate.

    Bursts of 50 ms in the mean, in which requests arrive three times as fast as between them; the
    time between bursts is 200 ms in the mean.
    """
    share = BURST_S / (BURST_S + QUIET_S)
    quiet = rate / (1 - share + share * BURST_FACTOR)
    arrivals = []
    at = 0.0
    in_burst = rng.random() < share
    while at < seconds:
        length = rng.exponential(BURST_S if in_burst else QUIET_S)
        arrivals.append(at + poisson(rng, quiet * (BURST_FACTOR if in_burst else 1.0), length))
        at += length
        in_burst = not in_burst
    whole = np.concatenate(arrivals)
    return whole[whole < seconds]


ARRIVALS = MappingProxyType({"poisson": poisson, "bursty": bursty})


def arrival_rate(shape: Shape, load: float) -> float:
    """Requests per second at which the nodes together are busy for the part `load` of the time."""
    return load * sum(shape.speeds) / MEAN_WORK_S


def make_trace(shape: Shape, arrivals: str, load: float, seconds: float, seed: int) -> Trace:
    """Draws the requests of one run.

    Args:
        shape: the work.
        arrivals: a name of ARRIVALS.
        load: part of the nodes' capacity, above 1 in overload.
        seconds: length of the run.
        seed: the same seed gives the same trace.
    """
    rng = np.random.default_rng([seed, *f"{shape.name} {arrivals} {load:.4f}".encode()])
    when = ARRIVALS[arrivals](rng, arrival_rate(shape, load), seconds)
    return Trace(when, shape.draw(rng, len(when)), rng.random(len(when)), seconds)
