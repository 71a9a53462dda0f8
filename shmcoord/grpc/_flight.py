"""A call that returned at once: what its object, the real call and the background share.

Theory of operation. `Flight` is the state; `RoutedCall` (in `_calls.py`) is the object that the
user holds. The real call's callback and the background hold the state only, so that a dropped
object is collected, and its call cancelled.

Who first learns that a real call is over (gRPC's thread by the callback, or the user's thread,
which reads) takes the lease out of `Hold` and decides: the call is settled, or it goes elsewhere.
A response counts from the moment at which `responded` is set, under the same lock; one that was
read when it had been decided to go elsewhere is dropped, since the next node sends it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc

from shmcoord.course import NoneReachable
from shmcoord.errors import ShmcoordError
from shmcoord.grpc._ask import Ask
from shmcoord.grpc._bare import CANCELLED, BareStream
from shmcoord.grpc._common import LEASE_KEY, served_by
from shmcoord.grpc._core import ChannelClosed, Core, Method
from shmcoord.grpc._learning import learn
from shmcoord.grpc._once import Leg, proves
from shmcoord.grpc._outcome import outcome
from shmcoord.grpc._refusal import Refusal
from shmcoord.grpc._search import Search
from shmcoord.grpc._served import tell_node
from shmcoord.transport._grpc_common import judge
from shmcoord.transport._grpc_links import Link

if TYPE_CHECKING:
    import concurrent.futures

    from shmcoord.lease import Lease

__all__ = ["Flight", "Hold", "NoRealCall"]

_log = logging.getLogger("shmcoord.grpc")

# How long empty metadata is taken for the beginning of a refusal, in seconds.
_STATUS_FOLLOWS_S = 0.05


class NoRealCall(Exception):
    """There is no real call; the flight's `refusal` says why."""


class Hold:
    """The lease and the link of one real call; given back once, by whoever comes first."""

    __slots__ = ("_lease", "leg", "link")

    def __init__(self, lease: Lease, link: Link) -> None:
        self._lease = [lease]
        self.link = link
        self.leg: Leg | None = None

    def take(self) -> Lease | None:
        """Return the lease, to the first who asks."""
        try:
            return self._lease.pop()  # atomic
        except IndexError:
            return None


