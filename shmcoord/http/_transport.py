"""`Transport`: an `httpx.Client` sends each request to the node that the router picks."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

import httpx

from shmcoord.errors import LeaseLost, NoBackend, Saturated
from shmcoord.http._sending import IDEMPOTENT, LIMITS, Call, Leased, Once, Sender, tls

if TYPE_CHECKING:
    from shmcoord.api import Segment
    from shmcoord.lease import Lease
    from shmcoord.router import Router

__all__ = ["Transport"]


class Transport(httpx.BaseTransport):
    """Sends each request to a node of a group, with a lease.

        client = httpx.Client(transport=shmcoord.http.Transport("shm_host1", group="GREEN"))
        client.get("http://green/path")

    The URL's host names nothing real: it becomes the `Host` header, and under `https` the name
    that the node's certificate must have; the connection goes to the endpoint of the picked node.
    For several groups, mount a transport for each:
    `httpx.Client(mounts={"http://green": Transport("shm_host1", group="GREEN"), ...})`.

    While every node is at its capacity a request waits for httpx's *pool* time-out, which means
    just that: waiting for a connection to be free (5 s by default). The other time-outs keep
    their meaning. The lease is given back when the response is read to its end or closed.

    `request.extensions["shmcoord"]` may hold `cost` (units of capacity that the request takes),
    `key` (for the policy `affinity`) and `idempotent` (True: this one may be executed twice);
    `response.extensions["shmcoord_node"]` names the node that served. It may be used by several
    threads at once.
    """

    def __init__(
        self,
        *segments: str | Segment,
        group: str,
        policy: str = "least-loaded",
        router: Router | None = None,
        transport: httpx.BaseTransport | None = None,
        idempotent: Collection[str] = IDEMPOTENT,
        max_wait_s: float = 3600.0,
    ) -> None:
        """Make a transport; nothing is connected yet.

        Args:
            segments: Names of segments, or open ones.
            group: The nodes that can serve the requests.
            policy: By which rule a node is picked.
            router: Picks instead, and is not closed; then no segments are given.
            transport: Carries the requests, for instance with TLS settings; closed with this one.
                By default an `httpx.HTTPTransport` whose pool sets no limit, since leases do.
                Endpoints "unix:path" are reached by the default one only.
            idempotent: Methods that may be executed twice, and so are sent to another node after
                a broken connection; by default those of RFC 9110, section 9.2.2.
            max_wait_s: How long a request without pool time-out waits for capacity, and the most
                that any waits, in seconds.

        Raises:
            ValueError: Both segments and a router were given, or neither.
        """
        self._sender = Sender(segments, group, policy, router, idempotent, max_wait_s)
        self._unix: dict[str, httpx.BaseTransport] | None = {} if transport is None else None
        self._opening = threading.Lock()
        self._inner = httpx.HTTPTransport(limits=LIMITS) if transport is None else transport

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request.

        Raises:
            shmcoord.http.Saturated: All nodes were at capacity; also an `httpx.PoolTimeout`.
            shmcoord.http.NoBackend: There is no node; also an `httpx.ConnectError`. As
                `shmcoord.http.NoneReachable` after nodes were tried in vain.
            httpx.TransportError: What the inner transport raised.
        """
        stream = request.stream
        assert isinstance(stream, httpx.SyncByteStream)
        sender = self._sender
        call = Call(
            sender, request, stream if isinstance(stream, httpx.ByteStream) else Once(stream)
        )
        while True:
            try:
                lease = sender.router.acquire(
                    sender.group,
                    call.wait_s(),
                    call.cost,
                    key=call.key,
                    exclude=call.course.exclude,
                )
            except (NoBackend, Saturated) as error:
                raise call.no_lease(error) from call.course.last_error()
            try:
                response = self._to(lease.endpoint).handle_request(call.outgoing(lease))
                if call.is_refused(lease, response):
                    with suppress(httpx.HTTPError):
                        response.read()  # so that the connection can be used again
                    response.close()
                    raise LeaseLost(f"{lease.node} refused the lease")
                call.served(lease, response)
            except BaseException as error:
                if not call.leave(lease, error):
                    raise
                continue
            if response.is_closed:  # a transport of a test may have read it already
                lease.release()
            else:
                assert isinstance(response.stream, httpx.SyncByteStream)
                response.stream = _Leased(response.stream, lease)
            return response

    def close(self) -> None:
        """Close the router if it is our own, and all connections."""
        try:
            self._inner.close()
            for transport in (self._unix or {}).values():
                transport.close()
        finally:
            self._sender.close()

    def _to(self, endpoint: str) -> httpx.BaseTransport:
        """The transport that reaches an endpoint: httpx has one per Unix socket."""
        if not endpoint.startswith("unix:"):
            return self._inner
        if self._unix is None:
            raise httpx.UnsupportedProtocol(f"the transport that was given cannot reach {endpoint}")
        path = endpoint.removeprefix("unix:")
        with self._opening:
            if path not in self._unix:
                self._unix[path] = httpx.HTTPTransport(tls(), limits=LIMITS, uds=path)
            return self._unix[path]


class _Leased(Leased, httpx.SyncByteStream):
    """A response body."""

    def __init__(self, stream: httpx.SyncByteStream, lease: Lease) -> None:
        super().__init__(lease)
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        try:
            yield from self._stream
        except Exception:
            self._release()
            raise
        self._release()

    def close(self) -> None:
        try:
            self._stream.close()
        finally:
            self._release()
