"""What a stub of an aio channel calls: one object per method, which makes routed calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from shmcoord.grpc._aio_calls import (
    StreamStreamCall,
    StreamUnaryCall,
    UnaryStreamCall,
    UnaryUnaryCall,
)

if TYPE_CHECKING:
    from shmcoord.grpc._aio_routes import Routes
    from shmcoord.transport._grpc_aio_links import AioLink

__all__ = ["RoutedMethod", "StreamStream", "StreamUnary", "UnaryStream", "UnaryUnary"]


class RoutedMethod:
    """One method of a service, on whatever link.

    Attributes:
        routes: Of the channel.
        name: `/package.Service/Method`.
        reals: grpcio's objects for the method, by link.
    """

    _kind = ""  # the name of the channel's method

    def __init__(
        self,
        routes: Routes,
        name: str,
        request_serializer: Callable[[Any], bytes] | None,
        response_deserializer: Callable[[bytes], Any] | None,
        registered: bool | None,
    ) -> None:
        self.routes = routes
        self.name = name
        self._codec = (request_serializer, response_deserializer)
        # Generated stubs say so, of methods whose handles grpcio may keep.
        self._options = {"_registered_method": registered} if registered else {}
        self.reals: dict[AioLink[grpc.aio.Channel], Any] = {}

    def on(self, link: AioLink[grpc.aio.Channel]) -> Any:
        """Return grpcio's object for the method on a link, made once per link."""
        real = self.reals.get(link)
        if real is None:
            self.reals = {kept: of for kept, of in self.reals.items() if not kept.closed}
            make = getattr(link.channel, self._kind)
            real = self.reals[link] = make(self.name, *self._codec, **self._options)
        return real


class UnaryUnary(RoutedMethod, grpc.aio.UnaryUnaryMultiCallable[Any, Any]):
    """Makes calls with one request and one response."""

    _kind = "unary_unary"

    def __call__(
        self,
        request: Any,
        *,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> UnaryUnaryCall:
        """Begin a call; arguments as those of grpcio."""
        return UnaryUnaryCall(
            self, request, timeout, metadata, credentials, wait_for_ready, compression
        )


class UnaryStream(RoutedMethod, grpc.aio.UnaryStreamMultiCallable[Any, Any]):
    """Makes calls with one request and a stream of responses."""

    _kind = "unary_stream"

    def __call__(
        self,
        request: Any,
        *,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> UnaryStreamCall:
        """Begin a call; arguments as those of grpcio."""
        return UnaryStreamCall(
            self, request, timeout, metadata, credentials, wait_for_ready, compression
        )


class StreamUnary(RoutedMethod, grpc.aio.StreamUnaryMultiCallable[Any, Any]):
    """Makes calls with a stream of requests and one response."""

    _kind = "stream_unary"

    def __call__(
        self,
        request_iterator: Any = None,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> StreamUnaryCall:
        """Begin a call; arguments as those of grpcio."""
        return StreamUnaryCall(
            self, request_iterator, timeout, metadata, credentials, wait_for_ready, compression
        )


class StreamStream(RoutedMethod, grpc.aio.StreamStreamMultiCallable[Any, Any]):
    """Makes calls with a stream of requests and one of responses."""

    _kind = "stream_stream"

    def __call__(
        self,
        request_iterator: Any = None,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> StreamStreamCall:
        """Begin a call; arguments as those of grpcio."""
        return StreamStreamCall(
            self, request_iterator, timeout, metadata, credentials, wait_for_ready, compression
        )
