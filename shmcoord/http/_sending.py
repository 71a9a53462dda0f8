"""What both HTTP transports do that is no I/O: one request's course, its lease and its failures.

Which failure leads to another node follows the rule of `shmcoord.dispatch`: a request that may
have been executed is not sent again, unless its method may be executed twice.

====================================  ======================================  =================
the inner transport raised            it proves                               another node?
====================================  ======================================  =================
`ConnectError`, `ConnectTimeout`      nothing was sent                        yes
(none: 503, `shmcoord-lease-lost`)    the node did nothing                    yes
other `NetworkError`,                 nothing, unless the node adopts leases  if it proves, or if
`RemoteProtocolError`                 and we could free this one              idempotent
anything else                         nothing                                 no
====================================  ======================================  =================

A node has shown that it adopts leases when it has answered with its name in `shmcoord-node`.

A request whose body is a stream that can be read once (a generator, a file) goes nowhere else
once the first byte of it was asked for.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import httpx

from shmcoord.course import Course, NoneReachable, send_rules
from shmcoord.errors import LeaseLost, NoBackend, Saturated, ShmcoordError
from shmcoord.http._common import (
    LEASE_HEADER,
    LEASE_LOST_HEADER,
    NODE_HEADER,
    REFUSED_STATUS,
    node_value,
)
from shmcoord.http._errors import as_http
from shmcoord.router import Router
from shmcoord.transport import ConnectionLost, Unreachable

if TYPE_CHECKING:
    from shmcoord.api import Segment
    from shmcoord.backend import Backend
    from shmcoord.lease import Lease

__all__ = ["IDEMPOTENT", "LIMITS", "AsyncOnce", "Call", "Leased", "Once", "Sender", "tls"]

IDEMPOTENT = ("GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE")
"""The idempotent methods of RFC 9110, section 9.2.2."""

LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=3.0)
"""Of the connections that we open ourselves. Leases limit how many are in use, not the pool; and
we close an idle one before uvicorn does (after 5 s), who would break the request in it."""

tls: Callable[[], ssl.SSLContext] = lru_cache(maxsize=1)(httpx.create_ssl_context)
"""Returns what transports to Unix sockets share: 20 ms and 0.8 MiB, which each would take alone,
and nodes that come and go have many names."""

_LEASE = LEASE_HEADER.decode()
_LEASE_LOST = LEASE_LOST_HEADER.decode()
_NODE = NODE_HEADER.decode()
_MANY = 1024


class Sender:
    """What a transport was told, and what it has learned of the nodes.

    Shared by the threads or tasks that send: `adopters` is only ever added to or emptied, and a
    node that is missing there costs a retry, not more.
    """

    __slots__ = ("adopters", "group", "max_wait_s", "owns_router", "router", "rules")

    def __init__(
        self,
        segments: tuple[str | Segment, ...],
        group: str,
        policy: str,
        router: Router | None,
        idempotent: Collection[str],
        max_wait_s: float,
    ) -> None:
        if not isinstance(group, str):
            raise TypeError(f"group must be a str, not {type(group).__name__}")
        if not max_wait_s >= 0:
            raise ValueError(f"max_wait_s must not be negative, not {max_wait_s}")
        if (router is None) != bool(segments):
            raise ValueError("give either segments or router=")
        self.owns_router = router is None
        self.router = Router(*segments, policy=policy) if router is None else router
        try:
            self.rules = send_rules(self.router, False, idempotent, None, None)
        except BaseException:
            self.close()
            raise
        self.group = group
        self.max_wait_s = max_wait_s
        self.adopters: set[Backend] = set()

    def close(self) -> None:
        """Close the router, if it is ours."""
        if self.owns_router:
            self.router.close()


class Call:
    """The course of one request."""

    __slots__ = ("_asked_s", "_left_s", "_request", "_sender", "_stream", "cost", "course", "key")

    def __init__(
        self, sender: Sender, request: httpx.Request, stream: httpx.ByteStream | Once | AsyncOnce
    ) -> None:
        wishes: Mapping[str, Any] = request.extensions.get("shmcoord") or {}
        self.cost: int = wishes.get("cost", 1)
        self.key: str | bytes | int | None = wishes.get("key")
        rules = sender.rules
        if wishes.get("idempotent"):
            rules = rules._replace(idempotent=(request.method,))
        # Without a time-out: httpx has none for a whole request, so only waiting is limited.
        self.course = Course(rules, sender.group, request.method, None)
        pool_s = (request.extensions.get("timeout") or {}).get("pool")
        self._left_s = sender.max_wait_s if pool_s is None else min(pool_s, sender.max_wait_s)
        self._asked_s = 0.0
        self._sender = sender
        self._request = request
        self._stream = stream

    def wait_s(self) -> float:
        """Return how long the router may wait for capacity now, in seconds."""
        self._asked_s = time.monotonic()
        return self._left_s

    def outgoing(self, lease: Lease) -> httpx.Request:
        """Return the request as it goes to the node."""
        self._left_s = max(0.0, self._left_s - (time.monotonic() - self._asked_s))
        request = self._request
        url = request.url
        extensions = request.extensions
        if not lease.endpoint.startswith("unix:"):
            url = _at(str(url), lease.endpoint)
        if url.scheme == "https" and "sni_hostname" not in extensions:
            # The certificate is the service's, not the endpoint's.
            extensions = {**extensions, "sni_hostname": request.url.host}
        outgoing = httpx.Request(
            request.method,
            url,
            headers=request.headers,
            stream=self._stream,
            extensions=extensions,
        )
        outgoing.headers[_LEASE] = lease.token
        return outgoing

    def no_lease(self, error: NoBackend | Saturated) -> Exception:
        """Return what the caller shall see when the router gave no lease."""
        return as_http(self.course.no_lease(error), self._sender.router, self._sender.group)

    def is_refused(self, lease: Lease, response: httpx.Response) -> bool:
        """Whether whoever serves at the node's endpoint could not adopt the lease.

        The answer repeats the lease, so that one which a gateway copied from elsewhere is not
        taken for a proof.
        """
        return (
            response.status_code == REFUSED_STATUS
            and _LEASE_LOST in response.headers
            and response.headers.get(_LEASE) == lease.token
        )

    def served(self, lease: Lease, response: httpx.Response) -> None:
        """Note what a response tells of its node, and name the node in it."""
        adopters = self._sender.adopters
        if (
            lease.backend not in adopters
            # Its own name: a gateway may copy that of another.
            and response.headers.get(_NODE) == node_value(lease.node)
        ):
            if len(adopters) >= _MANY:  # nodes come and go
                adopters.clear()
            adopters.add(lease.backend)
        response.extensions["shmcoord_node"] = lease.node

    def leave(self, lease: Lease, error: BaseException) -> bool:
        """Give the lease back after a failure; tell if the request may be sent elsewhere.

        Raises:
            NoBackend: Nothing was executed, and nothing more can be tried.
        """
        cause = _cause(error)
        gone = not isinstance(self._stream, httpx.ByteStream) and self._stream.begun
        if cause is None or gone:
            lease.release()
            if isinstance(cause, LeaseLost):
                text = f"{lease.node} refused the lease ({error}), and the body can be sent once"
                raise as_http(NoBackend(text), self._sender.router, self._sender.group) from error
            return False
        adopts = lease.backend in self._sender.adopters
        try:
            if not self.course.leave(lease, cause, adopts):
                return False
        except NoneReachable as spent:
            raise as_http(spent, self._sender.router, self._sender.group) from error
        if isinstance(cause, ConnectionLost):
            # It was reached; most often it has just closed a connection that was idle. A dead
            # one refuses the next connection.
            self._sender.router.mark_reachable(lease.backend)
        return True


class Leased:
    """What holds a lease until it ends, fails, is closed or dropped."""

    def __init__(self, lease: Lease) -> None:
        self._lease: Lease | None = lease  # released at the latest when it is collected

    def _release(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            with suppress(ShmcoordError):  # in the child of a fork it is the parent's lease
                lease.release()


def _moved(url: str, endpoint: str) -> httpx.URL:
    return httpx.URL(url).copy_with(netloc=endpoint.encode())


# It takes httpx 15 us to make a URL of another, and most clients ask for few.
_at: Callable[[str, str], httpx.URL] = lru_cache(maxsize=256)(_moved)


def _cause(error: BaseException) -> LeaseLost | Unreachable | ConnectionLost | None:
    """What a failure proves; None: nothing, and it is the caller's."""
    if isinstance(error, LeaseLost):
        return error
    if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
        return Unreachable(f"{type(error).__name__}: {error}")
    if isinstance(error, (httpx.NetworkError, httpx.RemoteProtocolError)):
        return ConnectionLost(f"{type(error).__name__}: {error}")
    return None


class Once(httpx.SyncByteStream):
    """A request body that can be read once, and whether that has begun."""

    __slots__ = ("_stream", "begun")

    def __init__(self, stream: httpx.SyncByteStream) -> None:
        self._stream = stream
        self.begun = False

    def __iter__(self) -> Iterator[bytes]:
        self.begun = True
        yield from self._stream

    def close(self) -> None:
        """Close it."""
        self._stream.close()


class AsyncOnce(httpx.AsyncByteStream):
    """The same for an event loop."""

    __slots__ = ("_stream", "begun")

    def __init__(self, stream: httpx.AsyncByteStream) -> None:
        self._stream = stream
        self.begun = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        self.begun = True
        async for part in self._stream:
            yield part

    async def aclose(self) -> None:
        """Close it."""
        await self._stream.aclose()
