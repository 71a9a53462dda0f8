"""A router without shared memory: what a dispatcher sees of the real one, made scriptable."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from shmcoord.errors import LeaseReleased, NoBackend, Saturated


@dataclass
class FakeLease:
    router: FakeRouter
    node: str
    endpoint: str
    token: str
    backend: Any
    decision: Any = None
    released: bool = False
    adopted: bool = False

    def release(self) -> bool:
        if self.released:
            raise LeaseReleased(self.token)
        self.released = True
        self.router.held.remove(self.token)
        return not self.adopted


@dataclass
class FakeBudget:
    """As many retries as are left; counts what requests earned."""

    left: float = 1000.0
    earned: int = 0

    def earn(self) -> None:
        self.earned += 1

    def spend(self) -> bool:
        if self.left < 1:
            return False
        self.left -= 1
        return True


@dataclass
class FakeRouter:
    """Gives leases on the nodes in their order; those marked come last, like the real one's."""

    nodes: list[str]
    saturated: bool = False
    held: list[str] = field(default_factory=list)
    marked: list[str] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    leases: dict[str, FakeLease] = field(default_factory=dict)
    budget: FakeBudget = field(default_factory=lambda: FakeBudget())
    idle: bool = True

    def retry_budget(self) -> FakeBudget:
        return self.budget

    def acquire(
        self,
        group: str,
        timeout_s: float = 0.0,
        cost: int = 1,
        *,
        explain: bool = False,
        exclude: tuple[Any, ...] = (),
        idle_only: bool = False,
    ) -> FakeLease:
        self.waits.append(timeout_s)
        if self.saturated or (idle_only and not self.idle):
            raise Saturated(f"group {group}: all at capacity")
        nodes = [name for name in self.nodes if name not in {b.node for b in exclude}]
        if not nodes:
            raise NoBackend(f"group {group}: no node")
        node = min(nodes, key=lambda name: (name in self.marked, self.nodes.index(name)))
        token = f"token-{len(self.leases)}"
        self.held.append(token)
        lease = FakeLease(
            self,
            node,
            endpoint(node),
            token,
            SimpleNamespace(node=node, endpoint=endpoint(node), group=group),
            SimpleNamespace(chosen=node) if explain else None,
        )
        self.leases[token] = lease
        return lease

    async def acquire_async(
        self,
        group: str,
        timeout_s: float = 0.0,
        cost: int = 1,
        *,
        explain: bool = False,
        exclude: tuple[Any, ...] = (),
    ) -> FakeLease:
        return self.acquire(group, timeout_s, cost, explain=explain, exclude=exclude)

    def mark_unreachable(self, backend: Any, for_s: float = 1.0) -> None:
        self.marked.append(backend.node)


def endpoint(node: str) -> str:
    return f"local:{node}"