class Flight:
    """The state of one call.

    Attributes:
        changed: Guards what follows; notified when any of it changes.
        real: The call under way, or that has ended; None while there is no node for it.
        over: Whether nothing will change any more.
        refusal: How it ended where no real call has; None if one has.
        cause: Why, if there is a reason.
        callbacks: What is called at the end; None once it was.
    """

    __slots__ = (
        "_ask",
        "_began",
        "_context",
        "_core",
        "_hold",
        "_method",
        "_options",
        "_request",
        "_responded",
        "_search",
        "_timeout_s",
        "_untold",
        "_unwanted",
        "_work",
        "callbacks",
        "cause",
        "changed",
        "over",
        "real",
        "refusal",
    )

    def __init__(
        self,
        core: Core,
        method: Method,
        request: Any,
        timeout_s: float | None,
        ask: Ask,
        options: tuple[grpc.CallCredentials | None, bool | None, grpc.Compression | None],
    ) -> None:
        self.changed = threading.Condition()
        self.real: Any = None
        self.over = False
        self.refusal: Refusal | None = None
        self.cause: BaseException | None = None
        self.callbacks: list[Callable[[], Any]] | None = []
        self._core = core
        self._method = method
        self._request = request
        self._timeout_s = timeout_s
        self._ask = ask
        self._options = options
        self._began = time.monotonic()
        self._context = contextvars.copy_context()
        self._hold: Hold | None = None
        self._responded = False
        self._search: Search | None = None
        self._untold: str | None = None
        self._unwanted = False
        self._work: concurrent.futures.Future[None] | None = None

    # --- beginning

    def launch(self, lease: Lease, link: Link) -> None:
        """Begin the real call on a node, unless it is over; takes the lease and the link.

        Raises:
            Exception: Whatever the real call raised.
        """
        core = self._core
        hold = Hold(lease, link)
        credentials, wait, compression = self._options
        request = self._request
        if self.over:  # cancelled meanwhile
            lease.release()
            core.pool.give_back(link)
            return
        try:
            now = time.monotonic()
            left_s = self._timeout_s
            if left_s is not None:
                left_s += self._began - now
            tell_node(lease, now - self._began)
            self._untold = lease.node
            call = link.method(self._method.key, self._method.make)
            is_future = self._method.kind.endswith("_unary")
            token = lease.token
            if core.legs is not None:
                hold.leg = core.legs.begin(token)
            real = (call.future if is_future else call)(
                request,
                left_s,
                ((LEASE_KEY, token), *self._ask.metadata),
                credentials,
                False if wait else wait,  # never for this node
                compression,
            )
        except BaseException:
            lease.release()
            core.pool.give_back(link)
            raise
        if not is_future and not hasattr(real, "add_callback"):
            real = BareStream(real)
        with self.changed:
            late = self.over
            if not late:
                self.real, self._hold = real, hold
                self.changed.notify_all()
        if late:
            real.cancel()
        ended = partial(self.ended, hold, real)
        if is_future:
            real.add_done_callback(lambda _: ended())
        elif not real.add_callback(ended):
            ended()

    def seek(self, hold: Hold | None = None) -> None:
        """Find a node in the background; it may have a lease and a link already."""
        with self.changed:
            self._hold = hold
            refused = self.over
            if not refused:
                try:
                    self._work = self._core.background.run(self._seek)
                except RuntimeError:  # closed meanwhile
                    refused = True
        if refused:
            self._give_back()
            self.refuse(ChannelClosed())

    async def _seek(self) -> None:
        core = self._core
        try:
            search = self._searching()
            while not self.over:
                hold = self._hold
                if hold is None:
                    lease = await search.acquire_async()
                    try:
                        hold = self._hold = Hold(lease, core.pool.take(lease.endpoint))
                    except BaseException:
                        lease.release()
                        raise
                link = hold.link
                if not link.ready:
                    await _settled(link, search.connect_s())
                got = hold.take()
                if got is None:
                    return  # cancelled meanwhile
                self._hold = None
                if link.ready:
                    self._context.run(self.launch, got, link)
                    return
                error = search.not_connected(link)
                core.pool.give_back(link)
                if not search.leave(got, error, False):
                    raise error
        except asyncio.CancelledError:
            self.refuse(ChannelClosed())  # unless the caller has cancelled it: then it is over
            raise
        except Exception as error:  # noqa: BLE001 - it belongs to the caller, whatever it is
            self.refuse(ChannelClosed() if core.closed else error)
        finally:
            if self.real is None:
                self._give_back()

    def _give_back(self) -> None:
        """Give back what was found for a real call that will not be."""
        hold, self._hold = self._hold, None
        lease = None if hold is None else hold.take()
        if hold is not None and lease is not None:
            with contextlib.suppress(ShmcoordError):
                lease.release()
            self._core.pool.give_back(hold.link)

    def _searching(self) -> Search:
        if self._search is None:
            _, wait, _ = self._options
            self._search = Search(
                self._core, self._method.name, self._ask, self._began, self._timeout_s, wait
            )
        return self._search

    # --- ending

    def ended(self, hold: Hold, real: Any) -> None:
        """A real call is over: settle, or go elsewhere. Called by everybody who notices."""
        lease = hold.take()
        if lease is None:
            return
        failure = _failure(real, lease)
        again = False
        error: Exception | None = None
        with self.changed:
            if (
                failure is not None
                and hold is self._hold
                and not (self.over or self._unwanted or self._responded)
                and self._method.kind.startswith("unary_")
            ):
                try:
                    again = self._searching().leave(
                        lease, failure, hold.link.adopts, proves(hold.leg)
                    )
                except (NoneReachable, ShmcoordError) as reason:
                    error = reason
                if again or error is not None:
                    self.real = self._hold = None
            else:
                with contextlib.suppress(ShmcoordError):
                    lease.release()
        if failure is None:
            if hold.link.lessons:
                learn(hold.link, real, lease.node)
            if self._search is None:
                self._core.earn()
        self._core.pool.give_back(hold.link)
        if again:
            self.seek()
        elif error is not None:
            self.refuse(error)
        else:
            self.settle()

    def refuse(self, error: BaseException) -> None:
        """There will be no real call."""
        refusal = _refusal(error, self._core)
        with self.changed:
            if not self.over:
                self.refusal, self.cause = refusal, error
        self.settle()

    def settle(self) -> None:
        """It is over: tell everybody."""
        with self.changed:
            self.over = True
            self._request = None
            callbacks, self.callbacks = self.callbacks, None
            self.changed.notify_all()
        for callback in callbacks or ():
            try:
                callback()
            except Exception:  # noqa: BLE001 - as gRPC: it must not end the thread that calls
                _log.exception("a callback of a call failed")

    def cancel(self) -> bool:
        """End it; False if it is over."""
        with self.changed:
            if self.over:
                return False
            self._unwanted = True  # from here on it does not go elsewhere
            real, work = self.real, self._work
            if real is None:
                self.refusal = CANCELLED
                self.over = True
        if real is None:
            if work is not None:
                work.cancel()
            self._give_back()
            self.settle()
            return True
        if not real.cancel():
            return False  # it has just ended
        with self.changed:
            self.over = True  # its callbacks are called when gRPC has done with it
            self.changed.notify_all()
        return True

    def abandon(self) -> None:
        """The user has dropped it."""
        if not (self.over or self._core.is_foreign()):
            self.cancel()

    # --- asking

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until it is over.

        Raises:
            grpc.FutureTimeoutError: It is not after `timeout_s` seconds.
        """
        if not self.over:
            with self.changed:
                if not self.changed.wait_for(lambda: self.over, timeout_s):
                    raise grpc.FutureTimeoutError
        self.tell()

    def tell(self) -> None:
        """Tell the caller's context which node it was, if that was found in the background."""
        if self._untold is not None:
            served_by.set(self._untold)
            self._untold = None

    def started(self) -> Any:
        """Wait until there is a real call, and return it; None if there never will be one."""
        with self.changed:
            self.changed.wait_for(lambda: self.real is not None or self.over)
            return self.real

    def initial_metadata(self) -> Any:
        """Wait for what the node sends first; None if there is no node."""
        while True:
            real = self.started()
            if real is None:
                return None
            hold = self._hold
            metadata = real.initial_metadata()
            if self._responded:
                return metadata
            if not metadata and self._method.kind.startswith("unary_"):
                # A refusal comes as empty metadata first, and as a status right behind it.
                self._is_replaced(real, _STATUS_FOLLOWS_S)
            if not self._left(hold, real):
                return metadata

    def next_response(self) -> Any:
        """Wait for the next response.

        Raises:
            StopIteration: There are no more.
            grpc.RpcError: The real call's error.
            NoRealCall: There is none.
        """
        while True:
            real = self.real if self._responded else self.started()
            if real is None:
                raise NoRealCall
            hold = self._hold
            if self._untold is not None:
                self.tell()
            try:
                response = next(real)
            except StopIteration:
                if hold is not None:
                    self.ended(hold, real)
                raise
            except grpc.RpcError:
                if hold is not None:
                    self.ended(hold, real)
                if not self._is_replaced(real):
                    raise
                continue
            if not self._responded:
                with self.changed:
                    if self.real is not real:
                        continue
                    self._responded = True
                    self._request = None
            return response

    def is_pumped_by_reading(self) -> bool:
        """Whether the call only goes on while somebody reads, by an option of grpcio."""
        return (
            self._core.single_threaded
            and self._method.kind == "unary_stream"
            and self.real is not None
            and not self.over
        )

    def time_remaining(self) -> float | None:
        """Return what is left of the call's time, in seconds; None without a limit."""
        if self._timeout_s is None:
            return None
        return max(0.0, self._began + self._timeout_s - time.monotonic())

    def _left(self, hold: Hold | None, real: Any) -> bool:
        """Whether that real call has ended before its first response, and another one follows."""
        is_active = getattr(real, "is_active", None)
        if self.real is not real:
            return self.started() is not None
        if hold is None or is_active is None or is_active():
            return False
        self.ended(hold, real)
        return self._is_replaced(real)

    def _is_replaced(self, real: Any, timeout_s: float | None = None) -> bool:
        """Wait until it is decided whether another real call follows this one, which has ended."""
        with self.changed:
            self.changed.wait_for(lambda: self.over or self.real is not real, timeout_s)
            return self.real is not real


def _failure(real: Any, lease: Lease) -> Exception | None:
    """How a real call that is over failed, as the rules of sending see it; None if it did not."""
    code = getattr(real, "code", None)
    if code is None:  # some interceptor's own future
        error = None if real.cancelled() else real.exception()
        return judge(error, lambda: lease.token) if isinstance(error, grpc.RpcError) else error
    if code() in (grpc.StatusCode.OK, None):
        return None
    return judge(real, lambda: lease.token)


def _refusal(error: BaseException, core: Core) -> Refusal:
    if isinstance(error, grpc.RpcError) and not isinstance(error, ShmcoordError):
        return Refusal(error.code(), error.details() or "")
    if isinstance(error, (ShmcoordError, TimeoutError)):
        return outcome(error, core)
    return Refusal(grpc.StatusCode.INTERNAL, f"{type(error).__name__} while starting: {error}")


async def _settled(link: Link, timeout_s: float) -> None:
    """Wait until it is known if there is a connection, or for so many seconds."""
    loop = asyncio.get_running_loop()
    known = asyncio.Event()

    def tell() -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(known.set)

    link.when_settled(tell)
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(known.wait(), timeout_s)
