"""What all calls of one aio channel share: the router, the links, the loop, the limits."""

from __future__ import annotations

import asyncio
import warnings
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from shmcoord.course import telling, telling_async

if TYPE_CHECKING:
    from shmcoord.course import OnDecision, SendRules
    from shmcoord.grpc._aio_base import RoutedCall
    from shmcoord.grpc._once import Legs
    from shmcoord.router import Router
    from shmcoord.transport._grpc_aio_links import AioLinks

__all__ = ["Routes"]


class Routes:
    """Where the calls of one channel go.

    Attributes:
        router: Picks and reserves.
        group: Of which nodes.
        acquire: `router.acquire_async`, which tells its decision if somebody wants to hear it.
        try_acquire: The same of `router.try_acquire`, for who finds a node free.
        earn: Counts a call for the retry budget.
        rules: For the `Course` of a call, which is made when one is needed: after
            `earn`.
        links: To the nodes.
        legs: Where interceptors may send other than they were told.
        max_wait_s: How long a call without a deadline waits for capacity, in seconds.
        connect_timeout_s: How long a call waits for one connection, in seconds.
        waiting: The calls that have no node at the moment.
        active: How many calls have not ended.
        bound: The loop, once the channel was used.
        idle_event: Of who waits until none is active.
    """

    __slots__ = (
        *("acquire", "active", "bound", "closed", "connect_timeout_s", "earn", "group"),
        *("idle_event", "legs", "links", "max_wait_s", "router", "rules", "try_acquire"),
        "waiting",
    )

    def __init__(
        self,
        router: Router,
        group: str,
        rules: SendRules,
        links: AioLinks[grpc.aio.Channel],
        max_wait_s: float,
        connect_timeout_s: float,
        on_decision: OnDecision | None,
        legs: Legs | None = None,
    ) -> None:
        self.router = router
        self.legs = legs
        self.acquire = telling_async(router.acquire_async, on_decision)
        self.try_acquire = telling(router.try_acquire, on_decision)
        self.earn = rules.budget.earn
        self.group = group
        self.rules = rules
        self.links = links
        self.max_wait_s = max_wait_s
        self.connect_timeout_s = connect_timeout_s
        self.closed = False
        self.waiting: set[RoutedCall] = set()
        self.active = 0
        self.bound: asyncio.AbstractEventLoop | None = None
        self.idle_event: asyncio.Event | None = None

    def enter(self) -> bool:
        """Bind the channel to its loop at the first use; whether that loop runs.

        Raises:
            RuntimeError: It belongs to another loop.
            grpc.aio.UsageError: It was closed.
        """
        if self.closed:
            self.check_open()
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            return self._enter_outside()
        if running is not self.bound:
            if self.bound is not None:
                raise RuntimeError(
                    "the channel belongs to another event loop; make one channel per loop"
                )
            self.bound = running
        return True

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop of the channel, once it was used."""
        assert self.bound is not None
        return self.bound

    def _enter_outside(self) -> bool:
        if self.bound is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                self.bound = asyncio.get_event_loop_policy().get_event_loop()
        if self.bound.is_running():  # in another thread
            raise RuntimeError(
                "the channel belongs to an event loop that runs in another thread; make one "
                "channel per loop, or use asyncio.run_coroutine_threadsafe"
            )
        return False

    def check_open(self) -> None:
        """Refuse to work after `close`, in the words of grpcio.

        Raises:
            grpc.aio.UsageError: The channel was closed.
        """
        if self.closed:
            raise grpc.aio.UsageError("Channel is closed.")

    def has_ended(self) -> None:
        """Count a call out that could not begin."""
        self.active -= 1
        if self.idle_event is not None:
            self.check_idle()

    def check_idle(self) -> None:
        """Tell who waits for it if no call is active."""
        if not self.active and self.idle_event is not None:
            self.idle_event.set()

    async def idle(self, timeout_s: float) -> None:
        """Wait at most so many seconds until no call is active."""
        if self.active:
            self.idle_event = asyncio.Event()
            waiter = asyncio.ensure_future(self.idle_event.wait())
            await asyncio.wait((waiter,), timeout=timeout_s)
            waiter.cancel()
