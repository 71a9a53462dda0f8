"""The error of a call for which there was no node."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import grpc

from shmcoord.errors import ShmcoordError
from shmcoord.grpc._bases import CallFuture
from shmcoord.grpc._core import ChannelClosed, Core
from shmcoord.grpc._refusal import Refusal, refusal

__all__ = ["Refused", "outcome", "refused"]


class Refused(grpc.RpcError, CallFuture):
    """A call that ended before it was sent: an error, a finished call and a finished future.

    Its cause is the error of the routing side, if there was one.
    """

    def __init__(self, outcome: Refusal) -> None:
        super().__init__(outcome.details)
        self._outcome = outcome

    def code(self) -> grpc.StatusCode:
        """Return the status code."""
        return self._outcome.code

    def details(self) -> str:
        """Return the message."""
        return self._outcome.details

    def initial_metadata(self) -> tuple[Any, ...]:
        """Return nothing: no node was asked."""
        return ()

    def trailing_metadata(self) -> tuple[Any, ...]:
        """Return what says more of the reasons."""
        return self._outcome.trailing

    def debug_error_string(self) -> str:
        """Return the message, as gRPC's errors do."""
        return self._outcome.details

    def __str__(self) -> str:
        code, details, _ = self._outcome
        return f'<{type(self).__name__}:\n\tstatus = {code}\n\tdetails = "{details}"\n>'

    __repr__ = __str__

    def is_active(self) -> bool:
        """Return False: it is over."""
        return False

    def time_remaining(self) -> float:
        """Return 0.0: it is over."""
        return 0.0

    def cancel(self) -> bool:
        """Return False: it is over."""
        return False

    def cancelled(self) -> bool:
        """Return False: nobody cancelled it."""
        return False

    def running(self) -> bool:
        """Return False: it is over."""
        return False

    def done(self) -> bool:
        """Return True: it is over."""
        return True

    def add_callback(self, callback: Callable[[], None]) -> bool:
        """Return False: it is over, and the callback will not be called."""
        return False

    def add_done_callback(self, fn: Callable[[Any], None]) -> None:
        """Call the function now."""
        fn(self)

    def result(self, timeout: float | None = None) -> Any:
        """Raise this error."""
        raise self

    def exception(self, timeout: float | None = None) -> Exception:
        """Return this error."""
        return self

    def traceback(self, timeout: float | None = None) -> TracebackType | None:
        """Return where this error was raised."""
        return self.__traceback__


def outcome(error: ShmcoordError | TimeoutError, core: Core) -> Refusal:
    """Return the status for an error of the routing side."""
    if isinstance(error, ChannelClosed):
        return Refusal(grpc.StatusCode.CANCELLED, str(error))
    return refusal(error, core.router, core.group)


def refused(error: ShmcoordError | TimeoutError, core: Core) -> Refused:
    """Return what to raise for an error of the routing side; raise it `from error`."""
    return Refused(outcome(error, core))
