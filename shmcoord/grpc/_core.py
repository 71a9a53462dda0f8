"""What the calls of one channel share: the router, the links, the rules of sending."""

from __future__ import annotations

import atexit
import itertools
import os
import threading
import weakref
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import grpc

from shmcoord.course import OnDecision, SendRules, send_rules, telling, telling_async
from shmcoord.errors import ShmcoordError
from shmcoord.grpc._background import Background
from shmcoord.grpc._once import Legs, around
from shmcoord.router import Router
from shmcoord.transport._grpc_links import LinkPool
from shmcoord.waiters import Waits

__all__ = ["CLOSED", "ChannelClosed", "Core", "Method"]

CLOSED = "Cannot invoke RPC on closed channel!"


class ChannelClosed(ShmcoordError):
    """The channel was closed while a call was under way."""

    def __init__(self) -> None:
        super().__init__("Channel closed!")


class Method:
    """One method as a stub asks for it; makes the callables of the one-target channels.

    Attributes:
        kind: "unary_unary" and so on: which method of a channel makes it.
        name: `/package.Service/Method`.
        key: Under which links keep what is made.
    """

    def __init__(
        self,
        pool: LinkPool,
        kind: str,
        name: str,
        codec: tuple[Callable[..., Any] | None, Callable[..., Any] | None],
        registered: bool | None,
    ) -> None:
        """Make one; `codec` is the serializer of requests and the deserializer of responses."""
        self.kind = kind
        self.name = name
        self.key = next(_numbers)
        self._pool = pool
        self._pid = os.getpid()
        self._codec = codec
        self._registered = registered

    def make(self, channel: grpc.Channel) -> Any:
        """Return the channel's own callable."""
        make = getattr(channel, self.kind)
        if self._registered:
            return make(self.name, *self._codec, _registered_method=True)
        return make(self.name, *self._codec)

    def __del__(self) -> None:  # a stub may be made for each call
        if os.getpid() == self._pid:  # in the child of a fork the lock may be held for ever
            self._pool.forget(self.key)


_numbers = itertools.count()


class Core:
    """Lives as long as its channel, one of the channel's callables, or a call."""

    def __init__(
        self,
        router: Router,
        *,
        group: str,
        owns_router: bool,
        pool: LinkPool,
        idempotent: Collection[str],
        adopts: bool,
        max_wait_s: float,
        connect_timeout_s: float,
        single_threaded: bool,
        on_decision: OnDecision | None,
        legs: Legs | None = None,
    ) -> None:
        self.router = router
        self.legs = legs  # where interceptors may send other than they were told
        self.waits = Waits()  # of the calls that block
        self.acquire = telling(partial(router.acquire, waits=self.waits), on_decision)
        self.try_acquire = telling(router.try_acquire, on_decision)
        self.acquire_async = telling_async(router.acquire_async, on_decision)
        self.group = group
        self.pool = pool
        self.links = pool.current
        self.rules: SendRules = send_rules(router, adopts, idempotent, None, None)
        self.earn = self.rules.budget.earn
        self.max_wait_s = max_wait_s
        self.connect_timeout_s = connect_timeout_s
        self.background = Background()
        self.closed = False
        self.single_threaded = single_threaded
        self._lock = threading.Lock()
        self._pid = os.getpid()
        parts = (router if owns_router else None, pool, self.background)
        self._parts = parts
        # Who drops channel, stubs and calls without closing gives all of it back as well.
        weakref.finalize(self, _collected, self._pid, *parts).atexit = False
        _all.add(self)

    def is_foreign(self) -> bool:
        """Whether we are in the child of a fork: everything is the parent's."""
        return os.getpid() != self._pid

    def close(self) -> None:
        """End all calls, and let go of everything; may be repeated."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
        router, pool, background = self._parts
        self.waits.end()
        background.close()
        try:
            pool.close()
        finally:
            if router is not None:
                router.close()

    def leave(self) -> None:
        """At the end of the process: give the leases back, whatever calls are under way."""
        self.closed = True
        self.background.close()
        router = self._parts[0]
        if router is not None:
            router.close()


_all: weakref.WeakSet[Core] = weakref.WeakSet()


def _collected(pid: int, router: Router | None, pool: LinkPool, background: Background) -> None:
    """Let go of what a collected core has left; from whatever thread collected it."""
    if os.getpid() != pid:  # in the child of a fork
        return
    background.close()
    try:
        pool.close_later()
        if router is not None:
            router.close()
    except (ShmcoordError, RuntimeError):  # no thread can be started any more
        return


@atexit.register
def _at_exit() -> None:
    for core in list(_all):
        try:
            core.leave()
        except ShmcoordError:  # in the child of a fork it is the parent's
            continue


def dressed(
    interceptors: Sequence[Any], legs: Legs | None
) -> Callable[[grpc.Channel], grpc.Channel]:
    """Return what puts interceptors around a one-target channel; without any there are no legs."""
    if legs is None:
        return lambda channel: channel
    return lambda channel: grpc.intercept_channel(channel, *around(interceptors, legs))
