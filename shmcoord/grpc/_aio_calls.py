"""The four kinds of routed call on an event loop; see `_aio_base` for the theory."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import AsyncIterator, Generator
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from shmcoord.grpc._aio_base import RoutedCall

if TYPE_CHECKING:
    from shmcoord.lease import Lease
    from shmcoord.transport._grpc_aio_links import AioLink

__all__ = ["StreamStreamCall", "StreamUnaryCall", "UnaryStreamCall", "UnaryUnaryCall"]

_MIXED_STYLES = "The iterator and read/write APIs may not be mixed on a single RPC."


class _OneResponse(RoutedCall):
    """Awaiting gives the response."""

    def __await__(self) -> Generator[Any, None, Any]:
        """Wait for the response.

        Raises:
            grpc.aio.AioRpcError: The call has failed.
            asyncio.CancelledError: It was cancelled, or the task that waits is; then so is the
                call.
        """
        while True:
            leg = self._leg
            try:
                if leg is None:
                    if self._over:
                        raise self._outcome()
                    yield from self._change()
                    continue
                response = yield from leg.real.__await__()
            except grpc.aio.AioRpcError:
                if leg is self._leg:
                    self._tell()
                    raise
            except BaseException:
                self.cancel()
                raise
            else:
                self._tell()
                return response


class _Dropped(RoutedCall):
    """Cancelled when nobody holds it any more."""

    _runs_alone = False

    def __del__(self) -> None:
        if self._over or self._runs_alone or self._leg is None:
            return
        loop = self._routes.loop
        try:
            running: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is loop:
            self._abandon()
            return
        # The garbage collector runs in any thread.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(self._abandon)
            return
        lease = self._leg.lease  # the loop was closed
        if lease is not None and not lease.released:
            lease.release()

    def _abandon(self) -> None:
        leg = self._leg
        if self._over or leg is None:
            return
        leg.owner = self  # the weak reference is dead, but somebody may wait for our callbacks
        leg.real.cancel()


class _Responses(_Dropped):
    """Responses are iterated over or read, one after another."""

    _iterator: AsyncIterator[Any] | None = None
    _iterated: Any = None  # the leg that `_iterator` is of
    _reads: bool | None = None  # by `read`, not by iteration

    def __aiter__(self) -> AsyncIterator[Any]:
        """Iterate over the responses.

        The call is its own iterator: so nothing but its user holds it.
        """
        self._read_style(False)
        return self

    async def __anext__(self) -> Any:
        """Wait for the next response."""
        while True:
            leg = self._leg
            try:
                if leg is None:
                    leg = await self._leg_or_error()
                if self._iterated is not leg:
                    self._tell()
                    self._iterated = leg
                    self._iterator = leg.real.__aiter__()
                assert self._iterator is not None
                response = await self._iterator.__anext__()
            except StopAsyncIteration:
                raise
            except grpc.aio.AioRpcError:
                if leg is self._leg:
                    raise
            except BaseException:
                self.cancel()
                raise
            else:
                self._committed = True
                return response

    async def read(self) -> Any:
        """Wait for the next response, or for `grpc.aio.EOF`."""
        if not self._over:
            self._read_style(True)
        while True:
            leg = self._leg
            try:
                if leg is None:
                    leg = await self._leg_or_error()
                self._tell()
                response = await leg.real.read()
            except grpc.aio.AioRpcError:
                if leg is self._leg:
                    raise
            except BaseException:
                self.cancel()
                raise
            else:
                self._committed = True
                return response

    def _read_style(self, reads: bool) -> None:
        if self._reads is None:
            self._reads = reads
        elif self._reads is not reads:
            raise grpc.aio.UsageError(_MIXED_STYLES)


class _Requests(_Dropped):
    """Requests are an iterator, or written one after another."""

    _iterates = False

    def __init__(self, method: Any, argument: Any, *rest: Any) -> None:
        self._iterates = argument is not None
        super().__init__(method, argument, *rest)

    def _begin(
        self, lease: Lease, link: AioLink[grpc.aio.Channel], timeout_s: float | None
    ) -> None:
        # grpcio takes the first message as soon as the call has begun.
        self._committed = self._committed or self._iterates
        super()._begin(lease, link, timeout_s)

    async def write(self, request: Any) -> None:
        """Write a request."""
        leg = await self._writable()
        await leg.real.write(request)

    async def done_writing(self) -> None:
        """Say that no further request comes."""
        leg = await self._writable()
        await leg.real.done_writing()

    async def _writable(self) -> Any:
        if self._iterates:
            raise grpc.aio.UsageError(_MIXED_STYLES)
        leg = await self._leg_or_error()
        self._tell()
        self._committed = True
        return leg


class UnaryUnaryCall(_OneResponse, grpc.aio.UnaryUnaryCall[Any, Any]):
    """A routed call with one request and one response."""


class UnaryStreamCall(_Responses, grpc.aio.UnaryStreamCall[Any, Any]):
    """A routed call with one request and a stream of responses."""


class StreamUnaryCall(_Requests, _OneResponse, grpc.aio.StreamUnaryCall[Any, Any]):
    """A routed call with a stream of requests and one response.

    With an iterator of requests it runs alone; so it does once `done_writing` was called.
    """

    def __init__(self, method: Any, argument: Any, *rest: Any) -> None:
        self._runs_alone = argument is not None
        super().__init__(method, argument, *rest)

    async def done_writing(self) -> None:
        """Say that no further request comes."""
        await super().done_writing()
        leg = self._leg
        if leg is not None and isinstance(leg.owner, weakref.ref):
            self._runs_alone = True
            leg.owner = self


class StreamStreamCall(_Requests, _Responses, grpc.aio.StreamStreamCall[Any, Any]):
    """A routed call with a stream of requests and one of responses."""
