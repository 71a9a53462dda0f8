"""How time is taken: a subject and its reference in turn, so that their ratio means something.

Machines change speed while they run (clock frequency, neighbours of a virtual machine, other
processes). Two figures taken a minute apart therefore make a poor ratio. Here each round times a
batch of the reference and right after it a batch of the subject; the ratio that is reported is the
median of the ratios of the rounds.

Whatever is timed is a `Timed`: it runs n operations in a loop of its own and says how many seconds
that took. All that is Python goes through `Statement`, that is, through the loop of `timeit`, with
the garbage collector off: the empty call that is the unit and the rows that are held against it
carry the same loop, neither has it subtracted.
"""

from __future__ import annotations

import asyncio
import statistics
import time
import timeit
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

BATCH_S = 0.002
"""A batch lasts about this long: many clock readings' worth, still shorter than a time slice."""


class Timed(Protocol):
    """Something that can be done n times."""

    def run(self, n: int) -> float:
        """Does it n times; returns the seconds that this took."""
        ...


class Statement:
    """A Python statement, repeated by the loop of `timeit`; its names are local variables."""

    def __init__(self, code: str, names: Mapping[str, Any] | None = None) -> None:
        names = names or {}
        setup = "; ".join(f"{name} = _{name}" for name in names) or "pass"
        self._timer = timeit.Timer(
            code, setup, globals={f"_{name}": value for name, value in names.items()}
        )

    def run(self, n: int) -> float:
        """Runs the statement n times; returns seconds."""
        return self._timer.timeit(n)


class AsyncCall:
    """A coroutine function without arguments, awaited again and again on one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, call: Callable[[], Awaitable[Any]]) -> None:
        self._loop = loop
        self._call = call

    async def _repeat(self, n: int) -> float:
        call = self._call
        start = time.perf_counter()
        for _ in range(n):
            await call()
        return time.perf_counter() - start

    def run(self, n: int) -> float:
        """Awaits the call n times, one after the other; returns seconds."""
        return self._loop.run_until_complete(self._repeat(n))


class Loop:
    """A function that does the work n times itself (compiled code)."""

    def __init__(self, function: Callable[[int], Any]) -> None:
        self._function = function

    def run(self, n: int) -> float:
        """Calls the function once, for n operations; returns seconds."""
        start = time.perf_counter()
        self._function(n)
        return time.perf_counter() - start


@dataclass(frozen=True)
class Measured:
    """What came of one measurement; times in seconds for one operation."""

    median_s: float
    quartiles_s: tuple[float, float]
    reference_s: float | None
    ratio: float | None
    ratio_quartiles: tuple[float, float] | None
    rounds: int
    iterations: int


def calibrate(timed: Timed, batch_s: float = BATCH_S) -> int:
    """Returns how many operations make a batch of about `batch_s` seconds (at least one)."""
    n = 1
    while True:
        seconds = timed.run(n)
        if seconds >= batch_s / 4:
            return max(1, round(n * batch_s / min(seconds, timed.run(n))))
        n *= 4


def quartiles(values: list[float]) -> tuple[float, float]:
    """Returns the lower and the upper quartile."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def measure(
    benchmark: Any,
    subject: Timed,
    reference: Timed | None = None,
    *,
    rounds: int = 200,
    batch_s: float = BATCH_S,
) -> Measured:
    """Times the subject through pytest-benchmark, with a batch of the reference before each round.

    Args:
        benchmark: the fixture of pytest-benchmark; its statistics are for one operation.
        subject: what is measured.
        reference: what it is held against, if anything.
        rounds: how many batches of each.
        batch_s: how long a batch should last.
    """
    iterations = calibrate(subject, batch_s)
    reference_iterations = calibrate(reference, batch_s) if reference else 0
    reference_s: list[float] = []

    def before_round() -> None:
        benchmark.stats.iterations = iterations
        if reference is not None:
            reference_s.append(reference.run(reference_iterations) / reference_iterations)

    benchmark.pedantic(subject.run, args=(iterations,), setup=before_round, rounds=rounds)
    subject_s: list[float] = list(benchmark.stats.stats.data)
    ratios = [a / b for a, b in zip(subject_s, reference_s, strict=True)] if reference else []
    return Measured(
        median_s=statistics.median(subject_s),
        quartiles_s=quartiles(subject_s),
        reference_s=statistics.median(reference_s) if ratios else None,
        ratio=statistics.median(ratios) if ratios else None,
        ratio_quartiles=quartiles(ratios) if ratios else None,
        rounds=len(subject_s),
        iterations=iterations,
    )
