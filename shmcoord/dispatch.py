"""Sending by load: a call acquires a lease, sends the request to its node, and releases.

Theory of operation. A lease is one reserved unit of a node's capacity. It is acquired before
anything is sent and given back on every way out: response, error, cancellation, abandonment.
When a node turns out to be unreachable, the request goes to another one, each node at most once
per call. The rule that is never bent: a request that may have been executed is not sent again.
Three things prove that it was not:

- the transport says that nothing was sent (`Unreachable`);
- the node refused the lease before it did anything (`LeaseLost`);
- nodes adopt their leases first (`adopts=True`), the connection broke (`ConnectionLost`), and
  we could free the lease ourselves: it had not been adopted, and now nobody can adopt it.

A method that is declared `idempotent` may be executed twice, so a broken connection leads elsewhere
always, and it may be hedged (`hedge_after_s`).

Every attempt behind the first spends from a budget that all routers of the segment share and that
requests earn (`RetryBudget`), so that retries cannot multiply an overload.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from shmcoord.course import (
    Attempt,
    Course,
    NoneReachable,
    OnDecision,
    send_rules,
    telling,
    telling_async,
)
from shmcoord.errors import LeaseLost, NoBackend, Saturated, ShmcoordError
from shmcoord.hedging import HedgePool, hedge_async
from shmcoord.transport import AsyncTransport, ConnectionLost, Transport, Unreachable

if TYPE_CHECKING:
    from shmcoord.budget import RetryBudget
    from shmcoord.lease import Lease
    from shmcoord.router import Router

__all__ = ["AsyncDispatcher", "Attempt", "Dispatcher", "NoneReachable", "ResponseStream"]


class Dispatcher:
    """Sends requests from the calling thread, each to the node that the router picks.

    It may be used by several threads at once if the transport may. It owns neither the router
    nor the transport: whoever made them closes them.
    """

    __slots__ = ("_acquire", "_hedges", "_rules", "_transport")

    def __init__(
        self,
        router: Router,
        transport: Transport,
        *,
        adopts: bool = False,
        on_decision: OnDecision | None = None,
        idempotent: Collection[str] = (),
        budget: RetryBudget | None = None,
        hedge_after_s: float | None = None,
    ) -> None:
        """Make a dispatcher.

        Args:
            router: Picks and reserves.
            transport: Carries the request to the endpoint of the picked node.
            adopts: Say True if every node adopts the lease before it does anything. Then a
                broken connection also leads to another node, if the lease had not been adopted.
            on_decision: Called with the decision and the lease before each sending, for logs.
                An error that it raises ends the call.
            idempotent: Methods that may be executed twice: these are sent elsewhere after any
                broken connection, and hedged.
            budget: Of retries and hedges; by default `router.retry_budget()`, which all routers
                of the segment share.
            hedge_after_s: Ask a second node, if one is idle, when the first has not answered an
                idempotent request for so many seconds; the first answer counts. Take a high
                percentile of the latency. None: never.
        """
        self._rules = send_rules(router, adopts, idempotent, budget, hedge_after_s)
        self._transport = transport
        self._acquire = telling(router.acquire, on_decision)
        self._hedges = HedgePool() if hedge_after_s is not None else None

    def call(
        self,
        group: str,
        method: str,
        request: Any,
        timeout_s: float | None = None,
        cost: int = 1,
    ) -> Any:
        """Send a request to the least loaded node of a group and return its response.

        Args:
            group: The nodes that can serve this request.
            method: What the node shall do, as the transport understands it.
            request: Passed to the transport.
            timeout_s: Budget of the whole call in seconds: waiting for capacity, connecting,
                all attempts. None: no limit for the node, and at most an hour's wait for
                capacity.
            cost: How many units of the node's capacity the request takes.

        Raises:
            NoBackend: Nobody is eligible; as `NoneReachable` after nodes were tried in vain.
            Saturated: All eligible nodes were at their capacity until the time-out.
            TimeoutError: The time-out passed; a transport may raise its own error for it.
            ConnectionLost: The connection broke after the request may have been executed.
            Exception: Whatever else the transport or the node raised.
        """
        course = Course(self._rules, group, method, timeout_s)
        while True:
            try:
                lease = self._acquire(group, course.wait_s(), cost, exclude=course.exclude)
            except (NoBackend, Saturated) as error:
                raise course.no_lease(error) from course.last_error()
            in_use = False
            try:
                if self._hedges is not None and self._rules.hedges(method):
                    assert self._rules.hedge_after_s is not None
                    response, in_use = self._hedges.call(
                        lease,
                        self._rules.hedge_after_s,
                        partial(course.acquire_idle, cost),
                        partial(self._send, course, method, request),
                    )
                else:
                    response = self._send(course, method, request, lease)
            except BaseException as error:
                if not course.leave(lease, error):
                    raise
            else:
                if not in_use:
                    lease.release()
                return response

    def _send(self, course: Course, method: str, request: Any, lease: Lease) -> Any:
        return self._transport.send(
            lease.endpoint, method, request, lease=lease.token, timeout_s=course.left_s()
        )


class AsyncDispatcher:
    """Sends requests on an event loop, each to the node that the router picks.

    It may be used by many tasks of one loop. It owns neither the router nor the transport.
    """

    __slots__ = ("_acquire_async", "_rules", "_transport")

    def __init__(
        self,
        router: Router,
        transport: AsyncTransport,
        *,
        adopts: bool = False,
        on_decision: OnDecision | None = None,
        idempotent: Collection[str] = (),
        budget: RetryBudget | None = None,
        hedge_after_s: float | None = None,
    ) -> None:
        """Make a dispatcher; arguments as those of `Dispatcher`."""
        self._rules = send_rules(router, adopts, idempotent, budget, hedge_after_s)
        self._transport = transport
        self._acquire_async = telling_async(router.acquire_async, on_decision)

    async def call(
        self,
        group: str,
        method: str,
        request: Any,
        timeout_s: float | None = None,
        cost: int = 1,
    ) -> Any:
        """Send a request and return its response; arguments and errors as `Dispatcher.call`.

        Cancelling it stops the sending, releases the lease and lets the cancellation through.
        """
        course = Course(self._rules, group, method, timeout_s)
        while True:
            lease = await self._acquire(course, group, cost)
            try:
                if self._rules.hedges(method):
                    assert self._rules.hedge_after_s is not None
                    response = await hedge_async(
                        lease,
                        self._rules.hedge_after_s,
                        partial(course.acquire_idle, cost),
                        partial(self._send, course, method, request),
                    )
                else:
                    response = await self._send(course, method, request, lease)
            except BaseException as error:
                if not course.leave(lease, error):
                    raise
            else:
                lease.release()
                return response

    async def _send(self, course: Course, method: str, request: Any, lease: Lease) -> Any:
        return await self._transport.send(
            lease.endpoint, method, request, lease=lease.token, timeout_s=course.left_s()
        )

    def stream(
        self,
        group: str,
        method: str,
        request: Any,
        timeout_s: float | None = None,
        cost: int = 1,
    ) -> ResponseStream:
        """Send a request and return its responses as they come.

        Nothing happens before the first response is asked for; the budget of `timeout_s`
        seconds runs from then on and covers the whole stream. Another node is tried only before
        the first response. Other arguments and errors as `Dispatcher.call`, raised by the
        iteration.
        """
        return ResponseStream(self, group, method, request, timeout_s, cost)

    async def _acquire(self, course: Course, group: str, cost: int) -> Lease:
        try:
            return await self._acquire_async(group, course.wait_s(), cost, exclude=course.exclude)
        except (NoBackend, Saturated) as error:
            raise course.no_lease(error) from course.last_error()


class ResponseStream(AsyncIterator[Any]):
    """The responses to one request, in the order in which the node sends them.

    The lease is held until the stream ends, fails, is cancelled or closed, or is
    garbage-collected; leaving an `async for` early is enough, `async with` or `aclose()` makes
    it exact.
    """

    __slots__ = (
        "_args",
        "_dispatcher",
        "_ended",
        "_lease",
        "_reading",
        "_responses",
    )

    def __init__(
        self,
        dispatcher: AsyncDispatcher,
        group: str,
        method: str,
        request: Any,
        timeout_s: float | None,
        cost: int,
    ) -> None:
        self._lease: Lease | None = None
        self._dispatcher = dispatcher
        self._args = (group, method, request, timeout_s, cost)
        self._responses: AsyncIterator[Any] | None = None
        self._ended = False
        self._reading = False

    @property
    def node(self) -> str | None:
        """Name of the node that answers, None before the first response and after the end."""
        return None if self._lease is None else self._lease.node

    async def __anext__(self) -> Any:
        if self._ended:
            raise StopAsyncIteration
        if self._reading:
            raise RuntimeError("two tasks read from the same stream at the same time")
        self._reading = True
        try:
            if self._responses is None:
                return await self._first()
            return await self._responses.__anext__()
        except BaseException as error:
            await self._end(given_up=not isinstance(error, StopAsyncIteration))
            raise
        finally:
            self._reading = False

    async def aclose(self) -> None:
        """End the stream: stop the node's work and release the lease. May be repeated."""
        if self._reading:
            raise RuntimeError("a stream cannot be closed while another task reads from it")
        await self._end(given_up=True)

    async def __aenter__(self) -> ResponseStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            with suppress(ShmcoordError):  # in the child of a fork it is the parent's lease
                lease.release()

    async def _first(self) -> Any:
        """Find a node that answers and return its first response."""
        group, method, request, timeout_s, cost = self._args
        dispatcher = self._dispatcher
        course = Course(dispatcher._rules, group, method, timeout_s)
        while True:
            lease = self._lease = await dispatcher._acquire(course, group, cost)
            try:
                self._responses = dispatcher._transport.stream(
                    lease.endpoint,
                    method,
                    request,
                    lease=lease.token,
                    timeout_s=course.left_s(),
                )
                return await self._responses.__anext__()
            except (Unreachable, LeaseLost, ConnectionLost) as error:
                self._lease = self._responses = None
                if not course.leave(lease, error):
                    raise

    async def _end(self, *, given_up: bool) -> None:
        """Stop what the transport has under way, then give the lease back."""
        self._ended = True
        responses, self._responses = self._responses, None
        lease, self._lease = self._lease, None
        try:
            aclose = getattr(responses, "aclose", None)
            if given_up and aclose is not None:
                # What closing has to say is of no use to a caller who has gone, or who is just
                # being told of the failure itself.
                with suppress(Exception):
                    await aclose()
        finally:
            if lease is not None:
                lease.release()
