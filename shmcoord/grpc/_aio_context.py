"""The servicer context that handlers of an event loop get: it adds to the trailing metadata.

`abort` of `grpc.aio` sends the status at once, so what the node adds must be put in there; the end
of a handler that returns is the other place.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grpc
import grpc.aio

from shmcoord.grpc._faults import is_fault
from shmcoord.grpc._membership import Membership, foreign
from shmcoord.grpc._refusal import Refusal

__all__ = ["AioContext", "PlainContext"]


class _Context:
    """What both kinds share: all but the end of a call goes to grpcio's own context."""

    __slots__ = ("_context", "_membership", "_theirs", "code_set")

    def __init__(self, context: Any, membership: Membership) -> None:
        self._context = context
        self._membership = membership
        self._theirs: tuple[Any, ...] = ()
        self.code_set: Any = None  # the status that the handler has set, by whichever method

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def set_trailing_metadata(self, trailing_metadata: Iterable[Any]) -> None:
        theirs = foreign(trailing_metadata)
        self._context.set_trailing_metadata(theirs)
        self._theirs = theirs

    def trailing_metadata(self) -> tuple[Any, ...]:
        return self._theirs

    def set_code(self, code: Any) -> None:
        self._context.set_code(code)
        self.code_set = code

    def add_own(self) -> None:
        """Put what the node adds behind the handler's trailing metadata."""
        self._context.set_trailing_metadata(self._membership.merged(self._theirs))

    def failed(self, error: BaseException | None = None) -> bool:
        """Whether the call, which has ended so, is the server's fault."""
        if self.is_late():
            return True  # the client was told DEADLINE_EXCEEDED
        if self.code_set is not None:
            return is_fault(self.code_set)
        # Without a status an exception is UNKNOWN; but grpc.aio's own one for what was sent to
        # a client that is gone.
        return error is not None and not isinstance(error, grpc.aio.InternalError)

    def is_late(self) -> bool:
        """Whether the deadline has passed."""
        left_s = self._context.time_remaining()
        return left_s is not None and left_s <= 0.0

    def _refused(self, refusal: Refusal) -> tuple[Any, ...]:
        """A refusal of ours, as arguments of `abort`."""
        self.code_set = refusal.code
        return (refusal.code, refusal.details, (*refusal.trailing, *self._membership.trailing()))

    def _merged(self, trailing_metadata: Iterable[Any]) -> tuple[Any, ...]:
        return self._membership.merged(tuple(trailing_metadata) or self._theirs)


class AioContext(_Context):
    """For coroutines and async generators."""

    __slots__ = ()

    async def abort(
        self, code: Any, details: str = "", trailing_metadata: Iterable[Any] = ()
    ) -> None:
        """As `grpc.aio.ServicerContext.abort`."""
        self.code_set = code
        await self._context.abort(code, details, self._merged(trailing_metadata))

    async def send_initial_metadata(self, initial_metadata: Iterable[Any] | None) -> None:
        """As `grpc.aio.ServicerContext.send_initial_metadata`."""
        await self._context.send_initial_metadata(foreign(initial_metadata or ()))

    async def refuse(self, refusal: Refusal) -> None:
        """End the call before anything of it was done."""
        await self._context.abort(*self._refused(refusal))

    async def abort_with_status(self, status: grpc.Status) -> None:
        """As `grpc.aio.ServicerContext.abort_with_status`."""
        await self.abort(status.code, status.details, status.trailing_metadata or ())


class PlainContext(_Context):
    """For plain functions and generators, which grpc.aio runs in a pool of threads."""

    __slots__ = ()

    def abort(self, code: Any, details: str = "", trailing_metadata: Iterable[Any] = ()) -> None:
        """As `grpc.ServicerContext.abort`."""
        self.code_set = code
        self._context.abort(code, details, self._merged(trailing_metadata))

    def send_initial_metadata(self, initial_metadata: Iterable[Any] | None) -> None:
        """As `grpc.ServicerContext.send_initial_metadata`."""
        self._context.send_initial_metadata(foreign(initial_metadata or ()))

    def refuse(self, refusal: Refusal) -> None:
        """End the call before anything of it was done."""
        self._context.abort(*self._refused(refusal))

    def abort_with_status(self, status: grpc.Status) -> None:
        """As `grpc.ServicerContext.abort_with_status`."""
        self.abort(status.code, status.details, status.trailing_metadata or ())


# So that they pass where a handler asks.
grpc.aio.ServicerContext.register(AioContext)
grpc.ServicerContext.register(PlainContext)
