"""Calls with one response: the blocking ones, which return what grpcio returns.

The straight way (a node is free and connected, and answers) is all in `_Blocking._straight`, which
is written for speed: it makes no object of its own, and takes no lock. What goes otherwise makes a
`Search`, in `_send`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from shmcoord.lease import Lease
    from shmcoord.transport._grpc_links import Link

__all__ = ["RoutedStreamUnary", "RoutedUnaryUnary"]

_monotonic = time.monotonic
_NOTHING = (False, 0.0, None, None, None)


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
    ) -> Any:
        """Return the response where all is as usual; what is not is left to `_send`."""
        core = self._core
        if core.closed:
            raise ValueError(CLOSED)
        began = _monotonic()
        lease = link = None
        error: BaseException | None = None
        if metadata is None and not wait_for_ready:
            try:
                lease = core.acquire(core.group, core.max_wait_s if timeout is None else timeout)
            except (NoBackend, Saturated) as reason:
                error = reason
            except ValueError:  # closed meanwhile; no time
                if not core.closed and not (timeout is not None and timeout <= 0.0):
                    raise
            else:
                link = core.links.get(lease.endpoint)
                if link is not None:
                    link.users.append(None)
                    call = link.methods.get(self._method.key)
                    if link.ready and call is not None and not link.lessons:
                        now = _monotonic()
                        tell_node(lease, now - began)
                        try:
                            response = call(
                                request,
                                None if timeout is None else began + timeout - now,
                                ((LEASE_KEY, lease.token),),
                                credentials,
                                wait_for_ready,
                                compression,
                            )
                        except BaseException as reason:  # noqa: BLE001 - it is judged there
                            error = reason
                        else:
                            lease.release()
                            link.users.pop()
                            if link.spent:
                                link.users.append(None)
                                core.pool.give_back(link)
                            core.earn()
                            return response
                    else:
                        core.pool.give_back(link)
                        link = None
        return self._send(
            request,
            timeout,
            metadata,
            credentials,
            wait_for_ready,
            compression,
            (False, began, lease, link, error),
        )

    def _send(
        self,
        request: Any,
        timeout: float | None,
        metadata: Iterable[Any] | None,
        credentials: grpc.CallCredentials | None,
        wait_for_ready: bool | None,
        compression: grpc.Compression | None,
        so_far: tuple[bool, float, Lease | None, Link | None, BaseException | None],
    ) -> Any:
        """Return the response, or the response and the call, by any way.

        Args:
            request, timeout, metadata, credentials, wait_for_ready, compression: As in grpcio.
            so_far: Whether the call is to be returned, too; when it began; the lease, the link and
                the error of the straight way, as far as that led. With a link the real call has
                failed, without one it has not begun.
        """
        core, method = self._core, self._method
        if core.closed and so_far[2] is None:
            raise ValueError(CLOSED)
        with_call, began, lease, link, error = so_far
        so_far = _NOTHING
        ask = PLAIN if metadata is None else ask_of(metadata)
        # A dead endpoint must not be waited for: the channel is connected, or the call goes
        # elsewhere.
        inner_wait = False if wait_for_ready else wait_for_ready
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
                    arguments = (
                        request,
                        None if timeout is None else began + timeout - now,
                        ((LEASE_KEY, lease.token), *ask.metadata),
                        credentials,
                        inner_wait,
                        compression,
                    )
                    sending = True
                    if with_call or link.lessons:
                        result = call.with_call(*arguments)
                        if link.lessons:
                            learn(link, result[1])
                        if not with_call:
                            result = result[0]
                    else:
                        result = call(*arguments)
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
                    judged = judge(reason) if isinstance(reason, grpc.RpcError) else reason
                    if not search.leave(lease, judged, link is not None and link.adopts):
                        theirs = sending
                        raise
                    reason.__traceback__ = None  # or the search and this frame would be a cycle
                    lease = link = None
                    continue
                lease.release()
                core.pool.give_back(link)
                return result
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
        return self._straight(request, timeout, metadata, credentials, wait_for_ready, compression)

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
            request,
            timeout,
            metadata,
            credentials,
            wait_for_ready,
            compression,
            (True, _monotonic(), None, None, None),
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
            request_iterator, timeout, metadata, credentials, wait_for_ready, compression
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
            request_iterator,
            timeout,
            metadata,
            credentials,
            wait_for_ready,
            compression,
            (True, _monotonic(), None, None, None),
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
