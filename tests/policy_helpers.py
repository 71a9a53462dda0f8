"""What the tests of the policies share: nodes with a given load, and the statistics of ties."""

from __future__ import annotations

import contextlib
import math
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from helpers import Raw

from shmcoord import Node, Segment


@contextlib.contextmanager
def own_segment(word: str, leases: int = 16) -> Iterator[Segment]:
    """A segment of 64 slots, removed at the end."""
    name = f"test_{word}_{os.getpid()}_{secrets.token_hex(4)}"
    with Segment.open(name, slots=64, leases=leases) as segment:
        yield segment
    Segment.unlink(name)


def specs_of(count: int, **options: Any) -> list[dict[str, Any]]:
    """`count` nodes alike."""
    base = {
        "group": "GREEN",
        "weight": 1.0,
        "waiting": 0,
        "inflight": 0,
        "busy": False,
        "stored": "open",
    }
    return [{**base, **options} for _ in range(count)]


@contextlib.contextmanager
def cluster(segment: Segment, specs: Sequence[Mapping[str, Any]]) -> Iterator[list[Node]]:
    """Nodes as specified; joined in order, named n0, n1, ... unless a spec has a `name`."""
    with contextlib.ExitStack() as stack:
        handles, nodes = [], []
        for index, spec in enumerate(specs):
            node = stack.enter_context(
                segment.join(
                    spec.get("name", f"n{index}"),
                    group=spec["group"],
                    endpoint=f"e{index}",
                    weight=spec["weight"],
                    capacity=spec.get("capacity"),
                    interval_s=600,
                )
            )
            node.waiting = spec["waiting"]
            node.busy = spec["busy"]
            handles += [node.begin() for _ in range(spec["inflight"])]
            if spec["stored"] == "draining":
                node.drain()
            elif spec["stored"] == "shutdown":
                node.shutdown()
            if "latency_us" in spec:
                set_latency(segment, node, spec["latency_us"])
            nodes.append(node)
        yield nodes
        for handle in handles:
            handle.end()


def slot_of(segment: Segment, node: Node) -> int:
    """Where the node is in the segment, by its name."""
    raw = Raw(segment.name)
    for slot in range(raw.slots):
        name = raw.read(raw.offset("meta", "name", slot), 64).split(b"\0")[0]
        alive = raw.number("hot", "kind", 4, slot) and raw.number("hot", "death", 4, slot)
        if alive and name.decode() == node.name:
            return slot
    raise AssertionError(f"no node {node.name}")


def set_latency(segment: Segment, node: Node, latency_us: int) -> None:
    """Have routers see that smoothed latency; the node's next request moves it on."""
    Raw(segment.name).set("hot", "latency_us", 4, latency_us, slot_of(segment, node))


def chi_square(counts: Mapping[str, int], expected: Mapping[str, float] | Sequence[str]) -> float:
    """Pearson's statistic; `expected` are shares by name, or names that are alike."""
    if not isinstance(expected, Mapping):
        expected = dict.fromkeys(expected, 1.0)
    total, shares = sum(counts.values()), sum(expected.values())
    assert set(counts) <= {name for name, share in expected.items() if share}
    return sum(
        (counts.get(name, 0) - total * share / shares) ** 2 / (total * share / shares)
        for name, share in expected.items()
        if share
    )


def chi_square_limit(freedom: int) -> float:
    """Exceeded once in a million by chance (Wilson and Hilferty 1931)."""
    part = 2 / (9 * freedom)
    return freedom * (1 - part + 4.753 * math.sqrt(part)) ** 3
