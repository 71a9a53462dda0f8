"""A call out of a bare iterator, which is all that some interceptors leave of a stream."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from shmcoord.grpc._outcome import Refused
from shmcoord.grpc._refusal import Refusal

__all__ = ["CANCELLED", "BareStream"]

CANCELLED = Refusal(grpc.StatusCode.CANCELLED, "Locally cancelled by application!")


class BareStream:
    """What `grpc.Call` has, as far as it can be had.

    OpenTelemetry's instrumentation and many interceptors return a generator in place of a stream.
    If it delegates to the stream by `yield from`, that one can be asked and cancelled from the
    first response on. Until then, and for other iterators, cancelling takes effect when the
    response that is being waited for comes, or at the deadline.
    """

    def __init__(self, responses: Iterator[Any]) -> None:
        self._responses = responses
        self._changed = threading.Condition()
        self._inner: Any = None
        self._ahead: list[Any] = []
        self._reading = False
        self._code: grpc.StatusCode | None = None
        self._error: BaseException | None = None
        self._callbacks: list[Callable[[], None]] | None = []

    def __iter__(self) -> BareStream:
        return self

    def __next__(self) -> Any:
        # Not `try: pop`: a generator that is entered while an error is handled keeps that error,
        # and with it the frames of whoever reads.
        return self._ahead.pop() if self._ahead else self._read()

    def cancel(self) -> bool:
        """End the call; False if it is over."""
        with self._changed:
            if self._code is not None:
                return False
            self._code = grpc.StatusCode.CANCELLED
            self._error = Refused(CANCELLED)
            reading, inner = self._reading, self._inner
        if inner is not None:
            inner.cancel()
        if not reading:
            self._close()
        return True

    def add_callback(self, callback: Callable[[], None]) -> bool:
        """Have a function called at the end; False if it is over."""
        with self._changed:
            if self._callbacks is None:
                return False
            self._callbacks.append(callback)
            return True

    def initial_metadata(self) -> Any:
        """Return what the node sent first; waits for the first response."""
        if self._inner is None and self._code is None and not self._ahead:
            with contextlib.suppress(StopIteration, grpc.RpcError):
                self._ahead.append(self._read())
        ask = getattr(self._inner or self._error, "initial_metadata", None)
        return () if ask is None else ask()

    def trailing_metadata(self) -> Any:
        """Return what the node sent last, as far as it is known; for a call that is over."""
        ask = getattr(self._error or self._inner, "trailing_metadata", None)
        return () if ask is None else ask()

    def code(self) -> grpc.StatusCode | None:
        """Return the status code, None before the end."""
        return self._code

    def details(self) -> str:
        """Return the status message; for a call that is over."""
        ask = getattr(self._error, "details", None)
        return (ask() if ask is not None else str(self._error or "")) or ""

    def debug_error_string(self) -> str:
        """Return what gRPC says more of an error, if it does."""
        ask = getattr(self._error, "debug_error_string", None)
        return (ask() if ask is not None else self.details()) or ""

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return the error; for a call that is over."""
        if self._code is grpc.StatusCode.CANCELLED and isinstance(self._error, Refused):
            raise grpc.FutureCancelledError
        return self._error

    def result(self, timeout: float | None = None) -> None:
        """Raise the error, if there is one; for a call that is over."""
        error = self.exception()
        if error is not None:
            raise error

    def traceback(self, timeout: float | None = None) -> Any:
        """Return where the error was raised; for a call that is over."""
        error = self.exception()
        return None if error is None else error.__traceback__

    def _read(self) -> Any:
        with self._changed:
            if self._code is grpc.StatusCode.OK:
                raise StopIteration
            if self._error is not None:
                raise self._error
            if self._reading:
                raise ValueError("another thread reads from this stream")
            self._reading = True
        try:
            response = next(self._responses)
        except StopIteration:
            self._end(grpc.StatusCode.OK, None)
            raise
        except grpc.RpcError as error:
            self._end(error.code(), error)
            raise
        except BaseException as error:
            self._end(grpc.StatusCode.UNKNOWN, error)
            raise
        if self._inner is None:
            inner = getattr(self._responses, "gi_yieldfrom", None)
            self._inner = inner if hasattr(inner, "cancel") else None
        with self._changed:
            self._reading = False
            cancelled = self._error
        if cancelled is not None:
            self._close()
            raise cancelled
        return response

    def _end(self, code: grpc.StatusCode, error: BaseException | None) -> None:
        with self._changed:
            self._reading = False
            if self._code is None:
                self._code, self._error = code, error
        self._fire()

    def _close(self) -> None:
        close = getattr(self._responses, "close", None)
        if close is not None:
            # What it has to say is of no use to somebody who has gone.
            with contextlib.suppress(Exception):
                close()
        self._fire()

    def _fire(self) -> None:
        with self._changed:
            callbacks, self._callbacks = self._callbacks, None
        for callback in callbacks or ():
            callback()
