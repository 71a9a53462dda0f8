"""The object that calls which return at once give to the user."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import partial
from types import TracebackType
from typing import Any

import grpc

from shmcoord.errors import ForkedHandle, NoBackend, ShmcoordError
from shmcoord.grpc._ask import PLAIN, ask_of
from shmcoord.grpc._bare import CANCELLED
from shmcoord.grpc._bases import CallFuture, StreamStream, UnaryStream
from shmcoord.grpc._core import CLOSED, Core, Method
from shmcoord.grpc._flight import Flight, Hold, NoRealCall

__all__ = ["RoutedCall", "RoutedStreamStream", "RoutedUnaryStream", "begin"]


class RoutedCall(grpc.RpcError, CallFuture):
    """A call that goes to the node that the router picks: a call, a future and an iterator.

    It behaves as what grpcio returns, and hands on what the real call says. Where there was no
    node it is the error itself, whose cause is the error of the routing side. One that is dropped
    before its end is cancelled.
    """

    def __init__(self, flight: Flight) -> None:
        super().__init__()
        self._flight = flight

    def __del__(self) -> None:
        flight = getattr(self, "_flight", None)
        if flight is not None:
            flight.abandon()

    # --- as an iterator

    def __iter__(self) -> RoutedCall:
        return self

    def __next__(self) -> Any:
        try:
            return self._flight.next_response()
        except NoRealCall:
            self._fail()

    def next(self) -> Any:
        """Return the next response, as `next(call)`."""
        return self.__next__()

    # --- as a call

    def code(self) -> Any:
        """Wait for the end, and return the status code."""
        return self._ask("code", lambda refusal: refusal.code)

    def details(self) -> Any:
        """Wait for the end, and return the status message."""
        return self._ask("details", lambda refusal: refusal.details)

    def trailing_metadata(self) -> Any:
        """Wait for the end, and return what the node sent last."""
        return self._ask("trailing_metadata", lambda refusal: refusal.trailing)

    def debug_error_string(self) -> Any:
        """Wait for the end, and return what gRPC says more of an error."""
        return self._ask("debug_error_string", lambda refusal: refusal.details)

    def initial_metadata(self) -> Any:
        """Wait for what the node sends first, and return it."""
        metadata = self._flight.initial_metadata()
        return () if metadata is None else metadata

    def is_active(self) -> bool:
        """Return whether it is not over; it may still wait for a node."""
        return not self._flight.over

    def time_remaining(self) -> Any:
        """Return what is left of its time, in seconds; None without a limit."""
        return self._flight.time_remaining()

    def cancel(self) -> bool:
        """End it; False if it is over."""
        return self._flight.cancel()

    def add_callback(self, callback: Callable[[], None]) -> bool:
        """Have a function called at the end; False if it is over."""
        flight = self._flight
        with flight.changed:
            if flight.callbacks is None:
                return False
            flight.callbacks.append(callback)
            return True

    # --- as a future

    def cancelled(self) -> bool:
        """Return whether it was cancelled here."""
        flight = self._flight
        with flight.changed:
            real = flight.real
            if real is None:
                return flight.refusal is CANCELLED
        if not flight.over:
            return False
        ask = getattr(real, "cancelled", None)
        return bool(ask()) if ask is not None else real.code() is _CANCELLED

    def running(self) -> bool:
        """Return whether it is not over."""
        return not self._flight.over

    def done(self) -> bool:
        """Return whether it is over."""
        return self._flight.over

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the response; as `grpc.Future.result`."""
        self._flight.wait(timeout)
        real = self._flight.real
        if real is not None:
            return real.result()
        self._raise_if_cancelled()
        return self._fail()

    def exception(self, timeout: float | None = None) -> Exception | None:
        """Wait for the end and return the error, if there is one; as `grpc.Future.exception`."""
        self._flight.wait(timeout)
        real = self._flight.real
        if real is not None:
            error: Exception | None = real.exception()
            return error
        self._raise_if_cancelled()
        if self.__cause__ is None:
            self.__cause__ = self._flight.cause
        return self

    def traceback(self, timeout: float | None = None) -> TracebackType | None:
        """Wait for the end and return the error's traceback; as `grpc.Future.traceback`."""
        self._flight.wait(timeout)
        real = self._flight.real
        if real is not None:
            trace: TracebackType | None = real.traceback()
            return trace
        self._raise_if_cancelled()
        try:
            self._fail()
        except grpc.RpcError:
            return sys.exc_info()[2]
        return None

    def add_done_callback(self, fn: Callable[[Any], None]) -> None:
        """Have a function called at the end with this object, which it keeps alive."""
        if not self.add_callback(partial(fn, self)):
            fn(self)

    def __str__(self) -> str:
        flight = self._flight
        if not flight.over:
            return f"<{type(self).__name__} object>"
        if flight.real is not None:
            return str(flight.real)
        code, details = self.code(), self.details()
        return f'<{type(self).__name__}:\n\tstatus = {code}\n\tdetails = "{details}"\n>'

    __repr__ = __str__

    def _ask(self, what: str, of_refusal: Callable[[Any], Any]) -> Any:
        flight = self._flight
        if flight.is_pumped_by_reading():
            return getattr(flight.real, what)()  # waiting would be for ever: gRPC says so
        flight.wait()
        real = flight.real
        if real is None:
            return of_refusal(flight.refusal)
        if what == "debug_error_string" and not hasattr(real, what):
            what = "details"
        return getattr(real, what)()

    def _raise_if_cancelled(self) -> None:
        refusal = self._flight.refusal
        if refusal is CANCELLED:  # by the caller: closing the channel is an error, as in gRPC
            raise grpc.FutureCancelledError

    def _fail(self) -> Any:
        raise self from self._flight.cause


