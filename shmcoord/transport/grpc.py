"""Transports over gRPC, and the two things that a gRPC server does with a lease.

The method of a call is the name of a method of the generated stub:

    dispatcher = Dispatcher(router, GrpcTransport(stub=NodeStub), adopts=True)
    answer = dispatcher.call("GREEN", "Answer", AnswerRequest(...), timeout_s=2.0)

The lease token travels in the metadata, and the server takes it from there:

    def Answer(self, request, context):
        token = lease_token(context)  # None from a client that knows nothing of shmcoord
        try:
            work = node.adopt(token) if token else node.request()
        except LeaseLost:
            refuse_lost_lease(context)
        with work:
            ...

There is one channel per endpoint, made at the first call and kept while it is connected. A call
goes out only on a connected channel; if none can be had, certainly nothing was sent and the call
is `Unreachable`. Status UNAVAILABLE after that is a `ConnectionLost`, which is a `grpc.RpcError`
as well; every other error is the `grpc.RpcError` (`grpc.aio.AioRpcError`) as it came.

A channel is used for one connection: when that ends, the next call makes a new channel, and the
old one is closed as soon as the calls on it have ended (a node that drains still answers them).
So there is no back-off left from earlier attempts: a node that is gone is noticed at once, and
so is one that is back.
"""

from __future__ import annotations

from typing import Any, NoReturn

try:
    import grpc
    import grpc.aio
except ModuleNotFoundError as _missing:
    raise ModuleNotFoundError(
        "shmcoord.transport.grpc needs grpcio: pip install shmcoord[grpc]", name=_missing.name
    ) from _missing

from shmcoord.transport._grpc_asyncio import AsyncGrpcTransport
from shmcoord.transport._grpc_common import (
    LEASE_KEY,
    LEASE_LOST_KEY,
    REFUSED,
    AioGrpcConnectionLost,
    GrpcConnectionLost,
    token_in,
)
from shmcoord.transport._grpc_threads import GrpcTransport

__all__ = [
    "LEASE_KEY",
    "LEASE_LOST_KEY",
    "AioGrpcConnectionLost",
    "AsyncGrpcTransport",
    "GrpcConnectionLost",
    "GrpcTransport",
    "lease_token",
    "refuse_lost_lease",
    "refuse_lost_lease_async",
]


def lease_token(context: Any) -> str | None:
    """Return the lease token that came with a request, or None if it has none.

    Args:
        context: The servicer context of the request, of a threaded server or of grpc.aio.
    """
    return token_in(context.invocation_metadata())


def refuse_lost_lease(context: grpc.ServicerContext) -> NoReturn:
    """End a request whose lease was lost; nothing of it may have been done.

    The router's side then raises `LeaseLost`, and its dispatcher tries another node.
    """
    context.set_trailing_metadata(((LEASE_LOST_KEY, lease_token(context) or ""),))
    context.abort(grpc.StatusCode.FAILED_PRECONDITION, REFUSED)


async def refuse_lost_lease_async(context: grpc.aio.ServicerContext[Any, Any]) -> NoReturn:
    """End a request of a grpc.aio server whose lease was lost; as `refuse_lost_lease`."""
    trailing = ((LEASE_LOST_KEY, lease_token(context) or ""),)
    await context.abort(grpc.StatusCode.FAILED_PRECONDITION, REFUSED, trailing)
