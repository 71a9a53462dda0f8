"""Waking up at an exact time; asyncio alone rounds to whole milliseconds."""

from __future__ import annotations

import asyncio
import ctypes
import os
import time
from collections.abc import Callable

_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_TIMERSLACK = 29
_TFD_NONBLOCK = os.O_NONBLOCK
_TFD_CLOEXEC = os.O_CLOEXEC
_TFD_TIMER_ABSTIME = 1


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


def exact_timers() -> None:
    """The kernel may be late with a timer by 50 µs to save wake-ups: not for us.

    It counts for the calling thread and for those that it starts.
    """
    _libc.prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)


def sleep_until(when_ns: int) -> None:
    """Sleeps until a time of `time.monotonic_ns`."""
    while (left_ns := when_ns - time.monotonic_ns()) > 0:
        time.sleep(left_ns / 1e9)


class Alarm:
    """A timer of the kernel (timerfd) on an event loop.

    Args:
        loop: where `call` is called.
        call: what to do when the time has come.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
        self._loop = loop
        self._call = call
        self._spec = _Itimerspec()
        self._fd = _libc.timerfd_create(time.CLOCK_MONOTONIC, _TFD_NONBLOCK | _TFD_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create failed")
        loop.add_reader(self._fd, self._ring)

    def set(self, when_ns: int) -> None:
        """Rings once at a time of `time.monotonic_ns`; at once if it has passed."""
        value = self._spec.value
        value.seconds, value.nanoseconds = divmod(max(1, when_ns), 1_000_000_000)
        spec = ctypes.byref(self._spec)
        if _libc.timerfd_settime(self._fd, _TFD_TIMER_ABSTIME, spec, None):
            raise OSError(ctypes.get_errno(), "timerfd_settime failed")

    def close(self) -> None:
        """Rings no more."""
        self._loop.remove_reader(self._fd)
        os.close(self._fd)

    def _ring(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:  # it was set anew meanwhile
            return
        self._call()
