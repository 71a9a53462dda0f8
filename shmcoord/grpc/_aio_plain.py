"""Plain functions and generators as handlers of an event loop's server, wrapped.

`grpc.aio` runs them in its pool of threads, so they may wait there: from `submit`, or for a stream
from when the loop has called it, until a thread begins.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import Any

from shmcoord.errors import NoBackend, Saturated
from shmcoord.grpc._aio_context import PlainContext
from shmcoord.grpc._common import served_by
from shmcoord.grpc._counting import Arrival
from shmcoord.grpc._membership import Membership, Refused, note_span
from shmcoord.grpc._refusal import refusal
from shmcoord.transport.grpc import lease_token

__all__ = ["PlainExecutor", "PlainHandlers", "PlainUnary"]

_Behavior = Callable[..., Any]


class PlainHandlers:
    """Begins and ends the requests that run in threads."""

    def __init__(self, membership: Membership) -> None:
        self.membership = membership
        # Changed by threads: adding and discarding is one step under the GIL.
        self.open: set[int] = set()

    def arrive(self, context: Any, counts: bool) -> Arrival:
        """A request that a thread shall begin; `counts`: whether it is load without a lease."""
        arrival = Arrival(self.membership, lease_token(context), aside=not counts)
        arrival.wait()
        return arrival

    def begin(self, arrival: Arrival, own: PlainContext) -> None:
        """Adopt or begin; the request then waits no longer."""
        arrival.begin(own)
        self.open.add(id(arrival))
        note_span(self.membership.place)

    def fail(self, arrival: Arrival, own: PlainContext, error: BaseException) -> None:
        """Judge what a handler raised, and say it to the client if it is ours to say."""
        if isinstance(error, GeneratorExit):
            arrival.failed = own.is_late()
            return
        try:
            if isinstance(error, Refused):
                own.refuse(error.refusal)
            if isinstance(error, (Saturated, NoBackend)) and own.code_set is None:
                own.abort(*refusal(error))
        finally:
            arrival.failed = own.failed(error)
            own.add_own()

    def end(self, arrival: Arrival) -> None:
        """End whatever was begun."""
        arrival.end()
        self.open.discard(id(arrival))

    def streaming(self, behavior: _Behavior, counts: bool) -> _Behavior:
        """Wrap a generator function, or one that returns an iterator."""

        def responses(arrival: Arrival, request: Any, context: Any) -> Iterator[Any]:
            own = PlainContext(context, self.membership)
            before = served_by.set(self.membership.place.node)
            try:
                self.begin(arrival, own)
                yield from behavior(request, own)
                arrival.failed = own.failed()
                own.add_own()
            except BaseException as error:
                self.fail(arrival, own, error)
                raise
            finally:
                self.end(arrival)
                _reset(before)

        def serve(request: Any, context: Any) -> Iterator[Any]:
            return responses(self.arrive(context, counts), request, context)

        return serve


class PlainUnary:
    """A plain function that gives one response, wrapped."""

    def __init__(self, handlers: PlainHandlers, behavior: _Behavior, counts: bool) -> None:
        self.handlers = handlers
        self.counts = counts
        self._behavior = behavior

    def __call__(self, request: Any, context: Any) -> Any:
        """Serve a request that did not come through `PlainExecutor`."""
        return self.serve(self.handlers.arrive(context, self.counts), request, context)

    def serve(self, arrival: Arrival, request: Any, context: Any) -> Any:
        """Serve a request."""
        handlers = self.handlers
        own = PlainContext(context, handlers.membership)
        before = served_by.set(handlers.membership.place.node)
        try:
            handlers.begin(arrival, own)
            response = self._behavior(request, own)
            arrival.failed = own.failed()
            own.add_own()
            return response
        except BaseException as error:
            handlers.fail(arrival, own, error)
            raise
        finally:
            handlers.end(arrival)
            served_by.reset(before)


class PlainExecutor(Executor):
    """Runs the plain handlers in another executor, and counts those that wait there."""

    def __init__(self, workers: Executor) -> None:
        self._workers = workers

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run a function; one that is a handler waits until it begins."""
        if not isinstance(fn, PlainUnary):
            return self._workers.submit(fn, *args, **kwargs)
        arrival = fn.handlers.arrive(args[1], fn.counts)
        future = self._workers.submit(fn.serve, arrival, *args, **kwargs)
        # One that is cancelled while it waits stays in the queue, with all that it needs.
        future.add_done_callback(lambda future: arrival.end() if future.cancelled() else None)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Shut the other executor down."""
        self._workers.shutdown(wait=wait, cancel_futures=cancel_futures)


def _reset(token: Any) -> None:
    with contextlib.suppress(ValueError):  # of a generator that is closed elsewhere than it ran
        served_by.reset(token)
