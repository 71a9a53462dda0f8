"""From the requests of a cell to the figures that are kept of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from hdrh.histogram import HdrHistogram
from numpy.typing import NDArray

from bench.tail.bound import one_queue
from bench.tail.cell import Cell, Measured
from bench.tail.router import Outcome
from bench.tail.trace import MEAN_WORK_S, NODES, SHAPES, make_trace

PERCENTILES = (50.0, 90.0, 99.0, 99.9)
_LOWEST_US = 1
_HIGHEST_US = 120_000_000
_DIGITS = 3


def histogram(latency_s: Iterable[float]) -> HdrHistogram:
    """An HDR histogram of microseconds, exact to 0.1 %."""
    result = HdrHistogram(_LOWEST_US, _HIGHEST_US, _DIGITS)
    for value in latency_s:
        result.record_value(max(_LOWEST_US, round(value * 1e6)))
    return result


def merged(histograms: Iterable[HdrHistogram]) -> HdrHistogram:
    """All of them in one."""
    result = HdrHistogram(_LOWEST_US, _HIGHEST_US, _DIGITS)
    for each in histograms:
        result.add(each)
    return result


def encode(value: HdrHistogram) -> str:
    """As text, in HdrHistogram's own format."""
    return value.encode().decode("ascii")


def decode(text: str) -> HdrHistogram:
    """The reverse of `encode`."""
    return HdrHistogram.decode(text.encode("ascii"))


def percentile_name(percentile: float) -> str:
    """`p99.9`, as in the results."""
    return f"p{percentile:g}"


def _latency(value: HdrHistogram, latency_s: NDArray[np.float64]) -> dict[str, float]:
    names = {percentile_name(p): p for p in PERCENTILES}
    return {
        "mean": float(latency_s.mean()) * 1e3 if len(latency_s) else float("nan"),
        **{name: value.get_value_at_percentile(p) / 1e3 for name, p in names.items()},
    }


def _quantiles_ms(values_ns: NDArray[Any]) -> dict[str, float]:
    if not len(values_ns):
        return {}
    return {
        percentile_name(p): round(float(np.percentile(values_ns, p)) / 1e6, 4) for p in (50.0, 99.0)
    }


def gaps_ns(records: NDArray[np.void]) -> NDArray[np.int64]:
    """How long nodes stood still between two requests of which the second had arrived before."""
    gaps = []
    for node in range(NODES):
        mine = np.sort(records[records["node"] == node], order="begun_ns")
        gap = mine["begun_ns"][1:] - mine["ended_ns"][:-1]
        gaps.append(gap[mine["due_ns"][1:] < mine["ended_ns"][:-1]])
    return np.concatenate(gaps)


def handover_ns(records: NDArray[np.void]) -> NDArray[np.int64]:
    """From the end of a node's work until its next request is sent, which had arrived before.

    Only of requests that waited in front of the nodes: those sent before count for nothing.
    """
    gaps = []
    for node in range(NODES):
        mine = np.sort(records[records["node"] == node], order="begun_ns")
        gap = mine["sent_ns"][1:] - mine["ended_ns"][:-1]
        gaps.append(gap[(mine["due_ns"][1:] < mine["ended_ns"][:-1]) & (gap > 0)])
    return np.concatenate(gaps)


def summarize(cell: Cell, measured: Measured) -> dict[str, Any]:
    """The figures of a cell: latencies in milliseconds, CPU in microseconds per request.

    Latencies are those of all requests, of which those without an answer count for as long as it
    was waited for; in overload they are those of the answers that came in time.
    """
    records = np.concatenate(measured.records)
    outcomes = records["outcome"]
    counts = {each.name.lower(): int((outcomes == each).sum()) for each in Outcome}
    histograms = []
    latencies = []
    for each in measured.records:
        kept = each[each["outcome"] == Outcome.ANSWERED] if cell.overload else each
        latency_s = (kept["done_ns"] - kept["due_ns"]) / 1e9
        latencies.append(latency_s)
        histograms.append(histogram(latency_s.tolist()))
    whole = merged(histograms)
    answered = records[records["node"] >= 0]
    refused = records[outcomes == Outcome.REFUSED]
    requests = max(1, len(records))
    return {
        "requests": len(records),
        **counts,
        "latency_ms": _latency(whole, np.concatenate(latencies)),
        "histogram": encode(whole),
        "goodput": counts["answered"] / cell.seconds,
        "capacity": _capacity(cell) if not cell.in_flight else None,
        "refused_after_ms": _quantiles_ms(refused["done_ns"] - refused["due_ns"]),
        "to_send_ms": _quantiles_ms(answered["sent_ns"] - answered["due_ns"]),
        "idle_gap_ms": _quantiles_ms(gaps_ns(answered)),
        "handover_ms": _quantiles_ms(handover_ns(answered)),
        "over_work_ms": _quantiles_ms(measured.over_ns),
        "node_share": (np.bincount(answered["node"], minlength=NODES) / max(1, len(answered)))
        .round(4)
        .tolist(),
        "cpu_us": {name: each / requests * 1e6 for name, each in measured.cpu.items()},
        "machine_busy": round(measured.busy, 4),
    }


def _capacity(cell: Cell) -> float:
    """How many requests per second the nodes can do, as much work as these requests are."""
    shape = SHAPES[cell.shape]
    seconds = cell.warmup_s + cell.seconds
    trace = make_trace(shape, cell.arrivals, cell.load, seconds, cell.seed)
    measured = trace.arrival_s >= cell.warmup_s
    mean_s = float(trace.work_s[measured].mean()) if measured.any() else MEAN_WORK_S
    return sum(shape.speeds) / mean_s


def bound(cell: Cell) -> dict[str, Any]:
    """The figures of one queue in front of all nodes, for the very trace of a cell."""
    shape = SHAPES[cell.shape]
    seconds = cell.warmup_s + cell.seconds
    trace = make_trace(shape, cell.arrivals, cell.load, seconds, cell.seed)
    latency_s = one_queue(trace.arrival_s, trace.work_s, shape.speeds)
    latency_s = latency_s[trace.arrival_s >= cell.warmup_s]
    whole = histogram(latency_s.tolist())
    return {
        "requests": len(latency_s),
        "latency_ms": _latency(whole, latency_s),
        "histogram": encode(whole),
    }
