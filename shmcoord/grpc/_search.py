"""One call's search for a node: waiting for capacity, for any node, going elsewhere."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from shmcoord.course import Course, NoneReachable
from shmcoord.errors import NoBackend, Saturated
from shmcoord.grpc._ask import Ask
from shmcoord.grpc._core import ChannelClosed, Core
from shmcoord.transport import Unreachable
from shmcoord.transport._grpc_links import Link

if TYPE_CHECKING:
    from shmcoord.lease import Lease

__all__ = ["Search"]

# How often somebody who waits for any node looks whether one has come, in seconds.
_LOOK_EVERY_S = 0.04
# After this long he tries those again that did not accept the connection, in seconds.
_TRY_AGAIN_S = 1.0


class Search:
    """Made at the first thing that goes otherwise than planned; what is straight needs none."""

    __slots__ = ("_again_at", "_ask", "_core", "_course", "_wait_ends", "_waits")

    def __init__(
        self,
        core: Core,
        method: str,
        ask: Ask,
        began: float,
        timeout_s: float | None,
        wait_for_ready: bool | None,
    ) -> None:
        """Begin.

        Args:
            core: The channel's.
            method: Full name.
            ask: What the router is asked for.
            began: When the call began, monotonic seconds.
            timeout_s: The call's time from then on, seconds.
            wait_for_ready: As the caller gave it.
        """
        now = time.monotonic()
        self._core = core
        self._ask = ask
        self._waits = bool(wait_for_ready)
        self._wait_ends = None if timeout_s is not None else began + core.max_wait_s
        if timeout_s is not None:
            timeout_s += began - now
        self._course = Course(core.rules, core.group, method, timeout_s)
        self._again_at = now + _TRY_AGAIN_S

    def acquire(self) -> Lease:
        """Return a lease, waiting on this thread.

        Raises:
            NoBackend, Saturated, TimeoutError: There is none.
            ChannelClosed: Meanwhile.
        """
        core, ask = self._core, self._ask
        while True:
            try:
                return core.acquire(
                    core.group,
                    self._wait_s(),
                    ask.cost,
                    key=ask.key,
                    exclude=self._course.exclude,
                )
            except (NoBackend, Saturated) as error:
                time.sleep(self.pause_s(error))
            except ValueError:
                self._check()
                raise

    async def acquire_async(self) -> Lease:
        """Return a lease, waiting on the event loop; errors as `acquire`."""
        core, ask = self._core, self._ask
        while True:
            try:
                return await core.acquire_async(
                    core.group,
                    self._wait_s(),
                    ask.cost,
                    key=ask.key,
                    exclude=self._course.exclude,
                )
            except (NoBackend, Saturated) as error:
                await asyncio.sleep(self.pause_s(error))
            except ValueError:
                self._check()
                raise

    def pause_s(self, error: NoBackend | Saturated) -> float:
        """Return how long to wait before the next try, in seconds, if the caller waits.

        Raises:
            NoBackend, Saturated: He does not.
            TimeoutError: His time is over.
        """
        self._check()
        if not self._waits or isinstance(error, Saturated):
            raise self._course.no_lease(error) from self._course.last_error()
        now = time.monotonic()
        if self._wait_ends is not None and now >= self._wait_ends:
            raise self._course.no_lease(error) from self._course.last_error()
        if now >= self._again_at:
            self._again_at = now + _TRY_AGAIN_S
            # Nothing was sent to any of them.
            self._course.exclude = ()
        left_s = self._course.left_s()
        if left_s is None:
            assert self._wait_ends is not None
            left_s = self._wait_ends - now
        return min(left_s, _LOOK_EVERY_S)

    def connect_s(self) -> float:
        """Return how long to wait for a connection, in seconds."""
        left_s = self._course.left_s()
        longest_s = self._core.connect_timeout_s
        return longest_s if left_s is None else min(left_s, longest_s)

    def left_s(self) -> float | None:
        """Return what is left of the call's time; as `Course.left_s`."""
        return self._course.left_s()

    def not_connected(self, link: Link) -> Exception:
        """Return why there is no connection."""
        if self._core.closed:
            return ChannelClosed()
        if link.spent:
            return Unreachable(f"{link.endpoint} does not accept the connection")
        try:
            self._course.left_s()
        except TimeoutError as error:
            return error
        longest_s = self._core.connect_timeout_s
        return Unreachable(f"no connection to {link.endpoint} within {longest_s:g} s")

    def leave(self, lease: Lease, error: BaseException, adopts: bool, proves: bool = True) -> bool:
        """Give a lease back after a failure; tell whether to go elsewhere, as `Course.leave`.

        Who waits for any node does so also when the budget of retries is spent, as long as nothing
        was sent: connecting is no load. Once something was, he waits no longer for a node to come:
        each one is asked once.
        """
        if not isinstance(error, Unreachable):
            self._waits = False
        try:
            return self._course.leave(lease, error, adopts, proves=proves)
        except NoneReachable:
            if self._waits:
                return True
            raise

    def _wait_s(self) -> float:
        self._check()
        wait_s = self._course.wait_s()
        if self._wait_ends is None:
            return wait_s
        return max(0.0, self._wait_ends - time.monotonic())

    def _check(self) -> None:
        if self._core.closed:
            raise ChannelClosed
