"""The table of policies: name, rule, when to use it. The scans themselves are in `picker.pyx`.

A policy of one's own is a Python callable that gets a `View` and returns one of its candidates, or
a function in Cython (`picker.native_policy`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shmcoord.decision import Candidate

__all__ = ["POLICIES", "Policy", "View"]


@dataclass(frozen=True)
class Policy:
    """A rule that picks one of the eligible nodes of a group.

    Eligible are, for every policy, the nodes whose process is alive and whose state is IDLE or
    BUSY. Nodes with a late heartbeat (SUSPECT), that could not be reached a moment ago, or that
    fail much more than the others (ejected) are taken only when no other is there, or when too few
    others are (`panic_threshold`). Load is the queue relative to the weight and, where every node
    of the group states a capacity, relative to the capacity; nodes at their capacity come last.
    """

    name: str
    rule: str
    use: str


@dataclass(frozen=True)
class View:
    """What a policy written in Python sees: one moment of the group, copied.

    Attributes:
        candidates: the nodes that may be taken (open, alive, not excluded), never empty.
        key: hash of the caller's key; 0 without one.
        cost: what the lease will count for.
        random: a number in [0, 1), from the router's own seeded generator; use no other.
    """

    candidates: tuple[Candidate, ...]
    key: int
    cost: int
    random: Callable[[], float]


POLICIES = MappingProxyType(
    {
        policy.name: policy
        for policy in (
            Policy(
                "least-loaded",
                "IDLE before BUSY, then the lowest queue relative to weight; ties at random",
                "the default: the load is live and reserved, so the least is safe to take",
            ),
            Policy(
                "power-of-two",
                "of two distinct nodes by chance the one that least-loaded would take",
                "where the load is known late (other hosts): two choices do not herd",
            ),
            Policy(
                "hot-cold",
                "nodes above a quantile of the group's load are hot; of the cold the lowest "
                "latency times (queue + 1) wins, if none is cold the lowest load",
                "where nodes differ in speed for reasons that their weights do not say; with live "
                "load only: on an old copy of it everybody takes the same node",
            ),
            Policy(
                "affinity",
                "the node that the key hashes to, unless it has more than 1.25 times its share; "
                "then the key's next one",
                "where a node has cached what a key needs: prefixes of prompts, sessions, shards",
            ),
            Policy(
                "round-robin",
                "one after the other in proportion to their weights, whatever their load",
                "to compare with; or where all requests cost the same and nodes are alike",
            ),
            Policy(
                "random",
                "any of them, each as likely as its weight says",
                "to compare with",
            ),
        )
    }
)
