"""Links of an event loop: one gRPC channel per connection, replaced when that connection ends.

Theory of operation. A channel of gRPC connects anew by itself, but backs off before it does, and
while it does, calls fail or hang on a node that may be back for long. So a channel is used for one
connection only. Of each endpoint one link is current. Who finds it spent (its connection has
ended, or could not be made) takes a fresh one in its place, without any back-off; the spent one is
closed as soon as the calls on it have ended, since a node that drains still answers them.

Everything here runs on one event loop, between two awaits: there are no locks.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import grpc
import grpc.aio

from shmcoord.transport._grpc_common import ENDED, LESSONS, OPTIONS, READY, Options

__all__ = ["AioLink", "AioLinks"]

T = TypeVar("T")


class AioLink(Generic[T]):
    """A channel for one connection, and what its user has built on it.

    Attributes:
        endpoint: Where it leads.
        channel: The channel.
        get_state: Its method.
        face: What `build` made of the channel.
        calls: How many calls it is lent to.
        adopts: Whether the node at its end is known to adopt leases; set by the user.
        lessons: In how many more responses to look for that.
        closed: Whether it was closed.
        retired: Whether it is no longer the current one of its endpoint.
        was_ready: Whether it was connected when it was last looked at, or before.
    """

    __slots__ = (
        *("adopts", "calls", "channel", "closed", "endpoint", "face", "get_state"),
        *("lessons", "retired", "was_ready", "_settling"),
    )

    def __init__(self, endpoint: str, channel: grpc.aio.Channel, face: T) -> None:
        self.endpoint = endpoint
        self.channel = channel
        self.get_state = channel.get_state
        self.face = face
        self.calls = 0
        self.adopts = False
        self.lessons = LESSONS
        self.closed = False
        self.was_ready = False
        self.retired = False
        self._settling: asyncio.Task[None] | None = None

    @property
    def spent(self) -> bool:
        """Whether its connection has ended or could not be made."""
        if self.closed:
            return True
        state = self.channel.get_state()
        return state in ENDED or (self.was_ready and state is not READY)

    def is_ready(self, try_to_connect: bool = True) -> bool:
        """Whether it is connected; if it never was, this makes it try unless told otherwise."""
        if self.closed:
            return False
        # A channel that was connected and is not now is spent: it shall not connect again.
        if self.channel.get_state(try_to_connect and not self.was_ready) is not READY:
            return False
        self.was_ready = True
        return True

    async def connect(self, timeout_s: float) -> bool:
        """Wait at most `timeout_s` seconds for the connection; tell if there is one."""
        if self.is_ready():
            return True
        if self._settling is None:
            # One task for all calls that wait: gRPC's own wait cannot be given up.
            self._settling = asyncio.ensure_future(self._settle())
        await asyncio.wait((self._settling,), timeout=timeout_s)
        return self.is_ready()

    async def close(self) -> None:
        """Close the channel, which cancels the calls on it."""
        self.closed = True
        await self.channel.close(None)
        if self._settling is not None:
            await asyncio.wait((self._settling,))

    async def _settle(self) -> None:
        while not self.closed:
            state = self.channel.get_state(not self.was_ready)
            if state is READY or self.spent:
                return
            await self.channel.wait_for_state_change(state)


class AioLinks(Generic[T]):
    """The links of one user to all endpoints; they belong to one event loop.

    Args:
        build: Makes of a new channel what the user calls, once per link.
        credentials: For `grpc.aio.secure_channel`; without, the channels are insecure.
        options: Options of the channels, beside `_grpc_common.OPTIONS`.
        compression: Of the channels.
        interceptors: Of the channels; grpc.aio takes them only when a channel is made.
    """

    def __init__(
        self,
        build: Callable[[grpc.aio.Channel], T],
        *,
        credentials: grpc.ChannelCredentials | None = None,
        options: Options = (),
        compression: grpc.Compression | None = None,
        interceptors: Sequence[grpc.aio.ClientInterceptor] = (),
    ) -> None:
        self.closed = False
        self._build = build
        self._credentials = credentials
        self._options = tuple({**OPTIONS, **dict(options)}.items())
        self._compression = compression
        self._interceptors = tuple(interceptors)
        self._current: dict[str, AioLink[T]] = {}
        self._open: set[AioLink[T]] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    def __len__(self) -> int:
        """How many links are open."""
        return len(self._open)

    def current(self, endpoint: str) -> AioLink[T] | None:
        """Return the current link to an endpoint, spent or not, without lending it."""
        return self._current.get(endpoint)

    def take_ready(self, endpoint: str) -> AioLink[T] | None:
        """Lend the link to an endpoint for one call if it is connected; else None."""
        link = self._current.get(endpoint)
        if link is None or link.get_state() is not READY:
            return None
        link.was_ready = True
        link.calls += 1
        return link

    def take(self, endpoint: str) -> AioLink[T]:
        """Lend the link to an endpoint for one call; it may have to `connect` first.

        Raises:
            RuntimeError: The links are closed.
        """
        link = self.renew(endpoint)
        link.calls += 1
        return link

    def renew(self, endpoint: str) -> AioLink[T]:
        """Return the current link to an endpoint, a fresh one if there is none or it is spent.

        Raises:
            RuntimeError: The links are closed.
        """
        if self.closed:
            raise RuntimeError("the links are closed")
        link = self._current.get(endpoint)
        if link is not None:
            if not link.spent:
                return link
            self._retire(link)
        for other in [other for other in self._current.values() if not other.calls]:
            if other.spent:  # nodes that left have endpoints that nobody asks for any more
                self._retire(other)
        return self._make(endpoint)

    def give_back(self, link: AioLink[T], *, failed: bool) -> None:
        """Take a link back after a call, and close it if its connection has ended.

        Args:
            link: What `take` or `take_ready` gave.
            failed: Whether the call did not end well: then its connection is looked at.
        """
        link.calls -= 1
        if link.retired:
            if not link.calls:
                self._close_soon(link)
        elif failed and link.spent:
            self._retire(link)

    async def close(self) -> None:
        """Close all channels; calls under way are cancelled."""
        self.closed = True
        links = list(self._open)
        self._open.clear()
        self._current.clear()
        for link in links:
            link.retired = True
            await link.close()
        if self._closing:
            await asyncio.wait(self._closing)

    def _make(self, endpoint: str) -> AioLink[T]:
        with contextlib.suppress(RuntimeError):
            self._loop = asyncio.get_running_loop()
        # Found on the module at each use: instrumentation replaces these functions. One that
        # finds the interceptors given as None or as a tuple could not add its own.
        given = list(self._interceptors) or None
        if self._credentials is None:
            channel = grpc.aio.insecure_channel(
                endpoint,
                options=self._options,
                compression=self._compression,
                interceptors=given,
            )
        else:
            channel = grpc.aio.secure_channel(
                endpoint,
                self._credentials,
                options=self._options,
                compression=self._compression,
                interceptors=given,
            )
        link = self._current[endpoint] = AioLink(endpoint, channel, self._build(channel))
        self._open.add(link)
        return link

    def _retire(self, link: AioLink[T]) -> None:
        """No new call goes out on it."""
        if self._current.get(link.endpoint) is link:
            del self._current[link.endpoint]
        link.retired = True
        if not link.calls:
            self._close_soon(link)

    def _close_soon(self, link: AioLink[T]) -> None:
        if link not in self._open:
            return
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if self._loop is None:
            self._loop = running
        if running is not None and running is self._loop:
            self._open.discard(link)
            task = running.create_task(link.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
        elif self._loop is not None and not self._loop.is_closed():
            # A call was collected as garbage in another thread, or between two runs of the loop.
            self._loop.call_soon_threadsafe(self._close_soon, link)
        else:
            self._open.discard(link)  # the channel closes itself with its last reference
