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
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

__all__ = ["LOOK_S", "Listeners", "hang_up"]

LOOK_S = 0.005
"""How often it is looked whether something has ended, in seconds."""

# So often in a row no connection is found before it is believed that there is none.
_QUIET_LOOKS = 3
# gRPC closes a connection that was ended as soon as it sees that; in seconds.
_LONGEST_SEVER_S = 1.0
_ANY = ("0.0.0.0", "::")
# Of who opens a port: what listens then and did not before, is his.
_opening = threading.Lock()


class _Name(NamedTuple):
    """Where a stream socket is bound; `port` is 0 for a Unix socket."""

    family: int
    address: str | bytes
    port: int


class Listeners:
    """The sockets by which one server listens, known by their inodes.

    The address would not do: other sockets of this process may have the same port, on another
    address or (`SO_REUSEPORT`) even on the same.
    """

    def __init__(self) -> None:
        self.names: dict[int, _Name] = {}
        # Connections that were there before: an earlier server's at the same address.
        self._earlier: set[int] = set()

    def open(self, add: Callable[[], int]) -> int:
        """Return the port that `add` has opened, and remember what listens there."""
        with _opening:
            before = {inode for _, inode, _ in _sockets()}
            port = add()
            for _, inode, found in _sockets():
                name = _name(found)
                # A Unix socket has no port; gRPC then says 1.
                if inode not in before and _listens(found) and name.port in (port, 0):
                    self.names[inode] = name
            self._earlier |= before
        return port

    def deafen(self) -> None:
        """Close them.

        Whoever connects from now on is refused. gRPC keeps the number of the descriptor, behind
        which there is a socket that nobody can reach, and closes that in its time: a socket that is
        shut down it would report as an error.
        """
        for number, inode, found in _sockets():
            if inode not in self.names or not _listens(found):
                continue
            name = self.names[inode]
            if name.family == socket.AF_UNIX and isinstance(name.address, str):
                # As gRPC would; and before that, so that it is not the next server's that goes.
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name.address)
            with socket.socket(found.family, found.type) as nobody:
                os.dup2(nobody.fileno(), number, inheritable=False)

    def sever(self) -> int:
        """End the connections that were accepted here; return how many they were.

        What was written to them before is still delivered. The kernel does not tell which socket
        has accepted a connection. So where another one of this process listens at the very same
        address, none is ended here: gRPC does that, in its own way.
        """
        others, accepted = [], []
        ended = 0
        with contextlib.ExitStack() as copies:
            for _, inode, found in _sockets():
                if _listens(found):
                    if inode not in self.names:
                        others.append(_name(found))
                elif inode not in self._earlier:
                    accepted.append(copies.enter_context(_duplicate(found.fileno())))
            for connection in accepted:
                with contextlib.suppress(OSError):
                    connection.getpeername()  # raises for one that was ended before
                    if self._has_accepted(_name(connection), others):
                        connection.shutdown(socket.SHUT_RDWR)
                        ended += 1
        return ended

    def _has_accepted(self, name: _Name, others: list[_Name]) -> bool:
        """Whether it was one of these that took a connection, and not one of the others."""
        mine = self.names.values()
        if name in mine or name in others:  # exact before any address
            return name in mine and name not in others
        of_all = [_Name(name.family, address, name.port) for address in _ANY]
        return any(one in mine for one in of_all) and not any(one in others for one in of_all)


def hang_up(listeners: Listeners) -> Iterator[float]:
    """Close what listens, and every connection that was accepted there: steps 3 and 4.

    Yields:
        Seconds to sleep before the next step.
    """
    listeners.deafen()
    # A thread of gRPC may be just taking a connection, whose descriptor our first look misses.
    quiet, ends = 0, time.monotonic() + _LONGEST_SEVER_S
    while quiet < _QUIET_LOOKS and time.monotonic() < ends:
        quiet = 0 if listeners.sever() else quiet + 1
        yield LOOK_S


def _sockets() -> Iterator[tuple[int, int, socket.socket]]:
    """The stream sockets of this process: number of the descriptor, inode, and a duplicate."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), _duplicate(int(name)) as found:
            if found.type == socket.SOCK_STREAM:
                yield int(name), os.fstat(found.fileno()).st_ino, found


def _duplicate(descriptor: int) -> socket.socket:
    """Another descriptor of a socket; OSError if it is none, or closed meanwhile."""
    copy = os.dup(descriptor)
    try:
        return socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise


def _listens(found: socket.socket) -> bool:
    return bool(found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _name(found: socket.socket) -> _Name:
    name = found.getsockname()
    if found.family in (socket.AF_INET, socket.AF_INET6):
        return _Name(found.family, name[0], name[1])
    return _Name(found.family, name if isinstance(name, (str, bytes)) else "", 0)
