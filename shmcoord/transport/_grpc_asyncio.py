"""The gRPC transport for event loops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any

import grpc
import grpc.aio

from shmcoord.transport._grpc_common import (
    ENDED,
    LEASE_KEY,
    OPTIONS,
    READY,
    Budget,
    Options,
    judge,
    stub_method,
)

__all__ = ["AsyncGrpcTransport"]


class _AioLink:
    """A channel for one connection on an event loop, its stub and its calls."""

    def __init__(self, channel: grpc.aio.Channel, stub: Any) -> None:
        self.stub = stub
        self.calls = 0
        self._channel = channel
        self._was_ready = False
        self._closed = False
        self._settling: asyncio.Task[None] | None = None

    @property
    def spent(self) -> bool:
        """Whether its connection has ended or could not be made."""
        if self._closed:
            return True
        state = self._channel.get_state()
        return state in ENDED or (self._was_ready and state is not READY)

    async def connect(self, timeout_s: float) -> bool:
        """Wait at most `timeout_s` seconds for the connection; tell if there is one."""
        if self._is_ready():
            return True
        if self._settling is None:
            # One task for all calls that wait: gRPC's own wait cannot be given up.
            self._settling = asyncio.ensure_future(self._settle())
        await asyncio.wait((self._settling,), timeout=timeout_s)
        return self._is_ready()

    async def close(self) -> None:
        """Close the channel, which cancels the calls on it."""
        self._closed = True
        await self._channel.close(None)
        if self._settling is not None:
            await asyncio.wait((self._settling,))

    def _is_ready(self) -> bool:
        if self._closed or self._channel.get_state(try_to_connect=True) is not READY:
            return False
        self._was_ready = True
        return True

    async def _settle(self) -> None:
        while not self._closed:
            state = self._channel.get_state(try_to_connect=True)
            if state is READY or state in ENDED:
                return
            await self._channel.wait_for_state_change(state)


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
        self._stub = stub
        self._connect_timeout_s = connect_timeout_s
        self._credentials = credentials
        self._options = tuple({**OPTIONS, **dict(options)}.items())
        self._loop: asyncio.AbstractEventLoop | None = None
        self._current: dict[str, _AioLink] = {}
        self._open: set[_AioLink] = set()
        self._closed = False

    async def send(
        self, endpoint: str, method: str, request: Any, *, lease: str, timeout_s: float | None
    ) -> Any:
        """Call a unary method of the stub; see `shmcoord.transport.Transport.send`.

        Raises:
            ValueError: The stub has no such method, or it streams.
            grpc.aio.AioRpcError: The call failed otherwise.
        """
        budget = Budget(timeout_s, self._connect_timeout_s)
        link = await self._take(endpoint)
        try:
            call = stub_method(
                link.stub,
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
            judged = judge(error)
            if judged is error:
                raise
            raise judged from error
        finally:
            await self._give_back(endpoint, link)

    async def stream(
        self, endpoint: str, method: str, request: Any, *, lease: str, timeout_s: float | None
    ) -> AsyncIterator[Any]:
        """Call a method of the stub that streams its responses, and yield them.

        Closing the iterator cancels the call. Errors as those of `send`; see also
        `shmcoord.transport.AsyncTransport.stream`.
        """
        budget = Budget(timeout_s, self._connect_timeout_s)
        link = await self._take(endpoint)
        call: Any = None
        try:
            start = stub_method(
                link.stub,
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
            judged = judge(error)
            if judged is error:
                raise
            raise judged from error
        finally:
            if call is not None:
                call.cancel()  # nothing happens if it has ended
            await self._give_back(endpoint, link)

    async def close(self) -> None:
        """Close all channels; calls under way are cancelled."""
        self._closed = True
        links = list(self._open)
        self._open.clear()
        self._current.clear()
        for link in links:
            await link.close()

    async def __aenter__(self) -> AsyncGrpcTransport:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _take(self, endpoint: str) -> _AioLink:
        """Lend the link to an endpoint for one call."""
        if self._closed:
            raise RuntimeError("the transport is closed")
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise RuntimeError("the transport belongs to another event loop; make one per loop")
        link = self._current.get(endpoint)
        if link is not None and link.spent:
            del self._current[endpoint]
            if link.calls == 0:
                await self._close(link)
            link = self._current.get(endpoint)
        if link is None:
            if self._credentials is None:
                channel = grpc.aio.insecure_channel(endpoint, self._options)
            else:
                channel = grpc.aio.secure_channel(endpoint, self._credentials, self._options)
            link = self._current[endpoint] = _AioLink(channel, self._stub(channel))
            self._open.add(link)
        link.calls += 1
        return link

    async def _give_back(self, endpoint: str, link: _AioLink) -> None:
        """Take the link back after a call, and close it if its connection has ended."""
        link.calls -= 1
        if link.calls == 0 and link.spent:
            if self._current.get(endpoint) is link:
                del self._current[endpoint]
            await self._close(link)

    async def _close(self, link: _AioLink) -> None:
        self._open.discard(link)
        await link.close()
