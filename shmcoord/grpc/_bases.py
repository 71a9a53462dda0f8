"""gRPC's abstract classes with their types, which they have for type checkers only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc

__all__ = ["CallFuture", "StreamStream", "StreamUnary", "UnaryStream", "UnaryUnary"]

if TYPE_CHECKING:

    class CallFuture(grpc.Call, grpc.Future[Any]):
        """A call that is a future."""

    UnaryUnary = grpc.UnaryUnaryMultiCallable[Any, Any]
    UnaryStream = grpc.UnaryStreamMultiCallable[Any, Any]
    StreamUnary = grpc.StreamUnaryMultiCallable[Any, Any]
    StreamStream = grpc.StreamStreamMultiCallable[Any, Any]
else:

    class CallFuture(grpc.Call, grpc.Future):
        """A call that is a future."""

    UnaryUnary = grpc.UnaryUnaryMultiCallable
    UnaryStream = grpc.UnaryStreamMultiCallable
    StreamUnary = grpc.StreamUnaryMultiCallable
    StreamStream = grpc.StreamStreamMultiCallable
