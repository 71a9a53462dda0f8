"""The aio channel that routes every call by load."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from types import TracebackType
from typing import Any

import grpc
import grpc.aio

from shmcoord.course import OnDecision, send_rules
from shmcoord.grpc._aio_methods import StreamStream, StreamUnary, UnaryStream, UnaryUnary
from shmcoord.grpc._aio_routes import Routes
from shmcoord.grpc._aio_state import state_of
from shmcoord.grpc._once import Legs, around_aio
from shmcoord.router import Router
from shmcoord.segment import Mapping
from shmcoord.transport._grpc_aio_links import AioLinks
from shmcoord.transport._grpc_common import without_retries

__all__ = ["RoutedChannel", "channel"]

Serializer = Callable[[Any], bytes]
Deserializer = Callable[[bytes], Any]

# Members come and go without telling, so who waits for a change of the state looks at it, at first
# after a millisecond, then twice as long each time up to this.
_LOOK_EVERY_S = 0.05


def channel(
    *segments: str | Mapping,
    group: str,
    policy: Any = "least-loaded",
    router: Router | None = None,
    credentials: grpc.ChannelCredentials | None = None,
    options: Sequence[tuple[str, Any]] = (),
    compression: grpc.Compression | None = None,
    interceptors: Sequence[grpc.aio.ClientInterceptor] = (),
    idempotent: Collection[str] = (),
    adopts: bool = False,
    max_wait_s: float = 3600.0,
    connect_timeout_s: float = 1.0,
    on_decision: OnDecision | None = None,
) -> grpc.aio.Channel:
    """Return a channel for event loops whose every call goes to the node that is best for it.

    It belongs to the event loop on which it is first used. Closing it ends all that it made.

    Args:
        segments: Names of segments, or open `Segment` objects.
        group: The nodes that can serve the calls.
        policy: Which of them is best; see `shmcoord.Router`.
        router: A router to use instead of making one of `segments`; the caller keeps it.
        credentials: Of the channels to the nodes; without, they are insecure.
        options: Options of the channels to the nodes, as in `grpc.aio.insecure_channel`.
        compression: Of the channels to the nodes.
        interceptors: Of the channels to the nodes: they see each attempt of a call.
        idempotent: Full names of methods (`/package.Service/Method`) that may be executed twice,
            so that a call whose connection breaks is made again elsewhere.
        adopts: Say True if every node of the group adopts leases, as servers of this package do; a
            channel learns it of each node from its first response, so only what breaks before that
            depends on it.
        max_wait_s: How long a call without a deadline waits for capacity (or, with
            `wait_for_ready`, for a node), in seconds.
        connect_timeout_s: How long a call waits for the connection to one node, in seconds.
        on_decision: Called with the decision and the lease before each sending, for logs. An error
            that it raises ends the call.

    Raises:
        TypeError: Neither segments nor a router are given, or both.
        ValueError: A time is negative.
    """
    if (router is None) == (not segments):
        raise TypeError("give either names of segments or router=")
    if not max_wait_s >= 0 or not connect_timeout_s >= 0:
        raise ValueError("max_wait_s and connect_timeout_s must not be negative")
    own = Router(*segments, policy=policy) if router is None else None
    used = router if router is not None else own
    assert used is not None
    legs = Legs() if interceptors else None
    try:
        rules = send_rules(used, adopts, idempotent, None, None)
        links: AioLinks[grpc.aio.Channel] = AioLinks(
            lambda link_channel: link_channel,
            credentials=credentials,
            options=without_retries(options),
            compression=compression,
            interceptors=() if legs is None else around_aio(interceptors, legs),
        )
    except BaseException:
        if own is not None:
            own.close()
        raise
    return RoutedChannel(
        Routes(used, group, rules, links, max_wait_s, connect_timeout_s, on_decision, legs), own
    )


class RoutedChannel(grpc.aio.Channel):
    """A `grpc.aio.Channel` to the best node of a group at each call; made by `channel`."""

    def __init__(self, routes: Routes, own_router: Router | None) -> None:
        self._routes = routes
        self._own_router = own_router

    # --- methods

    def unary_unary(
        self,
        method: str,
        request_serializer: Serializer | None = None,
        response_deserializer: Deserializer | None = None,
        _registered_method: bool | None = False,
    ) -> UnaryUnary:
        """Return what makes calls with one request and one response."""
        return UnaryUnary(
            self._routes, method, request_serializer, response_deserializer, _registered_method
        )

    def unary_stream(
        self,
        method: str,
        request_serializer: Serializer | None = None,
        response_deserializer: Deserializer | None = None,
        _registered_method: bool | None = False,
    ) -> UnaryStream:
        """Return what makes calls with one request and a stream of responses."""
        return UnaryStream(
            self._routes, method, request_serializer, response_deserializer, _registered_method
        )

    def stream_unary(
        self,
        method: str,
        request_serializer: Serializer | None = None,
        response_deserializer: Deserializer | None = None,
        _registered_method: bool | None = False,
    ) -> StreamUnary:
        """Return what makes calls with a stream of requests and one response."""
        return StreamUnary(
            self._routes, method, request_serializer, response_deserializer, _registered_method
        )

    def stream_stream(
        self,
        method: str,
        request_serializer: Serializer | None = None,
        response_deserializer: Deserializer | None = None,
        _registered_method: bool | None = False,
    ) -> StreamStream:
        """Return what makes calls with a stream of requests and one of responses."""
        return StreamStream(
            self._routes, method, request_serializer, response_deserializer, _registered_method
        )

    # --- connectivity

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """Return the state over all nodes: READY if any is connected; see `_aio_state`.

        Args:
            try_to_connect: Begin to connect to each node of the group that has no connection.
        """
        routes = self._routes
        if routes.closed:
            return grpc.ChannelConnectivity.SHUTDOWN
        return state_of(routes, try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Wait until the state is another than the given one."""
        self._routes.check_open()
        pause_s = 0.001
        while self.get_state() is last_observed_state:
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LOOK_EVERY_S)

    async def channel_ready(self) -> None:
        """Wait until a node is connected; connects to all of them."""
        pause_s = 0.001
        while self.get_state(try_to_connect=True) is not grpc.ChannelConnectivity.READY:
            self._routes.check_open()
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LOOK_EVERY_S)

    # --- end

    async def close(self, grace: float | None = None) -> None:
        """Close the channel: new calls are refused, those under way are cancelled. Idempotent.

        Args:
            grace: How long to wait for them to end before, in seconds.
        """
        routes = self._routes
        if routes.closed:
            return
        if grace is not None and grace < 0:
            raise ValueError(f"grace must be non-negative, got {grace}.")
        routes.enter()
        routes.closed = True
        if grace:
            await routes.idle(grace)
        for call in list(routes.waiting):
            call.cancel()
        await routes.links.close()
        if self._own_router is not None:
            self._own_router.close()

    async def __aenter__(self) -> RoutedChannel:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()
