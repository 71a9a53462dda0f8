"""What a router would do, or did, and why: for logs, tests and people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shmcoord.backend import Backend
    from shmcoord.status import Health, State

__all__ = ["Candidate", "Decision", "PastDecision"]


@dataclass(frozen=True)
class Candidate:
    """One node of the group at the moment of a decision.

    Attributes:
        node, group, endpoint, segment: which node, and where.
        state, health: as in `Status`.
        queue: waiting + in flight.
        capacity, weight: as joined.
        score: queue relative to weight (and to capacity, where every node of the group states
            one), plus the margin of another host; lower is better.
        latency_s: the node's own smoothed latency; 0 before its first request.
        share: of its traffic, while it starts slowly; else 1.
        passed_over: why it was not chosen; empty for the chosen one.
    """

    node: str
    group: str
    endpoint: str
    segment: str
    state: State
    health: Health
    queue: int
    capacity: int
    weight: float
    score: float
    latency_s: float
    share: float
    passed_over: str

    def __str__(self) -> str:
        text = f"{self.node} - State: {self.state.name}, Queue: {self.queue}, "
        text += f"Score: {self.score:.2f}"
        if self.health:  # ALIVE is what one expects
            text += f", Health: {self.health.name}"
        return f"{text} ({self.passed_over})" if self.passed_over else text


@dataclass(frozen=True)
class Decision:
    """The chosen node, and every candidate with its reason.

    Attributes:
        group: what was asked for.
        policy: by which rule.
        chosen: the node; None if nobody was eligible.
        candidates: all nodes of the group.
        panic: so few nodes were healthy that suspect, unreachable and ejected ones were used too.
    """

    group: str
    policy: str
    chosen: Backend | None
    candidates: tuple[Candidate, ...]
    panic: bool = False

    def __str__(self) -> str:
        chosen = self.chosen.node if self.chosen is not None else "nobody"
        kind = "Load-aware routing" if self.policy == "least-loaded" else f"Routing ({self.policy})"
        lines = [f"{kind} selected: {chosen} for team {self.group}"]
        if self.panic:
            lines.append("  too few are healthy: all that are not dead are used")
        lines += [f"  {candidate}" for candidate in self.candidates]
        return "\n".join(lines)


@dataclass(frozen=True)
class PastDecision:
    """One of the last decisions of a router, as it stands in the segment.

    Attributes:
        router, pid: whose; the name under which it takes part, and its process.
        number: counts the router's decisions in this segment, from 1.
        age_s: how long ago, seconds, to the resolution of the kernel's tick (1 to 4 ms).
        group: what was asked for; "?" if no node of the group is there any more.
        outcome: "lease", "saturated" (refused: all at capacity), "nobody" (refused: none eligible).
        node: who was taken; the node that is in that slot now.
        queue: that node's queue just before.
        candidates: nodes of the group that the router knew.
        waited_s: how long the caller had waited for capacity, to 4 %.
    """

    router: str
    pid: int
    number: int
    age_s: float
    group: str
    outcome: str
    node: str
    queue: int
    candidates: int
    waited_s: float

    def __str__(self) -> str:
        waited = f" after {self.waited_s * 1e3:.1f} ms" if self.waited_s else ""
        what = f"{self.node}, queue {self.queue}" if self.node else self.outcome.upper()
        return (
            f"{self.router} #{self.number}, {self.age_s:.2f} s ago: {self.group} -> {what}, "
            f"of {self.candidates}{waited}"
        )
