"""The end of a server: whoever has no answer yet is told UNAVAILABLE, never CANCELLED.

`grpc.aio.Server.stop` cancels what still runs, and gRPC cancels whatever arrives while it stops:
such clients hear CANCELLED, as if they had ended the call themselves, and a client that retries by
its service config does not retry that. So a server ends in this order:

1. it refuses new requests with UNAVAILABLE, while the old ones finish (draining);
2. what still runs when the grace period is over is ended with UNAVAILABLE by its own handler;
3. when every status is on its way, the connections are closed: gRPC tells a client whose
   connection ends that the server is UNAVAILABLE;
4. `stop` then finds nobody to cancel.
"""

import asyncio
import contextlib
import os
import socket
import time
from typing import Any

import grpc.aio

from servers.links import UNIX

# How often it is looked whether all have their status; in seconds.
_LOOK_S = 0.005


class Calls:
    """Calls that were taken and whose status has not been sent yet.

    A handler has ended before a slow client has taken in its last responses.
    """

    def __init__(self) -> None:
        self.open = 0

    def enter(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Counts a call until gRPC is done with it, which is later than the end of its handler."""
        self.open += 1
        context.add_done_callback(self._done)  # type: ignore[arg-type]  # a class in the stubs

    def _done(self, _context: object) -> None:
        self.open -= 1

    async def told(self, limit_s: float) -> bool:
        """Waits until every call has its status, at most for `limit_s` seconds; whether so."""
        ends = time.monotonic() + limit_s
        while self.open > 0 and time.monotonic() < ends:
            await asyncio.sleep(_LOOK_S)
        return self.open == 0


async def close(server: grpc.aio.Server, endpoint: str) -> None:
    """Closes all connections of a server that has refused new requests, then stops it.

    Args:
        server: listens on `endpoint` alone.
        endpoint: `host:port` or `unix:path`.
    """
    sever(endpoint)
    await server.stop(None)


def sever(endpoint: str) -> int:
    """Ends the connections that this process has accepted on an endpoint; how many they were.

    What was written to them before is still delivered.
    """
    severed = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), _duplicate(int(name)) as connection:
            if _is_of(connection, endpoint):
                connection.getpeername()  # raises for the one that listens
                connection.shutdown(socket.SHUT_RDWR)
                severed += 1
    return severed


def _duplicate(descriptor: int) -> socket.socket:
    """Another descriptor of a socket; OSError if it is none, or closed meanwhile."""
    copy = os.dup(descriptor)
    try:
        return socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise


def _is_of(connection: socket.socket, endpoint: str) -> bool:
    """Whether it is one of a server on that endpoint."""
    address = connection.getsockname()
    if connection.family == socket.AF_UNIX:
        return endpoint.startswith(UNIX) and address == endpoint.removeprefix(UNIX)
    if connection.family in (socket.AF_INET, socket.AF_INET6):
        return not endpoint.startswith(UNIX) and str(address[1]) == endpoint.rpartition(":")[2]
    return False
