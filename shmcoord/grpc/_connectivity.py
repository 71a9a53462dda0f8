"""One connectivity state for all endpoints, told to those who subscribe.

READY if any link is; else CONNECTING if one is, else TRANSIENT_FAILURE if one could not be
connected or there is nobody to connect to though somebody wants that, else IDLE. SHUTDOWN after
the end.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import grpc

from shmcoord.errors import ShmcoordError

if TYPE_CHECKING:
    from shmcoord.backend import Backend
    from shmcoord.grpc._core import Core

__all__ = ["Connectivity"]

_log = logging.getLogger("shmcoord.grpc")
_State = grpc.ChannelConnectivity
Callback = Callable[[grpc.ChannelConnectivity], None]

# How often to look where nothing rings, in seconds: as gRPC does itself.
_LOOK_EVERY_S = 0.2
# And while somebody wants a connection and there is none.
_TRY_EVERY_S = 0.05


class _Subscriber:
    def __init__(self, callback: Callback) -> None:
        self.callback = callback
        self.told: grpc.ChannelConnectivity | None = None


class Connectivity:
    """The subscribers of one channel. A thread serves them; it ends with the last of them."""

    def __init__(self, core: Core) -> None:
        self._core = weakref.ref(core)  # a subscriber does not keep a channel
        self._lock = threading.RLock()
        self._rung = threading.Event()
        self._subscribers: list[_Subscriber] = []
        self._connect = False
        self._closed = False
        self._tried: Backend | None = None
        self._thread: threading.Thread | None = None
        core.pool.on_change = self._rung.set

    def subscribe(self, callback: Callback, try_to_connect: bool) -> None:
        """Tell a callback the state now and whenever it changes, from another thread."""
        with self._lock:
            self._subscribers.append(_Subscriber(callback))
            self._connect = self._connect or try_to_connect
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="shmcoord-connectivity", daemon=True
                )
                self._thread.start()
        self._rung.set()

    def unsubscribe(self, callback: Callback) -> None:
        """Undo one `subscribe`; nothing happens if there was none."""
        with self._lock:
            for subscriber in self._subscribers:
                if subscriber.callback == callback:
                    self._subscribers.remove(subscriber)
                    break
        self._rung.set()

    def close(self) -> None:
        """Tell everybody of the end, and forget them."""
        self._closed = True
        self._rung.set()

    def _run(self) -> None:
        while True:
            self._rung.clear()
            state = self._look()
            self._deliver(state)
            with self._lock:
                if state is _State.SHUTDOWN:
                    # Those who came meanwhile are told next time round.
                    self._subscribers = [s for s in self._subscribers if s.told is not state]
                if not self._subscribers:
                    self._connect = False
                    self._thread = None
                    return
                wants = self._connect
            self._rung.wait(_TRY_EVERY_S if wants and state is not _State.READY else _LOOK_EVERY_S)

    def _look(self) -> grpc.ChannelConnectivity:
        core = self._core()
        if core is None or core.closed or self._closed:
            return _State.SHUTDOWN
        links = core.pool.links()
        if any(link.ready for link in links):
            self._connect = False  # as gRPC: who asks to connect asks once
            self._tried = None
            return _State.READY
        if any(not link.spent for link in links):
            return _State.CONNECTING
        if self._connect and self._try(core):
            return _State.CONNECTING
        return _State.TRANSIENT_FAILURE if self._connect or core.pool.failed else _State.IDLE

    def _try(self, core: Core) -> bool:
        """Begin to connect to a node; False if there is none, or an earlier one has failed."""
        try:
            if self._tried is not None and core.pool.failed:
                core.router.mark_unreachable(self._tried)
            self._tried, before = core.router.pick(core.group), self._tried
            core.pool.give_back(core.pool.take(self._tried.endpoint))
            return before is None
        except (ShmcoordError, ValueError, RuntimeError):  # none has joined; closed meanwhile
            return False

    def _deliver(self, state: grpc.ChannelConnectivity) -> None:
        with self._lock:
            untold = [s for s in self._subscribers if s.told is not state]
        for subscriber in untold:
            with self._lock:
                if subscriber not in self._subscribers:
                    continue
                subscriber.told = state
            try:
                subscriber.callback(state)
            except Exception:  # noqa: BLE001 - as gRPC: the others are told
                _log.exception("a connectivity callback failed")