_CANCELLED = grpc.StatusCode.CANCELLED


def begin(
    core: Core,
    method: Method,
    request: Any,
    timeout: float | None,
    metadata: Iterable[Any] | None,
    options: tuple[grpc.CallCredentials | None, bool | None, grpc.Compression | None],
) -> RoutedCall:
    """Begin a call: at once where a node is free and connected, else in the background."""
    if core.closed:
        raise ValueError(CLOSED)
    ask = PLAIN if metadata is None else ask_of(metadata)
    flight = Flight(core, method, request, timeout, ask, options)
    try:
        if timeout is not None and not timeout > 0.0:
            raise TimeoutError("there was no time for the call")
        lease = core.try_acquire(core.group, ask.cost, key=ask.key)
    except ForkedHandle:
        raise
    except (ShmcoordError, TimeoutError) as error:
        if isinstance(error, NoBackend) and options[1]:
            flight.seek()
        else:
            flight.refuse(error)
    except ValueError:
        if core.closed:  # meanwhile
            raise ValueError(CLOSED) from None
        raise
    else:
        if lease is None:
            flight.seek()
            return RoutedCall(flight)
        try:
            link = core.pool.take(lease.endpoint)
        except BaseException as error:
            lease.release()
            if core.closed:
                raise ValueError(CLOSED) from error
            raise
        if link.ready:
            flight.launch(lease, link)
        else:
            flight.seek(Hold(lease, link))
    return RoutedCall(flight)


class RoutedUnaryStream(UnaryStream):
    """One request, a stream of responses."""

    def __init__(self, core: Core, method: Method) -> None:
        self._core = core
        self._method = method

    def __call__(
        self,
        request: Any,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Any:
        """Begin a call and return it; see grpcio."""
        return begin(
            self._core,
            self._method,
            request,
            timeout,
            metadata,
            (credentials, wait_for_ready, compression),
        )


class RoutedStreamStream(StreamStream):
    """A stream of requests, a stream of responses."""

    def __init__(self, core: Core, method: Method) -> None:
        self._core = core
        self._method = method

    def __call__(
        self,
        request_iterator: Any,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Any:
        """Begin a call and return it; see grpcio."""
        return begin(
            self._core,
            self._method,
            request_iterator,
            timeout,
            metadata,
            (credentials, wait_for_ready, compression),
        )
