"""How a request reaches a node: the protocol that every transport follows.

A dispatcher decides *where* a request goes (it asks a router for a lease); a transport only
carries it there. Two are included, `shmcoord.transport.local` (plain callables) and
`shmcoord.transport.grpc`. To write another, implement `Transport` or `AsyncTransport`: no base
class is needed, the methods are enough. What a transport raises tells the dispatcher whether
the request may be sent to another node:

========================  =======================================  =========================
raised                    it states                                the dispatcher
========================  =======================================  =========================
`Unreachable`             nothing of the request left us           tries another node
`shmcoord.LeaseLost`      the node refused before doing anything   tries another node
`ConnectionLost`          the connection broke, and the node may   tries another node only if
                          have received the request                nodes adopt their leases and
                                                                   this one had not been
anything else             the request may have been executed       passes it on
========================  =======================================  =========================

So: raise `Unreachable` only when it is certain, and when in doubt anything else. A request is
never sent twice on a guess.

The lease token is ASCII text of at most a few dozen characters, fit for a header. A transport
passes it on unread, and the node gives it to `node.adopt(token)`. A transport is used by many
calls at the same time: a `Transport` from several threads, an `AsyncTransport` from several
tasks of one event loop. It keeps no record of leases: acquiring and releasing is the
dispatcher's work.
"""

from collections.abc import AsyncIterator
from typing import Any, Protocol, runtime_checkable

from shmcoord.errors import ShmcoordError

__all__ = ["AsyncTransport", "ConnectionLost", "Transport", "Unreachable"]


class Unreachable(ShmcoordError):
    """The node could not be reached, and certainly nothing of the request was sent to it."""


class ConnectionLost(ShmcoordError):
    """The connection failed, and the node may or may not have received the request.

    Raise it `from` the error that the network library gave.
    """


@runtime_checkable
class Transport(Protocol):
    """Carries requests from the calling thread."""

    def send(
        self, endpoint: str, method: str, request: Any, *, lease: str, timeout_s: float | None
    ) -> Any:
        """Send one request and return its response.

        Args:
            endpoint: Address of the node, as it was given to `segment.join`.
            method: Name of what the node shall do; its meaning is the transport's own.
            request: Whatever the caller gave to the dispatcher.
            lease: The lease token, to be handed to the node beside the request.
            timeout_s: Time that is left for this call, in seconds; None means no limit. The
                transport enforces it, connecting included.

        Raises:
            Unreachable: Certainly nothing was sent.
            shmcoord.LeaseLost: The node refused the lease before it did anything.
            ConnectionLost: The connection failed after something may have been sent.
            TimeoutError: `timeout_s` is over (or the network library's own error for it).
            Exception: Anything else the node or the network answered; passed on to the caller.
        """
        ...

    def close(self) -> None:
        """Give back all connections. Called once, by the owner of the transport."""
        ...


@runtime_checkable
class AsyncTransport(Protocol):
    """Carries requests on an event loop.

    A cancelled call must stop what it has under way and let `asyncio.CancelledError` through.
    """

    async def send(
        self, endpoint: str, method: str, request: Any, *, lease: str, timeout_s: float | None
    ) -> Any:
        """Send one request and return its response; arguments and errors as in `Transport`."""
        ...

    def stream(
        self, endpoint: str, method: str, request: Any, *, lease: str, timeout_s: float | None
    ) -> AsyncIterator[Any]:
        """Send one request and return an iterator over its responses.

        An `async def` with `yield` is the usual way to write it. Errors as in `Transport.send`,
        raised by the iterator; those before the first response decide about another node, later
        ones are passed on. `timeout_s` covers the whole stream. If the iterator has an
        `aclose()` method (generators do), it is awaited when the stream is given up early, and
        must stop the node's work.
        """
        ...

    async def close(self) -> None:
        """Give back all connections. Called once, by the owner of the transport."""
        ...
