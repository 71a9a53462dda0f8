"""Answering a client that may be gone, or may not read."""

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator
from typing import Any, Generic, NoReturn, TypeVar

import grpc
import grpc.aio

T = TypeVar("T")

# The longest that any request may take, in seconds, whatever its client says.
LONGEST_S = 600.0


@contextlib.contextmanager
def absence_cancels() -> Iterator[None]:
    """Around what is sent to a client: its absence is a cancellation, and nothing else.

    gRPC cancels the handler of a client that has gone, but what is just being sent (a response,
    or a status by `abort`) may fail before that.

    Raises:
        asyncio.CancelledError: the client has gone.
    """
    try:
        yield
    except grpc.aio.InternalError as error:
        raise asyncio.CancelledError("the client has gone") from error


class Refusal(Exception):
    """A request ends with this status; whoever serves it says so to the client.

    It is told last, when nothing is held any more: a client that does not read keeps even a
    status waiting.
    """

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(f"{code.name}: {details}")
        self.code = code
        self.details = details


def time_limit_s(context: grpc.aio.ServicerContext[Any, Any], default_s: float) -> float:
    """How long a request may take in seconds: what its client says, but not for ever."""
    remaining: float | None = context.time_remaining()
    if remaining is None or remaining == float("inf"):
        return default_s
    return min(remaining, LONGEST_S)


async def in_time(work: Coroutine[Any, Any, None], limit_s: float) -> None:
    """Does the work of a request, at most for `limit_s` seconds.

    A client that does not read would otherwise hold a request, and its lease, for ever.

    Args:
        work: the handler's coroutine.
        limit_s: seconds.

    Raises:
        Refusal: DEADLINE_EXCEEDED.
    """
    task = asyncio.ensure_future(work)
    task.add_done_callback(_looked_at)
    try:
        done, _ = await asyncio.wait([task], timeout=limit_s)
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait([task])
    if not done:
        raise Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, f"not done after {limit_s:g} s")
    task.result()


class Writer(Generic[T]):
    """Sends a request's responses, and the status of a refusal behind them.

    A write may be left behind by a cancellation while the client does not read. gRPC never sends
    a status that is given to it before that write has ended, even to a client that reads again.
    """

    def __init__(self, context: grpc.aio.ServicerContext[Any, T]) -> None:
        self._context = context
        self._writing: asyncio.Future[None] | None = None

    async def write(self, response: T) -> None:
        """Sends one response."""
        writing = asyncio.ensure_future(self._context.write(response))
        writing.add_done_callback(_looked_at)
        self._writing = writing
        await asyncio.shield(writing)

    async def refuse(self, refusal: Refusal) -> NoReturn:
        """Ends the request with the refusal's status, once the client has read what came before."""
        if self._writing is not None and not self._writing.done():
            await asyncio.wait([self._writing])
        await self._context.abort(refusal.code, refusal.details)


def _looked_at(work: "asyncio.Future[None]") -> None:
    """Its error is nobody's concern if nobody waits for it any more."""
    if not work.cancelled():
        work.exception()
