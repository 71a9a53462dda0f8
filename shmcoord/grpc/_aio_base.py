"""A routed call on an event loop: what the four kinds of call have in common.

Theory of operation. The call object that a stub returns is ours, since a call may have to wait for
capacity, and may go to another node when the first one refuses. It delegates to grpcio's call
object. At any time it is in one of these states:

- *under way*: `_real` is grpcio's call, `_lease` and `_link` are what it takes: a *leg* of the
  call. Where a node is free and its link connected, a call is under way when the stub returns: no
  task was started for it.
- *waiting*: `_real` is None, and `_task` waits for capacity or for a connection.
- *over*: `_over` is set. If the last leg has ended as the call has, `_real` stays, and all that is
  asked (code, metadata) is asked of it. If there is none, because no node could be had or because
  the call was cancelled while it waited, `_refusal` or `_cancelled` tells.

Who moves it. grpcio runs the done callbacks of its call in the moment in which it learns of the
end, before anybody who awaits that call is woken. There the next state is decided, once: the
lease is given back, and then either the call is over, or the request goes to another node
(`Course.leave`): at once if one is free, else by a task. Whoever awaits us only follows: he awaits
grpcio's call, and when that has failed he looks whether it is still ours. If it is not, he goes on
with the next leg. One exception saves the usual call a third of what it costs here: where somebody
awaits the one response, the callback leaves the decision to him, who learns of the success for
nothing; he is woken in the same turn of the loop. If somebody else asks before, he decides.

Nothing is sent again when something of the call has been seen outside: after the first response
or the initial metadata were handed out (`_committed`), and, for streams of requests, once their
messages are consumed, which grpcio begins when the call begins.

What keeps it alive. As in grpcio, a call with one request and one response runs to its end
even if nobody holds it: grpcio's call holds its done callback, and that holds us. Where somebody
must go on reading (or writing) for the call to end, the callback has only a weak reference
(`WeakEnd`): dropped with its last reference, such a call cancels grpcio's call and so gives the
lease back, at once. While it waits for a node, its task holds it.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import sys
import time
import types
from collections.abc import Callable, Coroutine, Generator
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from shmcoord.course import Course, NoneReachable
from shmcoord.errors import LeaseLost, NoBackend, Saturated, ShmcoordError
from shmcoord.grpc._aio_ends import code_of, drop, error_of, learn
from shmcoord.grpc._ask import PLAIN, ask_of
from shmcoord.grpc._common import LEASE_KEY, served_by
from shmcoord.grpc._once import Leg, proves
from shmcoord.grpc._refusal import Refusal, refusal
from shmcoord.grpc._served import TRACE, tell_span
from shmcoord.transport import ConnectionLost, Unreachable
from shmcoord.transport._grpc_common import judge

if TYPE_CHECKING:
    from shmcoord.backend import Backend
    from shmcoord.grpc._aio_methods import RoutedMethod
    from shmcoord.lease import Lease
    from shmcoord.transport._grpc_aio_links import AioLink

__all__ = ["RoutedCall"]

_log = logging.getLogger("shmcoord.grpc")

_OK = grpc.StatusCode.OK
_MAY_MOVE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.FAILED_PRECONDITION)
_CANCELLED_HERE = "Locally cancelled by application!"  # as grpcio says it

# Who waits for a node to join looks so often, in seconds; and at nodes that did not accept the
# connection, as far as they are still the same processes, twice as long each time up to the second.
_LOOK_EVERY_S = 0.05
_LOOK_AGAIN_MOST_S = 1.0


class RoutedCall:
    """What the four kinds of call have in common.

    Every public method is that of `grpc.aio.Call`, and `debug_error_string` beside, which grpcio's
    own calls have too.
    """

    _is_weak = False

    # What most calls never change is not set in each.
    _real: Any = None
    _lease: Lease | None = None
    _leg: Leg | None = None
    _link: AioLink[grpc.aio.Channel] | None = None
    _task: asyncio.Task[None] | None = None
    _over = False
    _awaited = False  # somebody awaits the one response
    _committed = False
    _cancelled = False
    _refusal: Refusal | None = None
    _cause: BaseException | None = None
    _late = False  # began after the stub returned: whoever awaits is told the node
    _node = ""
    _callbacks: list[Callable[[Any], object]] | None = None
    _watchers: list[asyncio.Future[None]] | None = None
    _made_course: Course | None = None
    _ask = PLAIN
    _patient = False  # it waits for nodes
    _timeout: float | None = None
    _ends_at: float | None = None
    _look_again_at = 0.0
    _look_again_s = _LOOK_EVERY_S
    _patient_until: float | None = None

    def __init__(
        self,
        method: RoutedMethod,
        argument: Any,
        timeout: float | None,
        metadata: Any,
        credentials: grpc.CallCredentials | None,
        wait_for_ready: bool | None,
        compression: grpc.Compression | None,
    ) -> None:
        self._method = method
        self._routes = routes = method.routes
        self._argument = argument
        self._options = (credentials, compression)
        self._context = contextvars.copy_context()
        if metadata:
            self._ask = ask_of(metadata)
        if wait_for_ready:
            self._patient = True
        if timeout is not None:
            self._timeout = timeout
            self._ends_at = time.monotonic() + timeout
        # As `Routes.enter` does, for the usual case.
        try:
            runs = asyncio.get_running_loop() is routes.bound and not routes.closed
        except RuntimeError:
            runs = False
        if not runs:
            runs = routes.enter()
        routes.active += 1
        routes.earn()
        try:
            if timeout is not None and timeout <= 0.0:
                self._refuse(TimeoutError("there was no time for the call"))
            elif runs:
                self._go(routes.max_wait_s if timeout is None else timeout, ())
            else:
                self._wait_in_task(None, None)
        except BaseException:
            self._over = True
            routes.has_ended()
            raise

    @property
    def _course(self) -> Course:
        """What the call has tried; most calls never need it."""
        course = self._made_course
        if course is None:
            left_s = None if self._ends_at is None else self._ends_at - time.monotonic()
            course = self._made_course = Course(
                self._routes.rules, self._routes.group, self._method.name, left_s, earned=True
            )
        return course

    # --- the way to a node

    def _go(self, wait_s: float, exclude: tuple[Backend, ...]) -> None:
        """Begin a leg, at once if a node is free and connected; else have a task wait for it."""
        routes = self._routes
        cost, key, _ = self._ask
        lease: Lease | None = None
        asking: Any = None
        try:
            lease = routes.try_acquire(routes.group, cost, key=key, exclude=exclude)
            if lease is None:
                # Driven by hand up to its first wait: who has to wait queues now, in the order of
                # the calls.
                asking = routes.acquire(routes.group, wait_s, cost, key=key, exclude=exclude)
                awaited = asking.send(None)
        except StopIteration as got:
            lease = got.value
        except (NoBackend, Saturated) as error:
            if self._patient and isinstance(error, NoBackend):
                self._wait_in_task(None, None)
            else:
                self._refuse(self._course.no_lease(error))
            return
        except ShmcoordError as error:
            self._refuse(error)
            return
        else:
            if lease is None:
                self._wait_in_task(None, _resume(asking, awaited))
                return
        assert lease is not None
        link = routes.links.take_ready(lease.endpoint)
        if link is None:
            self._wait_in_task(lease, None)
        else:
            self._begin(lease, link, self._course.left_s() if self._late else self._timeout)

    def _begin(
        self, lease: Lease, link: AioLink[grpc.aio.Channel], timeout_s: float | None
    ) -> None:
        """Begin grpcio's call."""
        method = self._method
        token = (LEASE_KEY, lease.token)
        legs = self._routes.legs
        if legs is not None:
            self._leg = legs.begin(token[1])
        sent = self._ask[2]
        credentials, compression = self._options
        try:
            # Not wait_for_ready: on a connection that breaks just now, it would wait for this one
            # node until the deadline.
            real = (method.reals.get(link) or method.on(link))(
                self._argument,
                timeout=timeout_s,
                metadata=(token, *sent) if sent else (token,),
                credentials=credentials,
                compression=compression,
            )
        except BaseException:
            drop(lease, link, self._routes.links, failed=True)
            raise
        self._real = real
        self._lease = lease
        self._link = link
        self._node = node = lease.node
        if self._late:
            self._wake()
        else:
            if served_by.get() != node:
                served_by.set(node)
            if TRACE in sys.modules:
                tell_span(node, self._routes.group)
        real.add_done_callback(self._weak_end() if self._is_weak else self._real_ended)

    def _weak_end(self) -> Callable[[Any], object]:
        """Return a done callback for grpcio's call that does not keep us alive."""
        raise NotImplementedError

    def _wait_in_task(self, lease: Lease | None, asking: Any) -> None:
        self._late = True
        routes = self._routes
        routes.waiting.add(self)
        self._task = self._context.run(routes.loop.create_task, self._look_for_node(lease, asking))

    async def _look_for_node(self, lease: Lease | None, asking: Any) -> None:
        """Wait for capacity and for the connection, then begin."""
        routes = self._routes
        try:
            while True:
                if lease is None:
                    lease = await self._acquire(asking)
                    asking = None
                link = await self._connect(lease)
                if link is not None:
                    break
                lease = None
            self._task = None
            routes.waiting.discard(self)
            try:
                left_s = self._course.left_s()
            except TimeoutError:
                routes.links.give_back(link, failed=False)
                raise
            taken, lease = lease, None
            self._begin(taken, link, left_s)
        except asyncio.CancelledError:
            if not self._over:  # not by `cancel`: the loop ends
                self._cancelled = True
                self._finish()
            raise
        except Exception as error:  # noqa: BLE001 - it belongs to whoever awaits the call
            self._refuse(error)
        finally:
            if lease is not None and not lease.released:
                lease.release()

    async def _acquire(self, asking: Any) -> Lease:
        routes = self._routes
        course = self._course
        cost, key, _ = self._ask
        while True:
            try:
                if asking is None:
                    left_s = course.left_s()
                    asking = routes.acquire(
                        routes.group,
                        routes.max_wait_s if left_s is None else left_s,
                        cost,
                        key=key,
                        exclude=course.exclude,
                    )
                lease: Lease = await asking
            except NoBackend as error:
                asking = None
                if not self._patient or not await self._pause():
                    raise course.no_lease(error) from None
            except Saturated as error:
                raise course.no_lease(error) from None
            else:
                return lease

    async def _pause(self) -> bool:
        """Wait a moment for a node to join; False if it was waited long enough.

        Nodes whose connection failed are tried again, but less and less often.
        """
        now_s = time.monotonic()
        if self._patient_until is None:
            self._patient_until = now_s + self._routes.max_wait_s
        left_s = self._course.left_s()
        if left_s is None:
            left_s = self._patient_until - now_s
            if left_s <= 0.0:
                return False
        await asyncio.sleep(min(_LOOK_EVERY_S, left_s))
        if self._course.exclude and time.monotonic() >= self._look_again_at:
            self._course.exclude = ()
            self._look_again_at = time.monotonic() + self._look_again_s
            self._look_again_s = min(2 * self._look_again_s, _LOOK_AGAIN_MOST_S)
        return True

    async def _connect(self, lease: Lease) -> AioLink[grpc.aio.Channel] | None:
        """Return a connected link to the node; None if there is none and the lease is left.

        Raises:
            ShmcoordError: There is none, and the call may not go on.
            TimeoutError: The time is over.
        """
        routes = self._routes
        left_s = self._course.left_s()
        most_s = routes.connect_timeout_s
        link = routes.links.take(lease.endpoint)
        try:
            if await link.connect(most_s if left_s is None else min(left_s, most_s)):
                return link
            refused = link.spent
        except BaseException:
            routes.links.give_back(link, failed=True)
            raise
        routes.links.give_back(link, failed=True)
        if not refused:
            self._course.left_s()
        text = f"{lease.endpoint} does not accept the connection"
        if not refused:
            text = f"no connection to {lease.endpoint} within {most_s:g} s"
        error = Unreachable(text)
        if self._patient:
            # That is no retry, so it costs nothing of the host's budget: nothing was sent, and
            # the call has said that it waits for connections.
            lease.release()
            routes.router.mark_unreachable(lease.backend)
            self._course.exclude = (*self._course.exclude, lease.backend)
        else:
            self._course.leave(lease, error)
        return None

    # --- the end of a leg, and of the call

    def _real_ended(self, real: Any) -> None:
        """React to the end of grpcio's call; nothing may be raised here."""
        if real is self._real and (not self._awaited or self._callbacks):
            self._decide()

    def _decide(self) -> None:
        """Decide what the end of grpcio's call means, if that was not done before."""
        real, link, lease = self._real, self._link, self._lease
        if self._over or link is None or lease is None:
            return
        code = code_of(real)
        if link.lessons:
            learn(link, real, code is _OK, lease.node)
        try:
            if code in _MAY_MOVE and not self._committed and self._moves(real, lease, link, code):
                return
        except Exception:  # noqa: BLE001 - grpcio calls us in the middle of its work
            _log.exception("a call that has failed could not be sent elsewhere")
        drop(lease, link, self._routes.links, code is not _OK)
        self._finish()

    def _settle(self) -> None:
        """Decide, if grpcio's call has ended and whoever awaits it was not woken yet."""
        if not self._over and self._real is not None and self._real.done():
            self._decide()

    def _succeed(self) -> None:
        """Note that grpcio's call has given its response."""
        link, lease = self._link, self._lease
        assert link is not None
        assert lease is not None
        if link.lessons:
            learn(link, self._real, True, lease.node)
        lease.release()
        if link.retired or self._late or self._callbacks:
            self._routes.links.give_back(link, failed=False)
            self._finish()
            return
        # What `give_back` and `_finish` would do.
        link.calls -= 1
        self._over = True
        self._lease = self._argument = None
        routes = self._routes
        routes.active -= 1
        if routes.idle_event is not None:
            routes.check_idle()

    def _moves(
        self,
        real: Any,
        lease: Lease,
        link: AioLink[grpc.aio.Channel],
        code: grpc.StatusCode,
    ) -> bool:
        """Send the request elsewhere if the rules allow it; else the leg's end is the call's."""
        judged = judge(error_of(real, code), lambda: lease.token)
        if not isinstance(judged, (LeaseLost, ConnectionLost)):
            return False
        course = self._course
        refused: Exception | None = None
        try:
            if not course.leave(lease, judged, link.adopts, proves=proves(self._leg)):
                return False
        except NoneReachable as spent:
            refused = spent
        drop(lease, link, self._routes.links, failed=True)
        self._real = self._lease = self._link = None
        self._late = True
        try:
            if self._routes.links.closed:  # the channel is being closed
                self._cancelled = True
                self._finish()
                return True
            if refused is not None:
                raise refused
            left_s = course.left_s()
            wait_s = self._routes.max_wait_s if left_s is None else left_s
            self._context.copy().run(self._go, wait_s, course.exclude)
        except Exception as failed:  # noqa: BLE001 - it belongs to whoever awaits the call
            self._refuse(failed)
        return True

    def _refuse(self, error: Exception) -> None:
        """End the call without a leg, with a status that is made here."""
        if self._over:
            return
        self._task = None
        routes = self._routes
        if isinstance(error, (ShmcoordError, TimeoutError)):
            self._refusal = refusal(error, routes.router, routes.group)
        elif routes.router.closed or isinstance(error, grpc.aio.UsageError):
            self._refusal = Refusal(grpc.StatusCode.UNAVAILABLE, str(error))
        else:
            self._refusal = Refusal(grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}")
        self._cause = error.with_traceback(None)
        self._finish()

    def _finish(self) -> None:
        self._over = True
        self._lease = self._argument = None
        routes = self._routes
        routes.active -= 1
        if routes.idle_event is not None:
            routes.check_idle()
        if self._late:
            routes.waiting.discard(self)
            self._wake()
        if self._callbacks:
            callbacks, self._callbacks = self._callbacks, None
            for callback in callbacks:
                try:
                    callback(self)
                except Exception as error:  # noqa: BLE001 - it is told to the loop
                    self._routes.loop.call_exception_handler(
                        {
                            "message": f"a done callback of a call has failed: {callback!r}",
                            "exception": error,
                        }
                    )

    def _outcome(self) -> BaseException:
        """What is raised for a call that has ended without a leg."""
        if self._refusal is None:
            return asyncio.CancelledError()
        code, details, trailing = self._refusal
        error = grpc.aio.AioRpcError(
            code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), details, details
        )
        error.__cause__ = self._cause
        return error

    # --- following

    def _change(self) -> asyncio.Future[None]:
        """Something to await where there is no leg: it is done at the next change."""
        watcher: asyncio.Future[None] = self._routes.loop.create_future()
        if self._watchers is None:
            self._watchers = []
        self._watchers.append(watcher)
        return watcher

    def _wake(self) -> None:
        if self._watchers:
            watchers, self._watchers = self._watchers, None
            for watcher in watchers:
                if not watcher.done():
                    watcher.set_result(None)

    def _tell(self) -> None:
        """Tell whoever awaits which node serves, if he could not be told by the stub."""
        if self._late and self._node:
            served_by.set(self._node)
            if TRACE in sys.modules:
                tell_span(self._node, self._routes.group)

    async def _some_real(self) -> Any:
        """Wait for grpcio's call; None if we have ended without."""
        while self._real is None and not self._over:
            await self._change()
        return self._real

    async def _real_or_error(self) -> Any:
        """Wait for grpcio's call.

        Raises:
            grpc.aio.AioRpcError: There will be none.
            asyncio.CancelledError: We were cancelled.
        """
        real = self._real
        if real is None:
            real = await self._some_real()
            if real is None:
                raise self._outcome()
        return real

    async def _last_real(self) -> Any:
        """Wait for the end; return grpcio's last call, None if we have ended without."""
        while not self._over:
            real = await self._some_real()
            if real is not None:
                try:
                    await real.code()
                except Exception:  # noqa: BLE001 - an interceptor's; asked for again below
                    break
                self._settle()
                if real is self._real:
                    break
        return self._real

    def _is_final(self, real: Any) -> bool:
        """Whether the failure of grpcio's call is ours."""
        if real is self._real:
            self._settle()
        return real is self._real

    # --- grpc.aio.Call

    def cancelled(self) -> bool:
        """Whether the call was cancelled."""
        self._settle()
        real = self._real
        return self._cancelled if real is None else bool(real.cancelled())

    def done(self) -> bool:
        """Whether the call has ended."""
        self._settle()
        return self._over

    def cancel(self) -> bool:
        """Cancel the call; False if it had ended."""
        self._settle()
        if self._over:
            return False
        real = self._real
        if real is not None:
            cancelled = bool(real.cancel())
            self._settle()
            return cancelled
        self._cancelled = True
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
        self._finish()
        return True

    def add_done_callback(self, callback: Callable[[Any], object]) -> None:
        """Have a function called with this object at the end of the call, or now if it was."""
        self._settle()
        if self._over:
            callback(self)
        elif self._callbacks is None:
            self._callbacks = [callback]
        else:
            self._callbacks.append(callback)

    def time_remaining(self) -> float | None:
        """Return what is left of the call's time, in seconds; None without a deadline."""
        return None if self._ends_at is None else max(0.0, self._ends_at - time.monotonic())

    async def initial_metadata(self) -> grpc.aio.Metadata:
        """Wait for the initial metadata; from then on the call stays with its node."""
        while True:
            real = await self._some_real()
            if real is None:
                return grpc.aio.Metadata()
            metadata: grpc.aio.Metadata = await real.initial_metadata()
            if real is self._real:
                self._committed = True
                return metadata

    async def trailing_metadata(self) -> grpc.aio.Metadata:
        """Wait for the trailing metadata."""
        real = await self._last_real()
        if real is None:
            trailing = () if self._refusal is None else self._refusal.trailing
            return grpc.aio.Metadata(*trailing)
        metadata: grpc.aio.Metadata = await real.trailing_metadata()
        return metadata

    async def code(self) -> grpc.StatusCode:
        """Wait for the status code."""
        real = await self._last_real()
        if real is None:
            return grpc.StatusCode.CANCELLED if self._refusal is None else self._refusal.code
        code: grpc.StatusCode = await real.code()
        return code

    async def details(self) -> str:
        """Wait for the message of the status."""
        real = await self._last_real()
        if real is None:
            return _CANCELLED_HERE if self._refusal is None else self._refusal.details
        details: str = await real.details()
        return details

    async def debug_error_string(self) -> str:
        """Wait for what gRPC says of the failure."""
        real = await self._last_real()
        if real is None:
            return await self.details()
        text: str = await real.debug_error_string()
        return text

    async def wait_for_connection(self) -> None:
        """Wait until the call is under way.

        Raises:
            grpc.aio.AioRpcError: It could not be.
        """
        while True:
            real = await self._real_or_error()
            self._tell()
            try:
                await real.wait_for_connection()
            except grpc.aio.AioRpcError:
                if self._is_final(real):
                    raise
            else:
                if real is self._real:
                    return

    def __repr__(self) -> str:
        if self._real is not None:
            return f"<{type(self).__name__} to {self._node} of {self._real!r}>"
        if self._refusal is not None:
            return f"<{type(self).__name__}, {self._refusal.code}: {self._refusal.details}>"
        state = "cancelled" if self._cancelled else "waits for a node"
        return f"<{type(self).__name__} of {self._method.name}, {state}>"


@types.coroutine
def _resume(asking: Coroutine[Any, Any, Lease], awaited: Any) -> Generator[Any, Any, Lease]:
    """Await a coroutine that was driven up to its first wait."""
    try:
        while True:
            try:
                sent = yield awaited
            except BaseException as error:  # noqa: BLE001 - it is the coroutine's
                awaited = asking.throw(error)
            else:
                awaited = asking.send(sent)
    except StopIteration as end:
        lease: Lease = end.value
        return lease
