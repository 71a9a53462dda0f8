"""`AsyncTransport`: an `httpx.AsyncClient` sends each request to the node that the router picks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import suppress
from typing import TYPE_CHECKING

import httpx

from shmcoord.errors import LeaseLost, NoBackend, Saturated
from shmcoord.http._sending import IDEMPOTENT, LIMITS, AsyncOnce, Call, Leased, Sender, tls

if TYPE_CHECKING:
    from shmcoord.api import Segment
    from shmcoord.lease import Lease
    from shmcoord.router import Router

__all__ = ["AsyncTransport"]


class AsyncTransport(httpx.AsyncBaseTransport):
    """The same as `Transport`, for the tasks of one event loop of asyncio.

    client = httpx.AsyncClient(transport=shmcoord.http.AsyncTransport("shm_host1", group="GREEN"))
    """

    def __init__(
        self,
        *segments: str | Segment,
        group: str,
        policy: str = "least-loaded",
        router: Router | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        idempotent: Collection[str] = IDEMPOTENT,
        max_wait_s: float = 3600.0,
    ) -> None:
        """Make a transport; arguments as those of `Transport`.

        It belongs to the event loop in which it is first used.
        """
        self._sender = Sender(segments, group, policy, router, idempotent, max_wait_s)
        self._unix: dict[str, httpx.AsyncBaseTransport] | None = {} if transport is None else None
        self._inner = httpx.AsyncHTTPTransport(limits=LIMITS) if transport is None else transport
        self._loop: asyncio.AbstractEventLoop | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request; errors as those of `Transport`.

        Raises:
            RuntimeError: It is used in another event loop than before.
        """
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._loop is not None:
                raise RuntimeError(
                    "an AsyncTransport serves one event loop, since its connections belong to it: "
                    "make a client for each loop"
                )
            self._loop = loop
        stream = request.stream
        assert isinstance(stream, httpx.AsyncByteStream)
        sender = self._sender
        call = Call(
            sender, request, stream if isinstance(stream, httpx.ByteStream) else AsyncOnce(stream)
        )
        while True:
            try:
                lease = await sender.router.acquire_async(
                    sender.group,
                    call.wait_s(),
                    call.cost,
                    key=call.key,
                    exclude=call.course.exclude,
                )
            except (NoBackend, Saturated) as error:
                raise call.no_lease(error) from call.course.last_error()
            try:
                outgoing = call.outgoing(lease)
                response = await self._to(lease.endpoint).handle_async_request(outgoing)
                if call.is_refused(lease, response):
                    with suppress(httpx.HTTPError):
                        await response.aread()  # so that the connection can be used again
                    await response.aclose()
                    raise LeaseLost(f"{lease.node} refused the lease")
                call.served(lease, response)
            except BaseException as error:
                if not call.leave(lease, error):
                    raise
                continue
            if response.is_closed:  # a transport of a test may have read it already
                lease.release()
            else:
                assert isinstance(response.stream, httpx.AsyncByteStream)
                response.stream = _Leased(response.stream, lease)
            return response

    async def aclose(self) -> None:
        """Close the router if it is our own, and all connections."""
        try:
            await self._inner.aclose()
            for transport in (self._unix or {}).values():
                await transport.aclose()
        finally:
            self._sender.close()

    def _to(self, endpoint: str) -> httpx.AsyncBaseTransport:
        """The transport that reaches an endpoint: httpx has one per Unix socket."""
        if not endpoint.startswith("unix:"):
            return self._inner
        if self._unix is None:
            raise httpx.UnsupportedProtocol(f"the transport that was given cannot reach {endpoint}")
        path = endpoint.removeprefix("unix:")
        if path not in self._unix:
            self._unix[path] = httpx.AsyncHTTPTransport(tls(), limits=LIMITS, uds=path)
        return self._unix[path]


class _Leased(Leased, httpx.AsyncByteStream):
    """A response body."""

    def __init__(self, stream: httpx.AsyncByteStream, lease: Lease) -> None:
        super().__init__(lease)
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for part in self._stream:
                yield part
        except Exception:
            self._release()
            raise
        self._release()

    async def aclose(self) -> None:
        try:
            await self._stream.aclose()
        finally:
            self._release()
