"""A language model's shape: long streams of tokens whose costs differ a hundredfold.

A request has a prompt and an answer, both of lognormal length. A node serves many at once: it
goes on in steps, each of which makes one token of every answer and takes the longer the more tokens
(prompts and what has been answered) the node holds; the step in which a request joins also reads
its prompt. This is how servers of language models batch; only the arithmetic is left out.

Compared are: the least cost outstanding (a lease costs what its prompt and the longest answer
that was asked for will hold), the least number of requests, and round-robin.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.tail.trace import NODES, poisson

SHAPE = "language-model"
FULL_RATE = 71.0
"""Requests per second that six nodes can just serve, 100 % load: by the constants below, a request
takes 78 ms for the tokens that it holds, step by step, and 7 ms for its prompt, in the mean."""

STEP_S = 0.005
STEP_PER_TOKEN_S = 2e-6
PREFILL_PER_TOKEN_S = 20e-6
"""A step takes so long, more for each token held, more for each token of a prompt that it reads."""

PROMPT_MEDIAN, PROMPT_SIGMA, PROMPT_MAX = 200.0, 1.0, 4096
ANSWER_MEDIAN, ANSWER_SIGMA, ANSWER_MAX = 60.0, 0.9, 512
TOKENS_PER_COST = 16
TOKENS_PER_MESSAGE = 16

REQUEST = struct.Struct("<II")
"""Tokens of the prompt and of the answer."""
MESSAGE = struct.Struct("<BI")
"""The node's number, and how many tokens of the answer there are by now."""

RECORD = np.dtype(
    [
        ("index", np.int64),
        ("outcome", np.int8),
        ("node", np.int8),
        ("tokens", np.int64),
        ("due_ns", np.int64),
        ("first_ns", np.int64),
        ("done_ns", np.int64),
    ]
)
"""A request: when it was due, when its first token came, when its last."""


@dataclass(frozen=True)
class Way:
    """One of the ways that are compared.

    Attributes:
        title: for people.
        policy: shmcoord's policy.
        costs: whether a lease costs what it will hold; else it costs 1.
    """

    title: str
    policy: str
    costs: bool


WAYS = MappingProxyType(
    {
        "llm-least-cost": Way("shmcoord, least cost outstanding", "least-loaded", costs=True),
        "llm-least-requests": Way("shmcoord, least requests", "least-loaded", costs=False),
        "llm-round-robin": Way("shmcoord, round-robin", "round-robin", costs=False),
    }
)


@dataclass(frozen=True)
class Streams:
    """Requests in the order of their arrival.

    Attributes:
        arrival_s: from the start of the run.
        prompt, answer: tokens.
        limit: the longest answer that was asked for: a power of two, not below the answer.
        draw: a uniform number per request, for its router.
    """

    arrival_s: NDArray[np.float64]
    prompt: NDArray[np.int64]
    answer: NDArray[np.int64]
    limit: NDArray[np.int64]
    draw: NDArray[np.float64]

    def cost(self, index: int) -> int:
        """What a request holds at most, in units of 16 tokens."""
        return -(-int(self.prompt[index] + self.limit[index]) // TOKENS_PER_COST)


def _lengths(
    rng: np.random.Generator, n: int, median: float, sigma: float, most: int
) -> NDArray[np.int64]:
    return np.clip(rng.lognormal(np.log(median), sigma, n).round().astype(np.int64), 1, most)


def make_streams(load: float, seconds: float, seed: int) -> Streams:
    """Draws the requests of one run; the same seed gives the same ones."""
    rng = np.random.default_rng([seed, *f"{SHAPE} {load:.4f}".encode()])
    when = poisson(rng, load * FULL_RATE, seconds)
    prompt = _lengths(rng, len(when), PROMPT_MEDIAN, PROMPT_SIGMA, PROMPT_MAX)
    answer = _lengths(rng, len(when), ANSWER_MEDIAN, ANSWER_SIGMA, ANSWER_MAX)
    limit = 2 ** np.ceil(np.log2(answer)).astype(np.int64)
    return Streams(when, prompt, answer, limit, rng.random(len(when)))


def _quantiles_ms(values_ms: NDArray[np.float64]) -> dict[str, float]:
    return {
        "mean": float(values_ms.mean()),
        **{f"p{p:g}": float(np.percentile(values_ms, p)) for p in (50.0, 90.0, 99.0)},
    }


def summarize(records: NDArray[np.void], cpu: dict[str, float], busy: float) -> dict[str, Any]:
    """The figures of a cell: milliseconds to the first token, to the last, and per token."""
    answered = records[records["node"] >= 0]
    whole_ms = (answered["done_ns"] - answered["due_ns"]) / 1e6
    return {
        "requests": len(records),
        "answered": len(answered),
        "first_token_ms": _quantiles_ms((answered["first_ns"] - answered["due_ns"]) / 1e6),
        "latency_ms": _quantiles_ms(whole_ms),
        "per_token_ms": _quantiles_ms(whole_ms / np.maximum(1, answered["tokens"])),
        "node_share": (np.bincount(answered["node"], minlength=NODES) / len(answered))
        .round(4)
        .tolist(),
        "cpu_us": {name: each / max(1, len(records)) * 1e6 for name, each in cpu.items()},
        "machine_busy": round(busy, 4),
    }
