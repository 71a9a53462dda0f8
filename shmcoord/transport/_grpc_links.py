"""Links: gRPC channels to one endpoint each, used for one connection each.

Shared by the transport for threads and by `shmcoord.grpc.channel`. When a connection ends, the next
call makes a new link; the old one is closed as soon as the calls on it have ended.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import grpc

from shmcoord.transport._grpc_common import ENDED, LESSONS, OPTIONS, READY, Options

__all__ = ["Link", "LinkPool"]

# gRPC's thread that watches a channel's state sees after 0.2 s that nobody is subscribed.
_WATCH_ENDS_S = 0.3


class Link:
    """A channel for one connection, what was made of it, and the number of calls that it carries.

    The state of a channel is told to threads by callback only. It stays subscribed while the
    connection lasts (gRPC looks five times a second), so that its end is seen between calls.

    Attributes:
        endpoint: Where it leads.
        face: What the pool's `dress` made of the channel.
        users: One entry for each call that uses it.
        ready: Whether it is connected.
        spent: Whether its connection has ended or could not be made: it never will be ready.
        state: What gRPC said last.
        adopts: Whether the node has shown that it adopts leases before it does anything.
        lessons: In how many more responses to look for that.
    """

    __slots__ = (
        "_changed",
        "_channel",
        "_on_change",
        "_settled",
        "_was_ready",
        "adopts",
        "endpoint",
        "face",
        "lessons",
        "methods",
        "ready",
        "spent",
        "state",
        "users",
    )

    def __init__(
        self,
        endpoint: str,
        channel: grpc.Channel,
        face: Any,
        on_change: Callable[[Link], object],
    ) -> None:
        self.endpoint = endpoint
        self.face = face
        # Who calls appends first and looks at `ready` then; who closes has set `spent` first
        # and looks for users then: one of them sees the other. Appending and popping are atomic.
        self.users: list[None] = []
        self.ready = False
        self.spent = False
        self.state = grpc.ChannelConnectivity.IDLE
        self.adopts = False
        self.lessons = LESSONS
        self.methods: dict[int, Any] = {}
        self._channel = channel
        self._on_change = on_change
        self._changed = threading.Condition()
        self._settled: list[Callable[[], object]] = []
        self._was_ready = False
        channel.subscribe(self._on_state, try_to_connect=True)

    def method(self, key: int, make: Callable[[Any], Any]) -> Any:
        """Return what `make` made of the face for this key; it is made once."""
        try:
            return self.methods[key]
        except KeyError:
            with self._changed:  # gRPC's registering of methods is not safe for threads
                if key not in self.methods:
                    self.methods[key] = make(self.face)
                return self.methods[key]

    def connect(self, timeout_s: float) -> bool:
        """Wait at most `timeout_s` seconds for the connection; tell if there is one."""
        if self.ready:
            return True
        with self._changed:
            self._changed.wait_for(lambda: self.ready or self.spent, timeout_s)
            return self.ready

    def when_settled(self, callback: Callable[[], object]) -> None:
        """Have a callback called, from any thread, once it is known if there is a connection."""
        with self._changed:
            if not (self.ready or self.spent):
                self._settled.append(callback)
                return
        callback()

    def close(self) -> None:
        """Close the channel, which cancels the calls on it."""
        with self._changed:
            self.spent = True
            self.ready = False
            settled = self._take_settled()
        _call_all(settled)
        if self._was_ready:
            self._channel.unsubscribe(self._on_state)
            self._channel.close()
        else:  # no call is on it, and gRPC's watching thread may just have begun
            self.close_later()

    def close_later(self) -> None:
        """Close a channel that nobody uses any more, on a thread of its own."""
        threading.Thread(target=self._close_unused, name="shmcoord-close", daemon=True).start()

    def _close_unused(self) -> None:
        self._channel.unsubscribe(self._on_state)
        # gRPC's watching thread must have gone, or it finds a closed channel and raises.
        time.sleep(_WATCH_ENDS_S)
        with self._changed:
            self._was_ready = True  # or as good as
        self.close()

    def _on_state(self, state: grpc.ChannelConnectivity) -> None:
        with self._changed:
            self.state = state
            if state is READY:
                self.ready = not self.spent
                self._was_ready = True
            elif self.ready or state in ENDED:
                self.ready = False
                self.spent = True
            spent = self.spent
            settled = self._take_settled() if spent or self.ready else []
        if spent:
            self._channel.unsubscribe(self._on_state)
        _call_all(settled)
        self._on_change(self)

    def _take_settled(self) -> list[Callable[[], object]]:
        """Wake who waits; the caller has the lock, and calls what is returned without it."""
        self._changed.notify_all()
        settled, self._settled = self._settled, []
        return settled


class LinkPool:
    """The links to all endpoints; one is current for each."""

    def __init__(
        self,
        dress: Callable[[grpc.Channel], Any],
        *,
        credentials: grpc.ChannelCredentials | None = None,
        options: Options = (),
        compression: grpc.Compression | None = None,
    ) -> None:
        """Make a pool without links.

        Args:
            dress: Makes of a new channel what callers use: a stub, a channel with interceptors.
            credentials: For encrypted channels; None for plain ones.
            options: gRPC channel options.
            compression: Of what is sent.
        """
        self.on_change: Callable[[], object] = _nobody
        self.failed = False  # whether the last thing heard is that a connection could not be made
        self.current: dict[str, Link] = {}  # changed under the lock, read without
        self._dress = dress
        self._credentials = credentials
        self._options = tuple({**OPTIONS, **dict(options)}.items())
        self._compression = compression
        self._lock = threading.RLock()  # a collected call comes here from anywhere
        self._open: set[Link] = set()
        self._closed = False

    def take(self, endpoint: str) -> Link:
        """Lend the link to an endpoint for one call; give it back.

        Raises:
            RuntimeError: The pool is closed.
        """
        link = self.current.get(endpoint)
        if link is not None:
            link.users.append(None)
            if link.ready:
                return link
            self.give_back(link)
        with self._lock:
            link = self.current.get(endpoint)
            if link is None or link.spent:
                if self._closed:
                    raise RuntimeError("the transport is closed")
                link = self._make(endpoint)
            link.users.append(None)
        return link

    def give_back(self, link: Link) -> None:
        """Take the link back after a call, and close it if its connection has ended."""
        link.users.pop()
        if link.spent:
            self.retire(link)

    def retire(self, link: Link) -> None:
        """Close a link whose connection has ended, unless somebody still uses it."""
        with self._lock:
            if link.users or link not in self._open:
                return
            self._open.discard(link)
            if self.current.get(link.endpoint) is link:
                del self.current[link.endpoint]
        link.close_later()

    def links(self) -> list[Link]:
        """Return the current link to each endpoint that was called."""
        with self._lock:
            return list(self.current.values())

    def open_links(self) -> int:
        """Return how many channels are open."""
        return len(self._open)

    def forget(self, key: int) -> None:
        """Drop what the links made for a key of `Link.method`."""
        with self._lock:
            for link in self._open:
                link.methods.pop(key, None)

    def close(self) -> None:
        """Close all channels; calls under way are cancelled."""
        links = self._shut()
        # Each takes up to 0.2 s, the time in which gRPC looks at its state.
        threads = [
            threading.Thread(target=link.close, name="shmcoord-close", daemon=True)
            for link in links[1:]
        ]
        for thread in threads:
            thread.start()
        for link in links[:1]:
            link.close()
        for thread in threads:
            thread.join()

    def close_later(self) -> None:
        """Close all channels without waiting for that."""
        for link in self._shut():
            link.close_later()

    def _shut(self) -> list[Link]:
        with self._lock:
            self._closed = True
            links = list(self._open)
            self._open.clear()
            self.current.clear()
        return links

    def _make(self, endpoint: str) -> Link:
        # Looked up at each call: instrumentation replaces these functions.
        if self._credentials is None:
            channel = grpc.insecure_channel(endpoint, self._options, self._compression)
        else:
            channel = grpc.secure_channel(
                endpoint, self._credentials, self._options, self._compression
            )
        link = Link(endpoint, channel, self._dress(channel), self._changed)
        self.current[endpoint] = link
        self._open.add(link)
        return link

    def _changed(self, link: Link) -> None:
        if link.ready:
            self.failed = False
        elif link.spent:
            self.failed = link.state is grpc.ChannelConnectivity.TRANSIENT_FAILURE
            self.retire(link)
        self.on_change()


def _nobody() -> None:
    """Nobody wants to know of changes."""


def _call_all(callbacks: list[Callable[[], object]]) -> None:
    for callback in callbacks:
        callback()
