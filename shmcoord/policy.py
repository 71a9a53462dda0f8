"""The table of policies: name, rule, when to use it. The scans themselves are in `picker.pyx`."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["POLICIES", "Policy"]


@dataclass(frozen=True)
class Policy:
    """A rule that picks one of the eligible nodes of a group.

    Eligible are, for every policy, the nodes whose process is alive and whose state is IDLE or
    BUSY. Nodes with a late heartbeat (SUSPECT), or that could not be reached a moment ago, are
    taken only when no other is there.
    """

    name: str
    rule: str
    use: str


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
                "round-robin",
                "one after the other, whatever their load",
                "to compare with; or where all requests cost the same and nodes are alike",
            ),
            Policy(
                "random",
                "any of them, each as likely",
                "to compare with",
            ),
        )
    }
)
