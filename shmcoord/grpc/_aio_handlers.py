"""Handlers of an event loop's server, wrapped: each counts its request and adds to its metadata.

grpcio treats a handler by its kind (`grpc/_cython/_cygrpc/aio/server.pyx.pxi`): coroutine
functions and async generator functions run on the loop; anything else is a plain function or a
plain generator function, and runs in a pool of threads. Bound methods and `functools.partial`
count as what they stand for, callable objects as plain. A wrapper is of the kind of its handler.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from shmcoord.errors import NoBackend, Saturated
from shmcoord.grpc._aio_context import AioContext
from shmcoord.grpc._aio_plain import PlainHandlers, PlainUnary
from shmcoord.grpc._common import is_infrastructure, served_by
from shmcoord.grpc._faults import is_fault
from shmcoord.grpc._membership import Membership, Refused, note_span
from shmcoord.grpc._refusal import refusal
from shmcoord.node import Request
from shmcoord.transport._grpc_common import token_in
from shmcoord.transport.grpc import lease_token

__all__ = ["AioHandlers", "AioInterceptor"]

_Behavior = Callable[..., Any]
# Wrapped handlers that are kept. A generic handler may serve any method that a client names.
_KEPT = 1024


class _Call:
    """One call that a handler on the loop serves.

    Attributes:
        task: Serves it.
        failed: Whether it is the server's fault how it ended.
        runs: Whether its handler has not ended.
        stopped: Whether we have ended it.
    """

    __slots__ = ("_open", "_request", "failed", "runs", "stopped", "task")

    def __init__(self, request: Request | None, open_calls: set[_Call]) -> None:
        self._request = request  # None: it does not count
        self._open = open_calls
        self.runs = True
        self.task = asyncio.current_task()
        self.failed = True  # until it is known
        self.stopped = False
        open_calls.add(self)

    def end(self) -> None:
        """The handler has ended."""
        self.runs = False
        request, self._request = self._request, None
        if request is not None:
            request.end(failed=self.failed)

    def told(self, context: Any) -> None:
        """gRPC is done with the call: its status was sent, or its client is gone."""
        if self._request is not None:
            # It was given up while gRPC sent a response, and its generator with it.
            left_s = context.time_remaining()
            self.failed = left_s is not None and left_s <= 0.0
            self.end()
        self._open.discard(self)


class AioHandlers:
    """Wraps the handlers of a server."""

    def __init__(self, membership: Membership) -> None:
        self._membership = membership
        self._plain = PlainHandlers(membership)
        self._open: set[_Call] = set()

    def counts(self, method: str) -> bool:
        """Whether requests of a method are the node's load."""
        return self._membership.counts(method)

    def idle(self) -> bool:
        """Whether every call has its status."""
        return not self._open and not self._plain.open

    def stop_all(self) -> None:
        """End with UNAVAILABLE what runs on the loop; threads cannot be ended."""
        for call in self._open:
            if call.runs and call.task is not None and not call.stopped:
                call.stopped = True
                call.task.cancel()

    def wrap(self, handler: Any, counts: bool = True) -> Any:
        """Return a handler of the same kind; `counts`: whether its requests are load."""
        make: Any
        if handler.request_streaming and handler.response_streaming:
            inner = self._streaming(handler.stream_stream, counts)
            make = grpc.stream_stream_rpc_method_handler
        elif handler.request_streaming:
            inner = self._single(handler.stream_unary, counts)
            make = grpc.stream_unary_rpc_method_handler
        elif handler.response_streaming:
            inner = self._streaming(handler.unary_stream, counts)
            make = grpc.unary_stream_rpc_method_handler
        else:
            inner = self._single(handler.unary_unary, counts)
            make = grpc.unary_unary_rpc_method_handler
        return make(inner, handler.request_deserializer, handler.response_serializer)

    def _single(self, behavior: _Behavior, counts: bool) -> _Behavior:
        if inspect.iscoroutinefunction(behavior):
            return self._coroutine(behavior, counts)
        return PlainUnary(self._plain, behavior, counts)

    def _streaming(self, behavior: _Behavior, counts: bool) -> _Behavior:
        if inspect.iscoroutinefunction(behavior):
            return self._coroutine(behavior, counts)
        if inspect.isasyncgenfunction(behavior):
            return self._generator(behavior, counts)
        return self._plain.streaming(behavior, counts)

    def _coroutine(self, behavior: _Behavior, counts: bool) -> _Behavior:
        async def serve(request: Any, context: Any) -> Any:
            own = AioContext(context, self._membership)
            try:
                call = self._begin(own, counts)
            except Refused as refused:
                await own.refuse(refused.refusal)
                raise
            try:
                response = await behavior(request, own)
                call.failed = own.failed()
                own.add_own()
                return response
            except BaseException as error:
                await self._fail(call, own, error)
                raise
            finally:
                call.end()

        return serve

    def _generator(self, behavior: _Behavior, counts: bool) -> _Behavior:
        async def serve(request: Any, context: Any) -> AsyncIterator[Any]:
            own = AioContext(context, self._membership)
            try:
                call = self._begin(own, counts)
            except Refused as refused:
                await own.refuse(refused.refusal)
                raise
            responses = behavior(request, own)
            try:
                async for response in responses:
                    yield response
                call.failed = own.failed()
                own.add_own()
            except BaseException as error:
                await self._fail(call, own, error)
                raise
            finally:
                call.end()
                await responses.aclose()

        return serve

    def _begin(self, own: AioContext, counts: bool) -> _Call:
        """Adopt the lease that came, or begin without, if it counts.

        Raises:
            Refused: Say it to the client.
        """
        membership = self._membership
        request = None
        token = lease_token(own)
        if token is not None or counts:
            if token is None and membership.draining:
                raise Refused(membership.refusal())
            request = membership.take(token, own)
        call = _Call(request, self._open)
        own.add_done_callback(call.told)
        served_by.set(membership.place.node)
        note_span(membership.place)
        return call

    async def _fail(self, call: _Call, own: AioContext, error: BaseException) -> None:
        """Judge what a handler raised, and say it to the client if it is ours to say."""
        if isinstance(error, GeneratorExit):  # the client went while a response was sent
            call.failed = own.is_late()
        elif isinstance(error, asyncio.CancelledError) and own.code_set is None:
            call.failed = own.is_late()
            if call.stopped:
                # It was us who cancelled the task; from here on it is no longer cancelled.
                task: Any = call.task
                if hasattr(task, "uncancel"):  # from Python 3.11
                    task.uncancel()
                # Where a response still waits to be read, no status can follow it.
                with contextlib.suppress(grpc.aio.InternalError):
                    await own.abort(*self._membership.stopping())
        elif isinstance(error, (Saturated, NoBackend)) and own.code_set is None:
            refused = refusal(error)
            call.failed = is_fault(refused.code)
            await own.abort(*refused)
        else:
            call.failed = own.failed(error)
            own.add_own()


class AioInterceptor(grpc.aio.ServerInterceptor):
    """Must be the first interceptor of the server: it wraps the handler of what arrives."""

    def __init__(self, handlers: AioHandlers) -> None:
        self._handlers = handlers
        self._wrapped: dict[str, tuple[Any, Any]] = {}

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: Any
    ) -> Any:
        """Wrap the handler; not that of infrastructure (health, reports) without a lease."""
        handler = await continuation(details)
        method = details.method
        if handler is None:
            return None
        infrastructure = is_infrastructure(method)
        if infrastructure and token_in(details.invocation_metadata) is None:
            return handler
        kept = self._wrapped.get(method)
        if kept is not None and kept[0] is handler:
            return kept[1]
        counts = not infrastructure and self._handlers.counts(method)
        wrapped = self._handlers.wrap(handler, counts)
        if len(self._wrapped) < _KEPT or kept is not None:
            self._wrapped[method] = (handler, wrapped)
        return wrapped
