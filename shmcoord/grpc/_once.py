"""A lease is good for one attempt: interceptors that call more than once send it only once.

A user's interceptor around the channel to a node may call its continuation again, to retry for
instance. The node has adopted the lease with the first attempt, and would take the second for one
whose lease was lost. So `outermost` puts the lease's token into an object that knows if it was
sent, and `innermost` leaves it out from the second time on: the node then counts that attempt as a
request without a lease.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import grpc
import grpc.aio

from shmcoord.grpc._common import LEASE_KEY

__all__ = ["around", "around_aio"]

Pair = tuple[str, Any]


class _Token(str):
    """The token of a lease, and whether it was sent."""

    __slots__ = ("sent",)

    sent: bool


def _mark(metadata: Iterable[Pair]) -> Iterable[Pair]:
    for key, value in metadata:
        if key == LEASE_KEY:
            token = _Token(value)
            token.sent = False
            yield key, token
        else:
            yield key, value


def _send(metadata: Iterable[Pair]) -> Iterable[Pair]:
    for key, value in metadata:
        if isinstance(value, _Token):
            if value.sent:
                continue
            value.sent = True
            yield key, str(value)
        else:
            yield key, value


class _Details(NamedTuple):
    """What a call is made with; the attributes that gRPC's own has."""

    method: str
    timeout: float | None
    metadata: Sequence[Pair] | None
    credentials: grpc.CallCredentials | None
    wait_for_ready: bool | None
    compression: grpc.Compression | None


class _Changing(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Changes the metadata of calls of every kind."""

    def __init__(self, change: Callable[[Iterable[Pair]], Iterable[Pair]]) -> None:
        self._change = change

    def _go_on(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        return continuation(
            _Details(
                details.method,
                details.timeout,
                tuple(self._change(details.metadata or ())),
                # Interceptors may make details that lack what they do not know.
                getattr(details, "credentials", None),
                getattr(details, "wait_for_ready", None),
                getattr(details, "compression", None),
            ),
            request,
        )

    intercept_unary_unary: Any = _go_on
    intercept_unary_stream: Any = _go_on
    intercept_stream_unary: Any = _go_on
    intercept_stream_stream: Any = _go_on


def around(interceptors: Sequence[Any]) -> list[Any]:
    """Return interceptors for `grpc.intercept_channel`: these, and what must be around them."""
    return [_Changing(_mark), *interceptors, _Changing(_send)]


class _AioChanging:
    def __init__(self, change: Callable[[Iterable[Pair]], Iterable[Pair]]) -> None:
        self._change = change

    async def _go_on(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        changed = grpc.aio.ClientCallDetails(
            method=details.method,
            timeout=details.timeout,
            metadata=grpc.aio.Metadata(*self._change(details.metadata or ())),
            credentials=details.credentials,
            wait_for_ready=details.wait_for_ready,
        )
        return await continuation(changed, request)


# An object is registered only for the first kind that it is of.
class _UnaryUnary(_AioChanging, grpc.aio.UnaryUnaryClientInterceptor):
    intercept_unary_unary: Any = _AioChanging._go_on


class _UnaryStream(_AioChanging, grpc.aio.UnaryStreamClientInterceptor):
    intercept_unary_stream: Any = _AioChanging._go_on


class _StreamUnary(_AioChanging, grpc.aio.StreamUnaryClientInterceptor):
    intercept_stream_unary: Any = _AioChanging._go_on


class _StreamStream(_AioChanging, grpc.aio.StreamStreamClientInterceptor):
    intercept_stream_stream: Any = _AioChanging._go_on


_KINDS: tuple[tuple[type, type[_AioChanging]], ...] = (
    (grpc.aio.UnaryUnaryClientInterceptor, _UnaryUnary),
    (grpc.aio.UnaryStreamClientInterceptor, _UnaryStream),
    (grpc.aio.StreamUnaryClientInterceptor, _StreamUnary),
    (grpc.aio.StreamStreamClientInterceptor, _StreamStream),
)


def around_aio(interceptors: Sequence[Any]) -> list[Any]:
    """Return interceptors for a channel of `grpc.aio`; kinds without a user's own get none."""
    kinds = [
        ours
        for theirs, ours in _KINDS
        if any(isinstance(interceptor, theirs) for interceptor in interceptors)
    ]
    return [
        *(kind(_mark) for kind in kinds),
        *interceptors,
        *(kind(_send) for kind in kinds),
    ]
