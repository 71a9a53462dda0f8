"""What one call has tried, how much time is left to it, and where it may go now.

Shared by everything that sends by load: the dispatchers, the gRPC channels, the HTTP transports.
The rules that it applies are told in `shmcoord.dispatch`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Coroutine
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from shmcoord.errors import LeaseLost, NoBackend, Saturated
from shmcoord.transport import ConnectionLost, Unreachable

if TYPE_CHECKING:
    from shmcoord.backend import Backend
    from shmcoord.budget import RetryBudget
    from shmcoord.decision import Decision
    from shmcoord.lease import Lease
    from shmcoord.router import Router

__all__ = [
    "Attempt",
    "Course",
    "NoneReachable",
    "OnDecision",
    "SendRules",
    "send_rules",
    "telling",
    "telling_async",
]

# How long a call without a time-out waits for capacity, in seconds.
_LONGEST_WAIT_S = 3600.0

L = TypeVar("L", bound="Lease | None")
OnDecision = Callable[["Decision", "Lease"], None]
"""Is told what a router decided, and the lease, before each sending."""


class SendRules(NamedTuple):
    """What the sender was told once; see `shmcoord.Dispatcher`."""

    router: Router
    adopts: bool
    idempotent: Collection[str]
    budget: RetryBudget
    hedge_after_s: float | None

    def hedges(self, method: str) -> bool:
        """Whether a method may be asked of a second node."""
        return self.hedge_after_s is not None and method in self.idempotent


def send_rules(
    router: Router,
    adopts: bool,
    idempotent: Collection[str],
    budget: RetryBudget | None,
    hedge_after_s: float | None,
) -> SendRules:
    """Check what a sender was told; by default the budget is the router's."""
    if isinstance(idempotent, str):
        raise TypeError("idempotent must be several methods, not one str")
    if hedge_after_s is not None and not hedge_after_s >= 0:
        raise ValueError(f"hedge_after_s must not be negative, not {hedge_after_s}")
    if budget is None:
        budget = router.retry_budget()
    return SendRules(router, adopts, frozenset(idempotent), budget, hedge_after_s)


def telling(acquire: Callable[..., L], on_decision: OnDecision | None) -> Callable[..., L]:
    """Return a `Router.acquire` or `try_acquire` that tells each decision, if somebody listens."""
    if on_decision is None:
        return acquire

    def acquire_and_tell(*args: Any, **options: Any) -> L:
        return _told(acquire(*args, explain=True, **options), on_decision)

    return acquire_and_tell


def telling_async(
    acquire: Callable[..., Coroutine[Any, Any, Lease]], on_decision: OnDecision | None
) -> Callable[..., Coroutine[Any, Any, Lease]]:
    """Return a `Router.acquire_async` that tells each decision, if somebody wants to hear it."""
    if on_decision is None:
        return acquire

    async def acquire_and_tell(*args: Any, **options: Any) -> Lease:
        return _told(await acquire(*args, explain=True, **options), on_decision)

    return acquire_and_tell


def _told(lease: L, on_decision: OnDecision) -> L:
    if lease is not None and lease.decision is not None:
        try:
            on_decision(lease.decision, lease)
        except BaseException:
            lease.release()
            raise
    return lease


class Attempt(NamedTuple):
    """One node that a call tried in vain, and why it went elsewhere."""

    node: str
    endpoint: str
    error: Exception


class NoneReachable(NoBackend):
    """Every node that the router offered was tried, and none of them executed the request.

    Attributes:
        tried: The nodes in the order in which they were tried, each with its error.
    """

    def __init__(self, message: str, tried: tuple[Attempt, ...] = ()) -> None:
        super().__init__(message)
        self.tried = tried


class Course:
    """What one call has tried so far, how much time it has left, and where it may go now."""

    __slots__ = ("_ends", "_group", "_may_repeat", "_rules", "_tried", "exclude")

    def __init__(
        self,
        rules: SendRules,
        group: str,
        method: str,
        timeout_s: float | None,
        *,
        earned: bool = False,
    ) -> None:
        """Begin; `earned`: the call was counted for the retry budget before."""
        if timeout_s is not None and math.isnan(timeout_s):
            raise ValueError("timeout_s is not a number")
        self._ends = None if timeout_s is None else time.monotonic() + timeout_s
        self._rules = rules
        self._group = group
        self._may_repeat = method in rules.idempotent
        if not earned:
            rules.budget.earn()
        self._tried: list[Attempt] = []
        self.exclude: tuple[Backend, ...] = ()  # each node at most once per call

    def left_s(self) -> float | None:
        """Return the rest of the budget in seconds, None without one.

        Raises:
            TimeoutError: Nothing is left.
        """
        if self._ends is None:
            return None
        left_s = self._ends - time.monotonic()
        if left_s > 0.0:
            return left_s
        text = f"the time-out passed before a node of group {self._group} was sent the request"
        raise TimeoutError(text + self._tried_text())

    def wait_s(self) -> float:
        """Return how long the next `acquire` may wait for capacity, in seconds."""
        left_s = self.left_s()
        return _LONGEST_WAIT_S if left_s is None else min(left_s, _LONGEST_WAIT_S)

    def no_lease(self, error: NoBackend | Saturated) -> NoBackend | Saturated:
        """Return what the caller shall see when the router gave no lease."""
        if not self._tried:
            return error
        text = f"{error}{self._tried_text()}"
        if isinstance(error, Saturated):
            return Saturated(text, error.retry_after_s)
        return NoneReachable(text, tuple(self._tried))

    def last_error(self) -> Exception | None:
        """Why the last node was tried in vain."""
        return self._tried[-1].error if self._tried else None

    def leave(
        self, lease: Lease, error: BaseException, adopts: bool = False, *, proves: bool = True
    ) -> bool:
        """Give the lease back after a failure; tell if the request may be sent elsewhere.

        Args:
            lease: Of the node where it failed.
            error: How it failed.
            adopts: Whether this node is known to adopt leases, even if not all are.
            proves: False if the request may have gone out without the lease as well: then what
                became of the lease tells nothing, whatever the node does.

        Raises:
            NoneReachable: It might, but the retry budget is spent.
        """
        ours = lease.release()
        if not isinstance(error, (Unreachable, LeaseLost, ConnectionLost)):
            return False
        if not (isinstance(error, Unreachable) or self._may_repeat):
            if not proves:
                return False
            if isinstance(error, ConnectionLost) and not ((adopts or self._rules.adopts) and ours):
                return False
        self._rules.router.mark_unreachable(lease.backend)  # for other calls
        self.exclude = (*self.exclude, lease.backend)
        # Without its traceback, which would tie this record, the request and the frames
        # together in a cycle.
        self._tried.append(Attempt(lease.node, lease.endpoint, error.with_traceback(None)))
        if not self._rules.budget.spend():
            text = f"the retry budget that the host's routers share is spent{self._tried_text()}"
            raise NoneReachable(text, tuple(self._tried)) from error
        return True

    def acquire_idle(self, cost: int, others: tuple[Backend, ...]) -> Lease | None:
        """Return a lease for a hedge, on an idle node; None if the budget is spent."""
        lease = self._rules.router.acquire(
            self._group, 0.0, cost, exclude=(*self.exclude, *others), idle_only=True
        )
        if self._rules.budget.spend():
            return lease
        lease.release()
        return None

    def _tried_text(self) -> str:
        if not self._tried:
            return ""
        return "; tried: " + ", ".join(f"{a.node} at {a.endpoint} ({a.error})" for a in self._tried)
