"""The out-of-band service of load reports: `xds.service.orca.v3.OpenRcaService`.

A client asks once and gets a report per interval (gRFC A51). On a threaded server each stream has a
thread of its own that is not the server's, so that it occupies no worker; it runs in gRPC's
non-blocking form, as grpcio's own health service does.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from shmcoord.errors import ShmcoordError
from shmcoord.grpc._membership import Membership
from shmcoord.grpc._orca import LoadReport, ReportRequest, interval_of

__all__ = ["aio_handler", "handler"]

_SERVICE = "xds.service.orca.v3.OpenRcaService"
_METHOD = "StreamCoreMetrics"
# Streams at once; each of a threaded server is a thread.
_MOST_STREAMS = 64


def _handler(behavior: Callable[..., Any]) -> grpc.GenericRpcHandler:
    method = grpc.unary_stream_rpc_method_handler(
        behavior,
        request_deserializer=ReportRequest.FromString,
        response_serializer=LoadReport.SerializeToString,
    )
    return grpc.method_handlers_generic_handler(_SERVICE, {_METHOD: method})


def _report(membership: Membership) -> Any:
    """The report of this moment; None if there is none (any more)."""
    reporter = membership.reporter
    if reporter is None:
        return None
    try:
        return reporter.report()
    except (ShmcoordError, ValueError):  # it has left
        return None


def handler(membership: Membership) -> grpc.GenericRpcHandler:
    """Return the service for a threaded server."""
    places = threading.BoundedSemaphore(_MOST_STREAMS)

    def stream(request: Any, context: grpc.ServicerContext, send: Callable[[Any], None]) -> None:
        if not places.acquire(blocking=False):
            context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"more than {_MOST_STREAMS} report streams"
            )
        over = threading.Event()
        if not context.add_callback(over.set):
            over.set()
        interval_s = interval_of(request)

        def report() -> None:
            try:
                while not over.is_set() and (found := _report(membership)) is not None:
                    send(found)
                    over.wait(interval_s)
                if not over.is_set():
                    send(None)  # the end of the stream
            finally:
                places.release()

        try:
            threading.Thread(target=report, name="shmcoord-reports", daemon=True).start()
        except RuntimeError:  # no thread is left
            places.release()
            raise

    stream.experimental_non_blocking = True  # type: ignore[attr-defined]
    return _handler(stream)


def aio_handler(membership: Membership) -> grpc.GenericRpcHandler:
    """Return the service for an event loop."""
    open_streams = 0

    async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
        nonlocal open_streams
        if open_streams >= _MOST_STREAMS:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"more than {_MOST_STREAMS} report streams"
            )
        open_streams += 1
        try:
            interval_s = interval_of(request)
            while (found := _report(membership)) is not None:
                yield found
                await asyncio.sleep(interval_s)
        finally:
            open_streams -= 1

    return _handler(stream)
