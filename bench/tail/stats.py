"""Comparisons in pairs: two systems on the same seeds, and how sure their ratio is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A number and the interval that holds it with 95 % confidence.

    Attributes:
        value: the estimate.
        low, high: the interval.
        seeds: how many runs it comes from.
    """

    value: float
    low: float
    high: float
    seeds: int


def _bootstrap(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> tuple[float, float]:
    """Interval of the mean: percentiles of the means of samples drawn from the values."""
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(values), (RESAMPLES, len(values)))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values[picks].mean(axis=1), [tail, 1 - tail])
    return float(low), float(high)


def mean(values: Sequence[float]) -> Estimate:
    """The mean over the seeds."""
    numbers = np.asarray(values, float)
    return Estimate(float(numbers.mean()), *_bootstrap(numbers), len(numbers))


def ratio(subject: Sequence[float], reference: Sequence[float]) -> Estimate:
    """How many times as large the subject is: the geometric mean of the ratios seed by seed.

    Args:
        subject, reference: one figure per seed, of the same seeds in the same order.

    Raises:
        ValueError: they are not of one length, or there are none.
    """
    if len(subject) != len(reference) or not len(subject):
        raise ValueError(f"not in pairs: {len(subject)} and {len(reference)} figures")
    logs = np.log(np.asarray(subject, float)) - np.log(np.asarray(reference, float))
    low, high = _bootstrap(logs)
    return Estimate(float(np.exp(logs.mean())), float(np.exp(low)), float(np.exp(high)), len(logs))
