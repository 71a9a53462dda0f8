"""An event loop on a thread of its own, for the calls that cannot start at once."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any

__all__ = ["Background"]

Work = Callable[[], Coroutine[Any, Any, None]]


class Background:
    """Starts with the first work, ends with `close`; in the child of a fork it does nothing."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._pid = os.getpid()

    def run(self, work: Work) -> concurrent.futures.Future[None]:
        """Run a coroutine there; what is returned can be cancelled.

        Raises:
            RuntimeError: It is closed.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("the channel is closed")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(
                    target=_serve, args=(self._loop,), name="shmcoord-grpc", daemon=True
                ).start()
            return asyncio.run_coroutine_threadsafe(work(), self._loop)

    def close(self) -> None:
        """Cancel what is under way there, and end the thread; without waiting for it."""
        if os.getpid() != self._pid:  # the loop, and perhaps the lock, are the parent's
            return
        with self._lock:
            self._closed = True
            loop, self._loop = self._loop, None
        if loop is not None:
            # A turn later than all that was given to `run`: a task that is cancelled before its
            # first step runs nothing at all, and its call would never be over.
            loop.call_soon_threadsafe(loop.call_soon, loop.stop)


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.close()
