"""Handlers of a threaded server, wrapped: each counts its request and adds to its metadata."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc

from shmcoord.errors import NoBackend, Saturated
from shmcoord.grpc._common import served_by
from shmcoord.grpc._counting import Arrival, Notes
from shmcoord.grpc._faults import is_fault
from shmcoord.grpc._membership import Membership, Refused, note_span
from shmcoord.grpc._refusal import Refusal, refusal
from shmcoord.transport.grpc import lease_token

__all__ = ["Handlers"]

_Behavior = Callable[..., Any]


class Handlers:
    """Wraps the handlers of a server."""

    def __init__(self, membership: Membership, notes: Notes) -> None:
        self._membership = membership
        self._notes = notes
        # Calls that ended while the server drains and whose status is not sent yet. Adding and
        # discarding is one step each under the GIL.
        self.untold: set[object] = set()

    def wrap(self, handler: Any) -> Any:
        """Return a handler of the same kind."""
        make: Any
        if handler.request_streaming and handler.response_streaming:
            inner, wrap, make = (
                handler.stream_stream,
                self._stream,
                grpc.stream_stream_rpc_method_handler,
            )
        elif handler.request_streaming:
            inner, wrap, make = (
                handler.stream_unary,
                self._unary,
                grpc.stream_unary_rpc_method_handler,
            )
        elif handler.response_streaming:
            inner, wrap, make = (
                handler.unary_stream,
                self._stream,
                grpc.unary_stream_rpc_method_handler,
            )
        else:
            inner, wrap, make = (
                handler.unary_unary,
                self._unary,
                grpc.unary_unary_rpc_method_handler,
            )
        return make(
            wrap(inner), handler.request_deserializer, self._serializer(handler.response_serializer)
        )

    def refusing(self) -> Any:
        """Return the handler of every call that comes without a lease while the server drains.

        To gRPC it is one that gets a stream: it does not wait for a message that may never come.
        The caller cannot tell.
        """

        def never(requests: Any, context: Any) -> Any:
            raise AssertionError("a call that is refused was begun")

        return grpc.stream_unary_rpc_method_handler(self._unary(never))

    def _serializer(self, serialize: Callable[[Any], bytes] | None) -> Any:
        """A response that cannot be serialized is the server's fault: gRPC says INTERNAL."""
        if serialize is None:
            return None
        notes = self._notes

        def serialized(response: Any) -> bytes:
            try:
                return serialize(response)
            except BaseException:
                if notes.current is not None:
                    notes.current.failed = True
                raise

        return serialized

    def _unary(self, behavior: _Behavior) -> _Behavior:
        def serve(request: Any, context: Any) -> Any:
            arrival, alone = self._arrival(context)
            try:
                self._begin(arrival, context)
                response = behavior(request, context)
                self._succeed(arrival, context)
                return response
            except BaseException as error:
                self._fail(arrival, context, error)
                raise
            finally:
                if alone:
                    self._end(arrival)

        return _like(serve, behavior)

    def _stream(self, behavior: _Behavior) -> _Behavior:
        if getattr(behavior, "experimental_non_blocking", False):
            return self._callback(behavior)

        def serve(request: Any, context: Any) -> Iterator[Any]:
            arrival, alone = self._arrival(context)
            try:
                self._begin(arrival, context)
                yield from behavior(request, context)
                self._succeed(arrival, context)
            except GeneratorExit:  # the client is gone, or a response could not be serialized
                arrival.failed = arrival.failed or _is_late(context)
                raise
            except BaseException as error:
                self._fail(arrival, context, error)
                raise
            finally:
                if alone:
                    self._end(arrival)

        return _like(serve, behavior)

    def _callback(self, behavior: _Behavior) -> _Behavior:
        """A stream that does not occupy its thread: the handler gets a function to send with.

        It may keep that and return, and any thread may send later; None is the end. So the call
        ends when both the handler has returned and gRPC says that the call is over.
        """
        notes = self._notes

        def serve(request: Any, context: Any, send: Callable[[Any], None]) -> None:
            arrival, alone = self._arrival(context)
            arrival.goes_on = True
            left = [None]  # of the handler and the call, who comes first takes this
            judged = False

            def part() -> None:
                try:
                    left.pop()  # one step under the GIL
                except IndexError:
                    arrival.end()

            def over() -> None:
                if not judged:  # the client is gone, or its deadline is
                    arrival.failed = arrival.failed or _is_late(context)
                part()

            def send_counted(response: Any) -> None:
                nonlocal judged
                if response is None and not judged:
                    judged = True
                    unserialized = arrival.failed
                    self._succeed(arrival, context)
                    arrival.failed = arrival.failed or unserialized
                before, notes.current = notes.current, arrival
                try:
                    send(response)
                finally:
                    notes.current = before

            try:
                if not context.add_callback(over):
                    over()
                self._begin(arrival, context)
                behavior(request, context, send_counted)
            except BaseException as error:
                judged = True
                self._fail(arrival, context, error)
                raise
            finally:
                if alone:
                    notes.current = None
                part()

        return _like(serve, behavior)

    def _arrival(self, context: Any) -> tuple[Arrival, bool]:
        """The call that this thread serves; and whether nobody but the handler will end it."""
        arrival = self._notes.current
        if arrival is not None:
            return arrival, False
        # It did not come through our executor: the handler has a pool of its own.
        arrival = self._notes.current = Arrival(self._membership, lease_token(context))
        return arrival, True

    def _end(self, arrival: Arrival) -> None:
        self._notes.current = None
        arrival.end()

    def _begin(self, arrival: Arrival, context: Any) -> None:
        arrival.begin(context)
        place = self._membership.place
        served_by.set(place.node)
        note_span(place)

    def _succeed(self, arrival: Arrival, context: Any) -> None:
        """The handler is done; it may have set a status of its own."""
        arrival.failed = is_fault(context.code()) or _is_late(context)
        self._finish(context)

    def _fail(self, arrival: Arrival, context: Any, error: BaseException) -> None:
        """Judge what a handler raised, and say it to the client if it is ours to say.

        Raises:
            Exception: gRPC's own, by which it knows that the call was aborted.
        """
        own: tuple[Any, ...] = ()
        try:
            if isinstance(error, Refused):
                own = error.refusal.trailing
                context.abort(error.refusal.code, error.refusal.details)
            if isinstance(error, (Saturated, NoBackend)):
                _abort(context, refusal(error))
        finally:
            if isinstance(error, grpc.RpcError) and not context.is_active():
                arrival.failed = _is_late(context)  # gRPC's word for a client that is gone
            else:
                code = context.code()
                arrival.failed = code is None or is_fault(code) or _is_late(context)
            self._finish(context, own)

    def _finish(self, context: Any, own: tuple[Any, ...] = ()) -> None:
        """The status comes next: add to its metadata, and let the end of the server wait for it."""
        membership = self._membership
        trailing = membership.merged(context.trailing_metadata())
        context.set_trailing_metadata((*own, *trailing) if own else trailing)
        if membership.draining:
            untold, this = self.untold, object()
            untold.add(this)
            if not context.add_callback(lambda: untold.discard(this)):
                untold.discard(this)


def _abort(context: Any, refused: Refusal) -> None:
    if refused.trailing:
        context.set_trailing_metadata(refused.trailing)
    context.abort(refused.code, refused.details)


def _is_late(context: Any) -> bool:
    """Whether the call's deadline has passed: its client was told DEADLINE_EXCEEDED."""
    left_s = context.time_remaining()
    return left_s is not None and left_s <= 0.0


def _like(serve: _Behavior, behavior: _Behavior) -> _Behavior:
    """Let gRPC run it where, and as, it would have run the handler itself."""
    for name in ("experimental_non_blocking", "experimental_thread_pool"):
        value = getattr(behavior, name, None)
        if value is not None:
            setattr(serve, name, value)
    return serve
