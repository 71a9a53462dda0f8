"""Calls with one response: the blocking ones, which return what grpcio returns.

The straight path (a node is free and connected, and answers) is all in `_Blocking._send` and
makes no object of its own; whatever goes otherwise makes a `Search`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import grpc

from shmcoord.errors import ForkedHandle, NoBackend, Saturated, ShmcoordError
from shmcoord.grpc._ask import PLAIN, ask_of
from shmcoord.grpc._bases import StreamUnary, UnaryUnary
from shmcoord.grpc._calls import begin
from shmcoord.grpc._common import LEASE_KEY
from shmcoord.grpc._core import CLOSED, ChannelClosed, Core, Method
from shmcoord.grpc._learning import learn
from shmcoord.grpc._outcome import refused
from shmcoord.grpc._search import Search
from shmcoord.grpc._served import tell_node
from shmcoord.transport._grpc_common import judge

__all__ = ["RoutedStreamUnary", "RoutedUnaryUnary"]

_monotonic = time.monotonic


class _Blocking:
    """What both kinds share.

    `_repeats` says whether the request can be sent twice: an iterator cannot.
    """

    _repeats: bool

    def __init__(self, core: Core, method: Method) -> None:
        self._core = core
        self._method = method

    def _send(
        self,
        request: Any,
        timeout: float | None,
        metadata: Iterable[Any] | None,
        credentials: grpc.CallCredentials | None,
        wait_for_ready: bool | None,
        compression: grpc.Compression | None,
        with_call: bool,
    ) -> Any:
        core = self._core
        method = self._method
        if core.closed:
            raise ValueError(CLOSED)
        ask = PLAIN if metadata is None else ask_of(metadata)
        cost, key, sent = ask
        began = _monotonic()
        # A node's endpoint that is dead must not be waited for: the channel is connected, or the
        # call goes elsewhere.
        inner_wait = False if wait_for_ready else wait_for_ready
        wait_s = core.max_wait_s if timeout is None else timeout
        search: Search | None = None
        theirs = False  # what the real call raised
        try:
            while True:
                try:
                    if search is None and wait_s > 0.0:
                        lease = core.acquire(core.group, wait_s, cost, key=key)
                    else:
                        if search is None:
                            search = Search(core, method.name, ask, began, timeout, wait_for_ready)
                        lease = search.acquire()
                except (NoBackend, Saturated) as error:
                    if search is not None:
                        raise
                    search = Search(core, method.name, ask, began, timeout, wait_for_ready)
                    time.sleep(search.pause_s(error))
                    continue
                link = None
                sending = False
                try:
                    link = core.pool.take(lease.endpoint)
                    if not link.ready:
                        if search is None:
                            search = Search(core, method.name, ask, began, timeout, wait_for_ready)
                        if not link.connect(search.connect_s()):
                            raise search.not_connected(link)
                    now = _monotonic()
                    left_s = timeout
                    if timeout is not None:
                        left_s = began + timeout - now
                    tell_node(lease, now - began)
                    call = link.methods.get(method.key) or link.method(method.key, method.make)
                    sending = True
                    if with_call or link.lessons:
                        result = call.with_call(
                            request,
                            left_s,
                            ((LEASE_KEY, lease.token), *sent),
                            credentials,
                            inner_wait,
                            compression,
                        )
                        if link.lessons:
                            learn(link, result[1])
                        if not with_call:
                            result = result[0]
                    else:
                        result = call(
                            request,
                            left_s,
                            ((LEASE_KEY, lease.token), *sent),
                            credentials,
                            inner_wait,
                            compression,
                        )
                except BaseException as error:
                    if link is not None:
                        core.pool.give_back(link)
                    if sending and not self._repeats:  # the iterator has been given away
                        lease.release()
                        theirs = True
                        raise
                    if search is None:
                        search = Search(core, method.name, ask, began, timeout, wait_for_ready)
                    judged = judge(error) if isinstance(error, grpc.RpcError) else error
                    if not search.leave(lease, judged, link is not None and link.adopts):
                        theirs = sending
                        raise
                    error.__traceback__ = None  # or the search and this frame would be a cycle
                    continue
                lease.release()
                core.pool.give_back(link)
                if search is None:
                    core.earn()
                return result
        except ForkedHandle:
            raise
        except (ShmcoordError, TimeoutError) as error:
            if theirs:
                raise
            raise refused(error, core) from error
        except (ValueError, RuntimeError) as error:
            if theirs or not core.closed:
                raise
            raise refused(ChannelClosed(), core) from error


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
        return self._send(
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
        return self._send(
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
        return self._send(
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
        return self._send(
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
