"""The four kinds of routed call on an event loop; see `_aio_base` for the theory."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Generator
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from shmcoord.grpc._aio_base import RoutedCall
from shmcoord.grpc._aio_ends import WeakEnd

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
            real = self._real
            try:
                if real is None:
                    if self._over:
                        raise self._outcome()
                    yield from self._change()
                    continue
                self._awaited = True
                response = yield from real.__await__()
            except grpc.aio.AioRpcError:
                if self._is_final(real):
                    self._tell()
                    raise
            except BaseException:
                self._awaited = False  # whatever comes, we do not see it
                self.cancel()
                raise
            else:
                if not self._over:
                    self._succeed()
                if self._late:
                    self._tell()
                return response


class _Dropped(RoutedCall):
    """Cancelled when nobody holds it any more."""

    _is_weak = True
    _runs_alone = False
    _end: WeakEnd | None = None

    def _weak_end(self) -> Callable[[Any], object]:
        assert self._lease is not None
        assert self._link is not None
        end = self._end = WeakEnd(self, self._lease, self._link, self._routes.links)
        if self._runs_alone:
            end.kept = self
        return end

    def __del__(self) -> None:
        if self._over or self._runs_alone or self._real is None:
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
        lease = self._lease  # the loop was closed
        if lease is not None and not lease.released:
            lease.release()

    def _abandon(self) -> None:
        real = self._real
        if not self._over and real is not None:
            real.cancel()
            self._decide()  # the weak reference to us may be dead


class _Responses(_Dropped):
    """Responses are iterated over or read, one after another."""

    _iterator: AsyncIterator[Any] | None = None
    _iterated: Any = None  # the call of grpcio that `_iterator` is of
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
            real = self._real
            try:
                if real is None:
                    real = await self._real_or_error()
                if self._iterated is not real:
                    self._tell()
                    self._iterated = real
                    self._iterator = real.__aiter__()
                assert self._iterator is not None
                response = await self._iterator.__anext__()
            except StopAsyncIteration:
                raise
            except grpc.aio.AioRpcError:
                if self._is_final(real):
                    raise
            except RuntimeError:  # two tasks read at once: the call goes on, as in grpcio
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
            real = self._real
            try:
                if real is None:
                    real = await self._real_or_error()
                self._tell()
                response = await real.read()
            except grpc.aio.AioRpcError:
                if self._is_final(real):
                    raise
            except RuntimeError:  # two tasks read at once: the call goes on, as in grpcio
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
        real = await self._writable()
        await real.write(request)

    async def done_writing(self) -> None:
        """Say that no further request comes."""
        real = await self._writable()
        await real.done_writing()

    async def _writable(self) -> Any:
        if self._iterates:
            raise grpc.aio.UsageError(_MIXED_STYLES)
        real = await self._real_or_error()
        self._tell()
        self._committed = True
        return real


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
        self._runs_alone = True
        if self._end is not None and not self._over:
            self._end.kept = self


class StreamStreamCall(_Requests, _Responses, grpc.aio.StreamStreamCall[Any, Any]):
    """A routed call with a stream of requests and one of responses."""
