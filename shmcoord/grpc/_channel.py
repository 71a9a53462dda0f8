"""`channel`: a `grpc.Channel` whose calls go, each for itself, to the node with the least load."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from types import TracebackType
from typing import Any

import grpc
import grpc.experimental

from shmcoord.api import Segment
from shmcoord.course import OnDecision
from shmcoord.grpc._calls import RoutedStreamStream, RoutedUnaryStream
from shmcoord.grpc._connectivity import Connectivity
from shmcoord.grpc._core import Core, Method, dressed
from shmcoord.grpc._once import Legs
from shmcoord.grpc._unary import RoutedStreamUnary, RoutedUnaryUnary
from shmcoord.router import Router
from shmcoord.transport._grpc_common import without_retries
from shmcoord.transport._grpc_links import LinkPool

__all__ = ["RoutedChannel", "channel"]

_SINGLE_THREADED = grpc.experimental.ChannelOptions.SingleThreadedUnaryStream


def channel(
    *segments: str | Segment,
    group: str,
    policy: Any = "least-loaded",
    router: Router | None = None,
    credentials: grpc.ChannelCredentials | None = None,
    options: Sequence[tuple[str, Any]] = (),
    compression: grpc.Compression | None = None,
    interceptors: Sequence[Any] = (),
    idempotent: Collection[str] = (),
    adopts: bool = False,
    max_wait_s: float = 3600.0,
    connect_timeout_s: float = 1.0,
    on_decision: OnDecision | None = None,
) -> grpc.Channel:
    """Make a channel to the nodes of a group, for generated stubs.

    Each call reserves a unit of a node's capacity, goes to that node with the lease in its
    metadata, and gives the lease back when it ends. It goes elsewhere only if it was certainly not
    executed (see `shmcoord.dispatch`). Where every node is at its capacity a call waits: until its
    deadline, or `max_wait_s`. Metadata `shmcoord-cost` and `shmcoord-key` of a call say how many
    units it takes, and the key of the policy `affinity`; both are not sent.

    Args:
        segments: Names of the segments in which the nodes are, or open `Segment` objects.
        group: The nodes that can serve these calls.
        policy: As of `shmcoord.Router`.
        router: In place of segments and policy; its owner closes it.
        credentials: For encrypted connections; None for plain ones.
        options: Options of gRPC for the channels to the nodes.
        compression: Of what is sent.
        interceptors: Client interceptors, put around the channel to each node. Those that shall
            see a call once, before it has a node, go outside: `grpc.intercept_channel`.
        idempotent: Full names (`/package.Service/Method`) of methods that may be executed twice:
            these are sent elsewhere after any broken connection.
        adopts: Say True if every node of the group adopts leases, as servers of this package do; a
            channel learns it of each node from its first response, so only what breaks before that
            depends on it.
        max_wait_s: Longest wait of a call without a deadline for capacity (or, with
            `wait_for_ready`, for a node), seconds.
        connect_timeout_s: Longest wait for the connection to one node, seconds.
        on_decision: Called with the decision and the lease before each sending, for logs. An error
            that it raises ends the call.

    Raises:
        TypeError: Neither segments nor a router, or both.
    """
    if (router is None) != bool(segments):
        raise TypeError("give either names of segments or router=")
    if isinstance(idempotent, str):
        raise TypeError("idempotent must be several methods, not one str")
    for method in idempotent:
        if not method.startswith("/"):
            raise ValueError(f"a full name is like /package.Service/Method, not {method!r}")
    if not (max_wait_s >= 0 and connect_timeout_s >= 0):
        raise ValueError("max_wait_s and connect_timeout_s must not be negative")
    legs = Legs() if interceptors else None
    pool = LinkPool(
        dressed(interceptors, legs),
        credentials=credentials,
        options=without_retries(options),
        compression=compression,
    )
    core = Core(
        router if router is not None else Router(*segments, policy=policy),
        group=group,
        owns_router=router is None,
        pool=pool,
        idempotent=idempotent,
        adopts=adopts,
        max_wait_s=max_wait_s,
        connect_timeout_s=connect_timeout_s,
        single_threaded=any(name == _SINGLE_THREADED for name, _ in options),
        on_decision=on_decision,
        legs=legs,
    )
    return RoutedChannel(core)


class RoutedChannel(grpc.Channel):
    """A channel to all nodes of a group; made by `channel`."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._connectivity = Connectivity(core)

    def unary_unary(
        self,
        method: str,
        request_serializer: Callable[..., Any] | None = None,
        response_deserializer: Callable[..., Any] | None = None,
        _registered_method: bool | None = False,
    ) -> Any:
        """Make a callable for a method with one request and one response."""
        codec = (request_serializer, response_deserializer)
        return RoutedUnaryUnary(
            self._core, self._method("unary_unary", method, codec, _registered_method)
        )

    def unary_stream(
        self,
        method: str,
        request_serializer: Callable[..., Any] | None = None,
        response_deserializer: Callable[..., Any] | None = None,
        _registered_method: bool | None = False,
    ) -> Any:
        """Make a callable for a method with one request and a stream of responses."""
        codec = (request_serializer, response_deserializer)
        return RoutedUnaryStream(
            self._core, self._method("unary_stream", method, codec, _registered_method)
        )

    def stream_unary(
        self,
        method: str,
        request_serializer: Callable[..., Any] | None = None,
        response_deserializer: Callable[..., Any] | None = None,
        _registered_method: bool | None = False,
    ) -> Any:
        """Make a callable for a method with a stream of requests and one response."""
        codec = (request_serializer, response_deserializer)
        return RoutedStreamUnary(
            self._core, self._method("stream_unary", method, codec, _registered_method)
        )

    def stream_stream(
        self,
        method: str,
        request_serializer: Callable[..., Any] | None = None,
        response_deserializer: Callable[..., Any] | None = None,
        _registered_method: bool | None = False,
    ) -> Any:
        """Make a callable for a method with streams of requests and responses."""
        codec = (request_serializer, response_deserializer)
        return RoutedStreamStream(
            self._core, self._method("stream_stream", method, codec, _registered_method)
        )

    def subscribe(
        self,
        callback: Callable[[grpc.ChannelConnectivity], None],
        try_to_connect: bool | None = False,
    ) -> None:
        """Tell a callback the state of the channel: READY if any node is connected."""
        self._connectivity.subscribe(callback, bool(try_to_connect))

    def unsubscribe(self, callback: Callable[[grpc.ChannelConnectivity], None]) -> None:
        """Undo `subscribe`."""
        self._connectivity.unsubscribe(callback)

    def close(self) -> None:
        """Cancel all calls and close all connections."""
        if not self._core.is_foreign():
            self._core.close()
            self._connectivity.close()

    def __enter__(self) -> RoutedChannel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _method(
        self,
        kind: str,
        name: str,
        codec: tuple[Callable[..., Any] | None, Callable[..., Any] | None],
        registered: bool | None,
    ) -> Method:
        return Method(self._core.pool, kind, name, codec, registered)
