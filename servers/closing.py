"""The end of a server: whoever has no answer yet is told UNAVAILABLE, never CANCELLED.

`grpc.aio.Server.stop` cancels what still runs, and gRPC cancels whatever arrives while it stops:
such clients hear CANCELLED, as if they had ended the call themselves, and a client that retries by
its service config does not retry that. So a server ends in this order:

1. it refuses new requests with UNAVAILABLE, while the old ones finish (draining);
2. what still runs when the grace period is over is ended with UNAVAILABLE by its own handler;
3. when every status is on its way, the socket that listens is closed: a client whose connection
   has just ended connects again at once, and would be there when gRPC cancels;
4. the connections are closed: gRPC tells a client whose connection ends that the server is
   UNAVAILABLE;
5. `stop` then finds nobody to cancel.
"""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import grpc.aio

from servers.links import UNIX

# How often it is looked whether all have their status; in seconds.
_LOOK_S = 0.005
# So often in a row no connection is found before it is believed that there is none.
_QUIET_LOOKS = 3
# gRPC closes a connection that was ended as soon as it sees that; in seconds.
_LONGEST_SEVER_S = 1.0


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
    deafen(endpoint)
    # A thread of gRPC may be just taking a connection, whose descriptor our first look misses.
    quiet, ends = 0, time.monotonic() + _LONGEST_SEVER_S
    while quiet < _QUIET_LOOKS and time.monotonic() < ends:
        quiet = 0 if sever(endpoint) else quiet + 1
        await asyncio.sleep(_LOOK_S)
    await server.stop(None)


def deafen(endpoint: str) -> int:
    """Closes the sockets of this process that listen on an endpoint; how many they were.

    Whoever connects from now on is refused. gRPC keeps the number of the descriptor, behind which
    there is a socket that nobody can reach, and closes that in its time: a socket that is shut down
    it would report as an error.
    """
    closed = 0
    for number, found in _sockets_of(endpoint):
        if _listens(found):
            if endpoint.startswith(UNIX):
                # As gRPC would; and before that, so that it is not the next server's that goes.
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(endpoint.removeprefix(UNIX))
            with socket.socket(found.family, found.type) as nobody:
                os.dup2(nobody.fileno(), number, inheritable=False)
            closed += 1
    return closed


def sever(endpoint: str) -> int:
    """Ends the connections that this process has accepted on an endpoint; how many they were.

    What was written to them before is still delivered.
    """
    ended = 0
    for _, found in _sockets_of(endpoint):
        with contextlib.suppress(OSError):
            if not _listens(found):
                found.getpeername()  # raises for one that was ended before
                found.shutdown(socket.SHUT_RDWR)
                ended += 1
    return ended


def _sockets_of(endpoint: str) -> Iterator[tuple[int, socket.socket]]:
    """Sockets of this process that are bound to an endpoint: number, and a duplicate."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), _duplicate(int(name)) as found:
            if _is_of(found, endpoint):
                yield int(name), found


def _listens(found: socket.socket) -> bool:
    return bool(found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


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
