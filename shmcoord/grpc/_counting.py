"""How a threaded gRPC server counts: exactly what waits, and exactly what its handlers execute.

grpcio's serving thread takes a call, runs the interceptors under the server's lock, and then in the
same thread either rejects the call or gives it to the executor. So:

- the interceptor, the first of all, notes for its thread what has arrived;
- the executor's `submit` takes the note: the request waits from then on (one that came with a lease
  is counted in its lease cell already);
- the handler, in a thread of the pool, adopts the lease or begins a request;
- the end of the pool's task ends all of it. For a response stream this is the end of the stream
  (`grpc._server._stream_response_in_pool` iterates the responses inside of the task), and for a
  call that was cancelled while it waited it is all that happens. Only a handler that is
  `experimental_non_blocking` goes on after its task: until gRPC says that the call is over.

A call that is rejected (no such method, `maximum_concurrent_rpcs`) is never submitted. Its note is
wiped by the next call, before anything else of that call happens.

Infrastructure (health, reflection, reports), and methods that are excluded, run on a small pool of
their own and are not counted: a client that watches the health must not occupy a worker. One that
came with a lease adopts it all the same: its client takes a lease that nobody adopted for a proof
that nothing was executed.

Requests that are refused since the server drains have threads of their own as well: watches may
occupy all of that pool for as long as they like.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc

from shmcoord.grpc._common import is_infrastructure
from shmcoord.grpc._membership import Membership, Refused
from shmcoord.transport._grpc_common import token_in

if TYPE_CHECKING:
    from shmcoord.grpc._handlers import Handlers
    from shmcoord.node import Request

__all__ = ["Arrival", "CountingExecutor", "CountingInterceptor", "Notes"]

# Threads are made as they are needed. Each watch of a health service that blocks needs one.
_ASIDE_WORKERS = 16
# None of them ever waits for anything: a refusal reads no message.
_REFUSING_WORKERS = 2
# Wrapped handlers that are kept. A generic handler may serve any method that a client names.
_KEPT = 1024


class Arrival:
    """One call that has arrived, until its end.

    It ends by itself when nobody holds it any more: a call that is thrown out of the executor's
    queue leaves nothing behind.
    """

    __slots__ = (
        "aside",
        "failed",
        "goes_on",
        "membership",
        "refused",
        "request",
        "token",
        "waits",
    )

    def __init__(self, membership: Membership, token: str | None, *, aside: bool = False) -> None:
        self.membership = membership
        self.token = token
        # It came without lease while the server drained.
        self.refused = membership.draining and token is None and not aside
        # It runs beside the workers, and is not counted unless it came with a lease.
        self.aside = aside or self.refused
        self.waits = False
        self.request: Request | None = None
        self.failed = False
        # It does not end with its task: its handler sends from other threads.
        self.goes_on = False

    def wait(self) -> None:
        """Count it among what waits; one with a lease is counted by that already."""
        if self.token is None and not self.aside:
            self.waits = True
            self.membership.waiting.add(id(self))

    def begin(self, context: Any) -> None:
        """Adopt its lease, or begin a request without, if it counts; it then waits no longer.

        Args:
            context: Of the request.

        Raises:
            Refused: Say it to the client.
        """
        if self.refused:
            raise Refused(self.membership.refusal())
        if self.token is not None or not self.aside:
            self.request = self.membership.take(self.token, context)
        if self.waits:
            self.waits = False
            self.membership.waiting.discard(id(self))

    def end(self) -> None:
        """End what was counted, whatever happened before; nothing happens the second time."""
        if self.waits:
            self.waits = False
            self.membership.waiting.discard(id(self))
        request = self.request
        if request is not None:
            self.request = None
            request.end(failed=self.failed)

    def __del__(self) -> None:
        self.end()


class Notes(threading.local):
    """What a thread has to remember.

    Attributes:
        arrived: In the serving thread: the call that `submit` will get next.
        current: In a thread of the pool: the call that it serves.
    """

    arrived: Arrival | None = None
    current: Arrival | None = None


class CountingInterceptor(grpc.ServerInterceptor):
    """Must be the first interceptor of the server: it notes what arrives, and wraps its handler."""

    def __init__(self, membership: Membership, notes: Notes, handlers: Handlers) -> None:
        self._membership = membership
        self._notes = notes
        self._handlers = handlers
        self._refusing = handlers.refusing()
        self._wrapped: dict[str, tuple[Any, Any]] = {}

    def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Any], details: Any
    ) -> Any:
        """Note the call and wrap its handler; runs under the server's lock."""
        notes = self._notes
        notes.arrived = None
        handler = continuation(details)
        if handler is None:
            return None
        method = details.method
        token = token_in(details.invocation_metadata)
        aside = is_infrastructure(method) or not self._membership.counts(method)
        arrival = notes.arrived = Arrival(self._membership, token, aside=aside)
        if arrival.refused:
            return self._refusing
        if aside and token is None:
            return handler
        kept = self._wrapped.get(method)
        if kept is not None and kept[0] is handler:
            return kept[1]
        wrapped = self._handlers.wrap(handler)
        if len(self._wrapped) < _KEPT or kept is not None:
            self._wrapped[method] = (handler, wrapped)
        return wrapped


class CountingExecutor(ThreadPoolExecutor):
    """Runs the calls of a server in another executor, and counts them.

    Args:
        notes: Shared with the interceptor and the handlers.
        workers: The executor that runs them.
    """

    def __init__(self, notes: Notes, workers: Executor) -> None:
        super().__init__(_ASIDE_WORKERS, thread_name_prefix="shmcoord-aside")
        self._refusing = ThreadPoolExecutor(
            _REFUSING_WORKERS, thread_name_prefix="shmcoord-refusing"
        )
        self._notes = notes
        self._workers = workers

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run a call; what is no call of the server goes through uncounted."""
        arrival, self._notes.arrived = self._notes.arrived, None
        if arrival is None:
            return self._workers.submit(fn, *args, **kwargs)
        if arrival.refused:
            return self._refusing.submit(self._serve, arrival, fn, args, kwargs)
        if arrival.aside:
            return super().submit(self._serve, arrival, fn, args, kwargs)
        arrival.wait()
        return self._workers.submit(self._serve, arrival, fn, args, kwargs)

    def _serve(
        self,
        arrival: Arrival,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        self._notes.current = arrival
        try:
            return fn(*args, **kwargs)
        finally:
            self._notes.current = None
            if not arrival.goes_on:
                arrival.end()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Shut all pools down."""
        self._workers.shutdown(wait=wait, cancel_futures=cancel_futures)
        super().shutdown(wait=wait, cancel_futures=cancel_futures)
        self._refusing.shutdown(wait=wait, cancel_futures=cancel_futures)
