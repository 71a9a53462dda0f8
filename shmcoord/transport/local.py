"""Transports inside one process: a node is a table of plain callables.

For embedding (nodes that are threads or tasks of the same process) and for tests. They behave
as a network would: an endpoint without handlers is unreachable, a late answer is a
`TimeoutError`, and what a handler raises reaches the caller. A handler takes the request; one
that has a parameter called `lease` also gets the lease token, to adopt it:

    def search(request, lease):
        with node.adopt(lease):
            return rows(request)

    transport = LocalTransport({"local:B": {"search": search}})
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from types import TracebackType
from typing import Any

from shmcoord.transport import Unreachable

__all__ = ["AsyncLocalTransport", "Handler", "Handlers", "LocalTransport"]

Handler = Callable[..., Any]
Handlers = Mapping[str, Mapping[str, Handler]]


class _Table:
    """Endpoint and method name to handler; the mapping stays the user's and may change."""

    def __init__(self, handlers: Handlers) -> None:
        self._handlers = handlers
        self._asks: dict[tuple[str, str], tuple[Handler, bool]] = {}
        self._closed = False

    def _bound(self, endpoint: str, method: str, request: Any, lease: str) -> Callable[[], Any]:
        """Return the handler with its arguments.

        Raises:
            Unreachable: Nobody is at that endpoint.
            RuntimeError: The transport is closed.
            ValueError: The node has no such method.
        """
        if self._closed:
            raise RuntimeError("the transport is closed")
        methods = self._handlers.get(endpoint)
        if methods is None:
            raise Unreachable(f"no handlers at endpoint {endpoint!r}")
        handler = methods.get(method)
        if handler is None:
            known = ", ".join(sorted(methods)) or "none"
            raise ValueError(f"no method {method!r} at endpoint {endpoint!r}; it has: {known}")
        known_handler, takes_lease = self._asks.get((endpoint, method), (None, False))
        if known_handler is not handler:
            takes_lease = _takes_lease(handler)
            self._asks[endpoint, method] = (handler, takes_lease)
        if takes_lease:
            return lambda: handler(request, lease=lease)
        return lambda: handler(request)


class LocalTransport(_Table):
    """Calls handlers in the calling thread.

    A plain callable cannot be interrupted: one that takes longer than the time-out runs to its
    end, and the caller gets the `TimeoutError` then.
    """

    def __init__(self, handlers: Handlers) -> None:
        """Make a transport from `{endpoint: {method: callable}}`."""
        super().__init__(handlers)

    def send(
        self, endpoint: str, method: str, request: Any, *, lease: str, timeout_s: float | None
    ) -> Any:
        """Call the handler and return its result; see `shmcoord.transport.Transport.send`."""
        call = self._bound(endpoint, method, request, lease)
        if timeout_s is None:
            return call()
        ends = time.monotonic() + timeout_s
        response = call()
        if time.monotonic() > ends:
            raise _late(method, endpoint)
        return response

    def close(self) -> None:
        """Refuse all later calls."""
        self._closed = True

    def __enter__(self) -> LocalTransport:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class AsyncLocalTransport(_Table):
    """Awaits handlers on the running event loop.

    For `send` a handler is an `async def`, or a plain callable that is quick. For `stream` it
    is an `async def` with `yield`, or a plain callable that returns an iterable.
    """

    def __init__(self, handlers: Handlers) -> None:
        """Make a transport from `{endpoint: {method: callable}}`."""
        super().__init__(handlers)

    async def send(
        self, endpoint: str, method: str, request: Any, *, lease: str, timeout_s: float | None
    ) -> Any:
        """Await the handler and return its result; see `shmcoord.transport.Transport.send`."""
        ends = None if timeout_s is None else time.monotonic() + timeout_s
        result = self._bound(endpoint, method, request, lease)()
        if inspect.isawaitable(result):
            return await _in_time(result, ends, method, endpoint)
        return result

    async def stream(
        self, endpoint: str, method: str, request: Any, *, lease: str, timeout_s: float | None
    ) -> AsyncIterator[Any]:
        """Yield what the handler yields; see `shmcoord.transport.AsyncTransport.stream`."""
        ends = None if timeout_s is None else time.monotonic() + timeout_s
        result = self._bound(endpoint, method, request, lease)()
        if not hasattr(result, "__aiter__"):
            for response in result:
                if ends is not None and time.monotonic() > ends:
                    raise _late(method, endpoint)
                yield response
            return
        responses = aiter(result)
        try:
            while True:
                try:
                    response = await _in_time(anext(responses), ends, method, endpoint)
                except StopAsyncIteration:
                    return
                yield response
        finally:
            aclose = getattr(responses, "aclose", None)
            if aclose is not None:
                await aclose()

    async def close(self) -> None:
        """Refuse all later calls."""
        self._closed = True

    async def __aenter__(self) -> AsyncLocalTransport:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


def _takes_lease(handler: Handler) -> bool:
    try:
        return "lease" in inspect.signature(handler).parameters
    except (TypeError, ValueError):  # some built-ins have no signature
        return False


async def _in_time(result: Awaitable[Any], ends: float | None, method: str, endpoint: str) -> Any:
    """Await a result until a time of the monotonic clock; None means without limit."""
    if ends is None:
        return await result
    try:
        return await asyncio.wait_for(result, max(0.0, ends - time.monotonic()))
    except asyncio.TimeoutError as error:  # before 3.11 it is not the built-in TimeoutError
        if time.monotonic() < ends:
            raise  # the handler's own
        raise _late(method, endpoint) from error


def _late(method: str, endpoint: str) -> TimeoutError:
    return TimeoutError(f"{method} at {endpoint} took longer than the call's time-out")
