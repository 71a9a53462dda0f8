"""What a router would do, or did, and why: for logs, tests and people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shmcoord.backend import Backend
    from shmcoord.status import Health, State

__all__ = ["Candidate", "Decision"]


@dataclass(frozen=True)
class Candidate:
    """One node of the group at the moment of a decision.

    Attributes:
        node, group, endpoint, segment: which node, and where.
        state, health: as in `Status`.
        queue: waiting + in flight.
        capacity, weight: as joined.
        score: queue relative to weight; lower is better.
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
    passed_over: str

    def __str__(self) -> str:
        text = f"{self.node} - State: {self.state.name}, Queue: {self.queue}, "
        text += f"Score: {self.score:.2f}"
        if self.health:  # ALIVE is what one expects
            text += f", Health: {self.health.name}"
        return f"{text} ({self.passed_over})" if self.passed_over else text


@dataclass(frozen=True)
class Decision:
    """The chosen node, and every candidate with its reason."""

    group: str
    policy: str
    chosen: Backend | None
    candidates: tuple[Candidate, ...]

    def __str__(self) -> str:
        chosen = self.chosen.node if self.chosen is not None else "nobody"
        kind = "Load-aware routing" if self.policy == "least-loaded" else f"Routing ({self.policy})"
        lines = [f"{kind} selected: {chosen} for team {self.group}"]
        lines += [f"  {candidate}" for candidate in self.candidates]
        return "\n".join(lines)
