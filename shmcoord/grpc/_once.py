"""A lease is good for one attempt: interceptors that call more than once send it only once.

A user's interceptor around the channel to a node may call its continuation again, to retry for
instance. The node has adopted the lease with the first attempt, and would take the second for one
whose lease was lost. So the innermost of all interceptors, which sees what really goes out, leaves
a lease out that was sent before: the node then counts that attempt as a request without a lease.

Such an attempt, and one of which an interceptor has taken the lease, may be executed without
anybody adopting the lease. Then neither a lease that nobody has adopted nor one that was refused
proves that nothing was executed. `Leg.bare` remembers that.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import grpc
import grpc.aio

from shmcoord.grpc._common import LEASE_KEY
from shmcoord.transport._grpc_common import token_in

__all__ = ["Leg", "Legs", "around", "around_aio", "proves"]

Pair = tuple[str, Any]


class Leg:
    """What one lease was sent with: all attempts that interceptors make of one sending.

    Attributes:
        sent: Whether an attempt has left with the lease.
        bare: Whether one may have left without.
    """

    __slots__ = ("__weakref__", "bare", "owner", "sent")

    def __init__(self, owner: Legs) -> None:
        self.owner = owner
        self.sent = False
        self.bare = False


def proves(leg: Leg | None) -> bool:
    """Whether the end of a lease tells what was executed; None: no interceptors are there."""
    return leg is None or not leg.bare


_current: ContextVar[Leg | None] = ContextVar("shmcoord_leg", default=None)


class Legs:
    """The legs of a channel's calls that are under way, by the token of their lease.

    They are kept alive by their calls. May be used by any thread: an interceptor may make its
    attempts in threads of its own.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._live: weakref.WeakValueDictionary[str, Leg] = weakref.WeakValueDictionary()

    def begin(self, token: str) -> Leg:
        """Return a new leg; it is known here as long as the caller keeps it."""
        leg = self._live[token] = Leg(self)
        return leg

    def of(self, metadata: Iterable[Pair]) -> Leg | None:
        """Return the leg whose lease is in the metadata."""
        token = token_in(metadata)
        return None if token is None else self._live.get(token)

    def sending(self, metadata: Sequence[Pair]) -> Sequence[Pair]:
        """Note an attempt that leaves now; return the metadata with which it shall leave."""
        token = token_in(metadata)
        leg = None if token is None else self._live.get(token)
        current = _current.get()
        if current is not None and current.owner is not self:  # of a channel around this one
            current = None
        if leg is None:
            # Whose attempt it is, is not known in a thread of an interceptor's own.
            for one in list(self._live.values()) if current is None else (current,):
                one.bare = True
            return metadata
        if current is not None and current is not leg:
            current.bare = True
        with self._lock:
            if not leg.sent:
                leg.sent = True
                return metadata
            leg.bare = True
        return tuple(pair for pair in metadata if pair[0] != LEASE_KEY)


class _Details(NamedTuple):
    """What a call is made with; the attributes that gRPC's own has."""

    method: str
    timeout: float | None
    metadata: Sequence[Pair] | None
    credentials: grpc.CallCredentials | None
    wait_for_ready: bool | None
    compression: grpc.Compression | None


def _changed(details: Any, metadata: Sequence[Pair]) -> _Details:
    return _Details(
        details.method,
        details.timeout,
        metadata,
        # Interceptors may make details that lack what they do not know.
        getattr(details, "credentials", None),
        getattr(details, "wait_for_ready", None),
        getattr(details, "compression", None),
    )


class _Every(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Sees calls of every kind."""

    def __init__(self, legs: Legs) -> None:
        self._legs = legs

    def _go_on(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        raise NotImplementedError

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        return self._go_on(continuation, details, request)

    intercept_unary_stream: Any = intercept_unary_unary
    intercept_stream_unary: Any = intercept_unary_unary
    intercept_stream_stream: Any = intercept_unary_unary


class _Outermost(_Every):
    def _go_on(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        before = _current.set(self._legs.of(details.metadata or ()))
        try:
            return continuation(details, request)
        finally:
            _current.reset(before)


class _Innermost(_Every):
    def _go_on(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        metadata = self._legs.sending(tuple(details.metadata or ()))
        return continuation(_changed(details, metadata), request)


def around(interceptors: Sequence[Any], legs: Legs) -> list[Any]:
    """Return interceptors for `grpc.intercept_channel`: these, and what must be around them."""
    return [_Outermost(legs), *interceptors, _Innermost(legs)]


class _AioOutermost:
    def __init__(self, legs: Legs) -> None:
        self._legs = legs

    async def _go_on(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        before = _current.set(self._legs.of(details.metadata or ()))
        try:
            return await continuation(details, request)
        finally:
            _current.reset(before)


class _AioInnermost:
    def __init__(self, legs: Legs) -> None:
        self._legs = legs

    async def _go_on(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        metadata = self._legs.sending(tuple(details.metadata or ()))
        changed = grpc.aio.ClientCallDetails(
            method=details.method,
            timeout=details.timeout,
            metadata=grpc.aio.Metadata(*metadata),
            credentials=details.credentials,
            wait_for_ready=details.wait_for_ready,
        )
        return await continuation(changed, request)


# An object is registered only for the first kind that it is of.
_KINDS: tuple[tuple[type, str], ...] = (
    (grpc.aio.UnaryUnaryClientInterceptor, "intercept_unary_unary"),
    (grpc.aio.UnaryStreamClientInterceptor, "intercept_unary_stream"),
    (grpc.aio.StreamUnaryClientInterceptor, "intercept_stream_unary"),
    (grpc.aio.StreamStreamClientInterceptor, "intercept_stream_stream"),
)


def _of_kind(base: type[_AioOutermost | _AioInnermost], kind: type, name: str, legs: Legs) -> Any:
    return type(base.__name__, (base, kind), {name: base._go_on})(legs)


def around_aio(interceptors: Sequence[Any], legs: Legs) -> list[Any]:
    """Return interceptors for a channel of `grpc.aio`; kinds without a user's own get none."""
    kinds = [
        (kind, name)
        for kind, name in _KINDS
        if any(isinstance(interceptor, kind) for interceptor in interceptors)
    ]
    return [
        *(_of_kind(_AioOutermost, kind, name, legs) for kind, name in kinds),
        *interceptors,
        *(_of_kind(_AioInnermost, kind, name, legs) for kind, name in kinds),
    ]
