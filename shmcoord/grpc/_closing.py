"""The end of a server: whoever has no answer yet is told UNAVAILABLE, never CANCELLED.

gRPC's own `stop` cancels what still runs, and gRPC cancels whatever arrives while it stops: such
clients hear CANCELLED, as if they had ended the call themselves, and a client that retries by its
service config does not retry that. So a server ends in this order:

1. it refuses new requests with UNAVAILABLE, while the old ones finish (draining);
2. what still runs when the grace period is over is ended with UNAVAILABLE by its own handler where
   that can be (on an event loop);
3. when every status is on its way, the socket that listens is closed: a client whose connection
   has just ended connects again at once, and would be there when gRPC cancels;
4. the connections are closed: gRPC tells a client whose connection ends that the server is
   UNAVAILABLE;
5. `stop` then finds nobody to cancel.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterable, Iterator

__all__ = ["LOOK_S", "hang_up"]

LOOK_S = 0.005
"""How often it is looked whether something has ended, in seconds."""

_UNIX = "unix:"
_ABSTRACT = "unix-abstract:"
# So often in a row no connection is found before it is believed that there is none.
_QUIET_LOOKS = 3
# gRPC closes a connection that was ended as soon as it sees that; in seconds.
_LONGEST_SEVER_S = 1.0


def hang_up(endpoints: Iterable[str]) -> Iterator[float]:
    """Close what listens on the endpoints and every connection there: steps 3 and 4.

    Args:
        endpoints: `host:port` or `unix:path`; this process alone serves them.

    Yields:
        Seconds to sleep before the next step.
    """
    addresses = [_address(endpoint) for endpoint in endpoints]
    _deafen(addresses)
    # A thread of gRPC may be just taking a connection, whose descriptor our first look misses.
    quiet, ends = 0, time.monotonic() + _LONGEST_SEVER_S
    while quiet < _QUIET_LOOKS and time.monotonic() < ends:
        quiet = 0 if _sever(addresses) else quiet + 1
        yield LOOK_S


def _address(endpoint: str) -> int | str | bytes:
    """A port; or where a Unix socket is bound, as `getsockname` tells it."""
    if endpoint.startswith(_ABSTRACT):
        return b"\0" + endpoint.removeprefix(_ABSTRACT).encode()
    if endpoint.startswith(_UNIX):
        path = endpoint.removeprefix(_UNIX)
        return "/" + path.lstrip("/") if path.startswith("//") else path
    return int(endpoint.rpartition(":")[2])


def _deafen(addresses: list[int | str | bytes]) -> int:
    """Close the sockets of this process that listen; return how many they were.

    Whoever connects from now on is refused. gRPC keeps the number of the descriptor, behind which
    there is a socket that nobody can reach, and closes that in its time: a socket that is shut down
    it would report as an error.
    """
    closed = 0
    for number, found in _sockets_of(addresses):
        if _listens(found):
            name = found.getsockname() if found.family == socket.AF_UNIX else None
            if isinstance(name, str):
                # As gRPC would; and before that, so that it is not the next server's that goes.
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name)
            with socket.socket(found.family, found.type) as nobody:
                os.dup2(nobody.fileno(), number, inheritable=False)
            closed += 1
    return closed


def _sever(addresses: list[int | str | bytes]) -> int:
    """End the connections that this process has accepted there; return how many they were.

    What was written to them before is still delivered.
    """
    ended = 0
    for _, found in _sockets_of(addresses):
        with contextlib.suppress(OSError):
            if not _listens(found):
                found.getpeername()  # raises for one that was ended before
                found.shutdown(socket.SHUT_RDWR)
                ended += 1
    return ended


def _sockets_of(addresses: list[int | str | bytes]) -> Iterator[tuple[int, socket.socket]]:
    """Sockets of this process that are bound to one of the addresses: number, and a duplicate."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), _duplicate(int(name)) as found:
            if _is_of(found, addresses):
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


def _is_of(connection: socket.socket, addresses: list[int | str | bytes]) -> bool:
    """Whether it is one of a server on one of the addresses."""
    name = connection.getsockname()
    if connection.family == socket.AF_UNIX:
        return name in addresses
    if connection.family in (socket.AF_INET, socket.AF_INET6):
        return name[1] in addresses
    return False
