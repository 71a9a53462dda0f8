"""The gRPC transport for event loops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any

import grpc
import grpc.aio

from shmcoord.transport._grpc_aio_links import AioLink, AioLinks
from shmcoord.transport._grpc_common import LEASE_KEY, Budget, Options, judge, stub_method

__all__ = ["AsyncGrpcTransport"]


class AsyncGrpcTransport:
    """Sends requests over gRPC on an event loop, the one on which its first call runs."""

    def __init__(
        self,
        stub: Callable[[grpc.aio.Channel], Any],
        *,
        connect_timeout_s: float = 1.0,
        credentials: grpc.ChannelCredentials | None = None,
        options: Options = (),
    ) -> None:
        """Make a transport; arguments as those of `GrpcTransport`."""
        self._connect_timeout_s = connect_timeout_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._links: AioLinks[Any] = AioLinks(stub, credentials=credentials, options=options)

    async def send(
        self, endpoint: str, method: str, request: Any, *, lease: str, timeout_s: float | None
    ) -> Any:
        """Call a unary method of the stub; see `shmcoord.transport.Transport.send`.

        Raises:
            ValueError: The stub has no such method, or it streams.
            grpc.aio.AioRpcError: The call failed otherwise.
        """
        budget = Budget(timeout_s, self._connect_timeout_s)
        link = self._take(endpoint)
        try:
            call = stub_method(
                link.face,
                method,
                grpc.aio.UnaryUnaryMultiCallable,
                grpc.aio.UnaryStreamMultiCallable,
                grpc.aio.StreamUnaryMultiCallable,
                grpc.aio.StreamStreamMultiCallable,
            )
            if not await link.connect(budget.connect_s):
                raise budget.not_connected(endpoint, link.spent)
            return await call(request, timeout=budget.left_s(), metadata=((LEASE_KEY, lease),))
        except grpc.aio.AioRpcError as error:
            judged = judge(error, lambda: lease)
            if judged is error:
                raise
            raise judged from error
        finally:
            self._links.give_back(link, failed=True)

    async def stream(
        self, endpoint: str, method: str, request: Any, *, lease: str, timeout_s: float | None
    ) -> AsyncIterator[Any]:
        """Call a method of the stub that streams its responses, and yield them.

        Closing the iterator cancels the call. Errors as those of `send`; see also
        `shmcoord.transport.AsyncTransport.stream`.
        """
        budget = Budget(timeout_s, self._connect_timeout_s)
        link = self._take(endpoint)
        call: Any = None
        try:
            start = stub_method(
                link.face,
                method,
                grpc.aio.UnaryStreamMultiCallable,
                grpc.aio.UnaryUnaryMultiCallable,
                grpc.aio.StreamUnaryMultiCallable,
                grpc.aio.StreamStreamMultiCallable,
            )
            if not await link.connect(budget.connect_s):
                raise budget.not_connected(endpoint, link.spent)
            call = start(request, timeout=budget.left_s(), metadata=((LEASE_KEY, lease),))
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as error:
            judged = judge(error, lambda: lease)
            if judged is error:
                raise
            raise judged from error
        finally:
            if call is not None:
                call.cancel()  # nothing happens if it has ended
            self._links.give_back(link, failed=True)

    async def close(self) -> None:
        """Close all channels; calls under way are cancelled."""
        await self._links.close()

    async def __aenter__(self) -> AsyncGrpcTransport:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def _take(self, endpoint: str) -> AioLink[Any]:
        """Lend the link to an endpoint for one call."""
        if self._links.closed:
            raise RuntimeError("the transport is closed")
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise RuntimeError("the transport belongs to another event loop; make one per loop")
        return self._links.take(endpoint)
