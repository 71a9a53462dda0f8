"""Calls with one response: the blocking ones, which return what grpcio returns.

The straight way (a node is free and connected, and answers) is all in `_Blocking._straight`, which
is written for speed: it makes no object of its own, and takes no lock. What goes otherwise makes a
`Search`, in `_send`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import partial
from sys import modules
from typing import TYPE_CHECKING, Any

import grpc

from shmcoord.errors import ForkedHandle, NoBackend, Saturated, ShmcoordError
from shmcoord.grpc._ask import PLAIN, Ask, ask_of
from shmcoord.grpc._bases import StreamUnary, UnaryUnary
from shmcoord.grpc._calls import begin
from shmcoord.grpc._common import LEASE_KEY, served_by
from shmcoord.grpc._core import CLOSED, ChannelClosed, Core, Method
from shmcoord.grpc._learning import learn
from shmcoord.grpc._once import proves
from shmcoord.grpc._outcome import refused
from shmcoord.grpc._search import Search
from shmcoord.grpc._served import TRACE, tell_node
from shmcoord.transport._grpc_common import judge

if TYPE_CHECKING:
    from shmcoord.grpc._once import Leg
    from shmcoord.lease import Lease
    from shmcoord.transport._grpc_links import Link

__all__ = ["RoutedStreamUnary", "RoutedUnaryUnary"]

_monotonic = time.monotonic


def _token_of(lease: Lease) -> str:
    token: str = lease.token
    return token


class _Blocking:
    """What both kinds share.

    `_repeats` says whether the request can be sent twice: an iterator cannot.
    """

    _repeats: bool

    def __init__(self, core: Core, method: Method) -> None:
        self._core = core
        self._method = method

    def _straight(
        self,
        request: Any,
        timeout: float | None,
        metadata: Iterable[Any] | None,
        credentials: grpc.CallCredentials | None,
        wait_for_ready: bool | None,
        compression: grpc.Compression | None,
        with_call: bool,
    ) -> Any:
        """Return the response (and the call) where all is as usual; else `_send` goes on."""
        core = self._core
        if core.closed:
            raise ValueError(CLOSED)
        began = _monotonic()
        ask = PLAIN if metadata is None else ask_of(metadata)
        cost, key, sent = ask
        # A dead endpoint must not be waited for: the channel is connected, or the call goes
        # elsewhere.
        if wait_for_ready:
            inner_wait: bool | None = False
        else:
            inner_wait = wait_for_ready
        lease = link = leg = None
        error: BaseException | None = None
        try:
            lease = core.try_acquire(core.group, cost, key=key)
            if lease is None:
                lease = core.acquire(
                    core.group, core.max_wait_s if timeout is None else timeout, cost, key=key
                )
        except (NoBackend, Saturated) as reason:
            if timeout is None or timeout > 0.0:  # else there is no time, of which `_send` tells
                error = reason
        except ValueError:
            # Closed meanwhile; or there is no time, of which `_send` tells.
            if not core.closed and (timeout is None or timeout >= 0.0):
                raise
        else:
            link = core.links.get(lease.endpoint)
            if link is not None:
                link.users.append(None)
                call = link.methods.get(self._method.key)
                if link.ready and call is not None:
                    served_by.set(lease.node)
                    if TRACE in modules:
                        tell_node(lease, _monotonic() - began)
                    left_s = None if timeout is None else began + timeout - _monotonic()
                    keys = ((LEASE_KEY, lease.token), *sent)
                    if core.legs is not None:
                        leg = core.legs.begin(keys[0][1])
                    try:
                        if with_call or link.lessons:
                            response = call.with_call(
                                request, left_s, keys, credentials, inner_wait, compression
                            )
                            if link.lessons:
                                learn(link, response[1], lease.node)
                            if not with_call:
                                response = response[0]
                        else:
                            response = call(
                                request, left_s, keys, credentials, inner_wait, compression
                            )
                    except BaseException as reason:  # noqa: BLE001 - it is judged there
                        error = reason
                    else:
                        lease.release()
                        link.users.pop()
                        if link.spent:  # looked at afterwards, or it would stay open
                            core.pool.retire(link)
                        core.earn()
                        return response
                else:
                    core.pool.give_back(link)
                    link = None
        options = (credentials, wait_for_ready, compression)
        return self._send(
            request, timeout, ask, options, with_call, (began, lease, link, leg, error)
        )

    def _send(
        self,
        request: Any,
        timeout: float | None,
        ask: Ask,
        options: tuple[grpc.CallCredentials | None, bool | None, grpc.Compression | None],
        with_call: bool,
        so_far: tuple[float, Lease | None, Link | None, Leg | None, BaseException | None],
    ) -> Any:
        """Return the response (and the call), by any way.

        Args:
            request: What is sent.
            timeout: Of the whole call, seconds.
            ask: What the router is asked for, and further metadata.
            options: Credentials, wait_for_ready and compression, as in grpcio.
            with_call: Whether the call is returned, too.
            so_far: When it began; and lease, link, leg and error of the straight way, as far as
                that led. With a link the real call has failed, without one it has not begun.
        """
        core, method = self._core, self._method
        began, lease, link, leg, error = so_far
        del so_far
        credentials, wait_for_ready, compression = options
        search: Search | None = None
        theirs = False  # what the real call raised
        try:
            while True:
                try:
                    if lease is None:
                        if error is not None:
                            raise error
                        if search is None:
                            search = Search(core, method.name, ask, began, timeout, wait_for_ready)
                        lease = search.acquire()
                except (NoBackend, Saturated) as reason:
                    if search is not None:
                        raise
                    error = None
                    search = Search(core, method.name, ask, began, timeout, wait_for_ready)
                    time.sleep(search.pause_s(reason))
                    continue
                sending = error is not None
                try:
                    if error is not None:
                        raise error
                    link = core.pool.take(lease.endpoint)
                    if not link.ready:
                        if search is None:
                            search = Search(core, method.name, ask, began, timeout, wait_for_ready)
                        if not link.connect(search.connect_s()):
                            raise search.not_connected(link)
                    now = _monotonic()
                    tell_node(lease, now - began)
                    call = link.method(method.key, method.make)
                    token = lease.token
                    if core.legs is not None:
                        leg = core.legs.begin(token)
                    sending = True
                    result = call.with_call(
                        request,
                        None if timeout is None else began + timeout - now,
                        ((LEASE_KEY, token), *ask.metadata),
                        credentials,
                        False if wait_for_ready else wait_for_ready,
                        compression,
                    )
                    if link.lessons:
                        learn(link, result[1], lease.node)
                except BaseException as reason:
                    error = None
                    if link is not None:
                        core.pool.give_back(link)
                    if sending and not self._repeats:  # the iterator has been given away
                        lease.release()
                        theirs = True
                        raise
                    if search is None:
                        search = Search(core, method.name, ask, began, timeout, wait_for_ready)
                    judged: BaseException = reason
                    if isinstance(reason, grpc.RpcError):
                        judged = judge(reason, partial(_token_of, lease))
                    adopts = link is not None and link.adopts
                    if not search.leave(lease, judged, adopts, proves(leg)):
                        theirs = sending
                        raise
                    reason.__traceback__ = None  # or the search and this frame would be a cycle
                    lease = link = leg = None
                    continue
                lease.release()
                core.pool.give_back(link)
                return result if with_call else result[0]
        except ForkedHandle:
            raise
        except (ShmcoordError, TimeoutError) as reason:
            if theirs:
                raise
            raise refused(reason, core) from reason
        except (ValueError, RuntimeError) as reason:
            if theirs or not core.closed:
                raise
            raise refused(ChannelClosed(), core) from reason


class RoutedUnaryUnary(_Blocking, UnaryUnary):
    """One request, one response."""

    _repeats = True

    def __call__(
        self,
        request: Any,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Any:
        """Call and return the response; see grpcio."""
        return self._straight(
            request, timeout, metadata, credentials, wait_for_ready, compression, False
        )

    def with_call(
        self,
        request: Any,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Any:
        """Call and return the response and the call; see grpcio."""
        return self._straight(
            request, timeout, metadata, credentials, wait_for_ready, compression, True
        )

    def future(
        self,
        request: Any,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Any:
        """Begin a call and return it as a future; see grpcio."""
        return begin(
            self._core,
            self._method,
            request,
            timeout,
            metadata,
            (credentials, wait_for_ready, compression),
        )


class RoutedStreamUnary(_Blocking, StreamUnary):
    """An iterator of requests, one response."""

    _repeats = False

    def __call__(
        self,
        request_iterator: Any,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Any:
        """Call and return the response; see grpcio."""
        return self._straight(
            request_iterator, timeout, metadata, credentials, wait_for_ready, compression, False
        )

    def with_call(
        self,
        request_iterator: Any,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Any:
        """Call and return the response and the call; see grpcio."""
        return self._straight(
            request_iterator, timeout, metadata, credentials, wait_for_ready, compression, True
        )

    def future(
        self,
        request_iterator: Any,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Any:
        """Begin a call and return it as a future; see grpcio."""
        return begin(
            self._core,
            self._method,
            request_iterator,
            timeout,
            metadata,
            (credentials, wait_for_ready, compression),
        )
