"""Transports over gRPC, and the two things that a gRPC server does with a lease.

The method of a call is the name of a method of the generated stub:

    dispatcher = Dispatcher(router, GrpcTransport(stub=NodeStub), adopts=True)
    answer = dispatcher.call("GREEN", "Answer", AnswerRequest(...), timeout_s=2.0)

The lease token travels in the metadata, and the server takes it from there:

    def Answer(self, request, context):
        try:
            request_slot = node.adopt(lease_token(context))
        except LeaseLost:
            refuse_lost_lease(context)
        with request_slot:
            ...

There is one channel per endpoint, made at the first call and kept while it is connected. A call
goes out only on a connected channel; if none can be had, certainly nothing was sent and the call
is `Unreachable`. Status UNAVAILABLE after that is a `ConnectionLost`, which is a `grpc.RpcError`
as well; every other error is the `grpc.RpcError` (`grpc.aio.AioRpcError`) as it came.

A channel is used for one connection: when that ends, the next call makes a new channel, and the
old one is closed as soon as the calls on it have ended (a node that drains still answers them).
So there is no back-off left from earlier attempts: a node that is gone is noticed at once, and
so is one that is back.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NoReturn

try:
    import grpc
    import grpc.aio
except ModuleNotFoundError as _missing:
    raise ModuleNotFoundError(
        "shmcoord.transport.grpc needs grpcio: pip install shmcoord[grpc]", name=_missing.name
    ) from _missing

from shmcoord.errors import LeaseLost
from shmcoord.transport import ConnectionLost, Unreachable

__all__ = [
    "LEASE_KEY",
    "LEASE_LOST_KEY",
    "AioGrpcConnectionLost",
    "AsyncGrpcTransport",
    "GrpcConnectionLost",
    "GrpcTransport",
    "lease_token",
    "refuse_lost_lease",
    "refuse_lost_lease_async",
]

LEASE_KEY = "shmcoord-lease"
"""Metadata key under which the lease token travels to the node."""

LEASE_LOST_KEY = "shmcoord-lease-lost"
"""Trailing metadata key by which a node says that it refused a lease before doing anything."""

_REFUSED = "the lease was lost before the request came; nothing was done"

_READY = grpc.ChannelConnectivity.READY
_ENDED = (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN)

# A fresh channel must not inherit the back-off of an earlier one from gRPC's shared pool.
_OPTIONS: dict[str, Any] = {"grpc.use_local_subchannel_pool": 1}

Options = Sequence[tuple[str, Any]]


class GrpcConnectionLost(ConnectionLost, grpc.RpcError):
    """The connection failed after the request may have been sent; the code is UNAVAILABLE.

    It can be caught as `ConnectionLost` and as `grpc.RpcError`; gRPC's own error is its cause.
    """

    def __init__(self, error: grpc.RpcError) -> None:
        super().__init__(error.details() or "the connection was lost")
        self._error = error

    def code(self) -> grpc.StatusCode:
        """Return the status code."""
        return self._error.code()

    def details(self) -> str | None:
        """Return what gRPC says of the failure."""
        return self._error.details()

    def trailing_metadata(self) -> Any:
        """Return the trailing metadata."""
        return self._error.trailing_metadata()


class AioGrpcConnectionLost(ConnectionLost, grpc.aio.AioRpcError):
    """The same from an event loop: a `ConnectionLost` and a `grpc.aio.AioRpcError`."""

    def __str__(self) -> str:
        return self.details() or "the connection was lost"


def _judge(error: grpc.RpcError) -> Exception:
    """Return what a transport shall raise for gRPC's error: often the error itself."""
    code = error.code()
    trailing: Any = error.trailing_metadata() or ()
    if code is grpc.StatusCode.UNAVAILABLE:
        if isinstance(error, grpc.aio.AioRpcError):
            return AioGrpcConnectionLost(
                code,
                error.initial_metadata(),
                trailing,
                error.details(),
                error.debug_error_string(),
            )
        return GrpcConnectionLost(error)
    if code is grpc.StatusCode.FAILED_PRECONDITION and any(
        key == LEASE_LOST_KEY for key, _ in trailing
    ):
        return LeaseLost(error.details() or _REFUSED)
    return error


def _method(stub: Any, name: str, kind: type, *others: type) -> Callable[..., Any]:
    """Return a method of the stub.

    Raises:
        ValueError: It has none of that name, or it is of another kind (streams or not).
    """
    method: Callable[..., Any] | None = getattr(stub, name, None)
    if method is None:
        known = ", ".join(sorted(n for n in vars(stub) if not n.startswith("_"))) or "none"
        raise ValueError(f"{type(stub).__name__} has no method {name!r}; it has: {known}")
    if isinstance(method, others):
        raise ValueError(f"{name} is not a {kind.__name__.removesuffix('MultiCallable')} method")
    return method


class _Budget:
    """The time that one call has for connecting and for all of it."""

    def __init__(self, timeout_s: float | None, connect_timeout_s: float) -> None:
        self._ends = None if timeout_s is None else time.monotonic() + timeout_s
        self._connect_timeout_s = connect_timeout_s
        self.connect_s = connect_timeout_s
        if timeout_s is not None:
            self.connect_s = max(0.0, min(connect_timeout_s, timeout_s))

    def not_connected(self, endpoint: str, refused: bool) -> Exception:
        if refused:
            return Unreachable(f"{endpoint} does not accept the connection")
        if self._ends is not None and time.monotonic() >= self._ends:
            return TimeoutError(f"the time-out passed while connecting to {endpoint}")
        return Unreachable(f"no connection to {endpoint} within {self._connect_timeout_s:g} s")

    def left_s(self) -> float | None:
        return None if self._ends is None else max(0.0, self._ends - time.monotonic())


# --- client side, threads


class _Link:
    """A channel for one connection, its stub, and the number of calls that it carries.

    The state of a channel is told to threads by callback only. It stays subscribed while the
    connection lasts (gRPC looks five times a second), so that its end is seen between calls.
    """

    def __init__(self, channel: grpc.Channel, stub: Any) -> None:
        self.stub = stub
        self.calls = 0
        self.spent = False
        self._channel = channel
        self._ready = False
        self._changed = threading.Condition()
        channel.subscribe(self._on_state, try_to_connect=True)

    def connect(self, timeout_s: float) -> bool:
        """Wait at most `timeout_s` seconds for the connection; tell if there is one."""
        if self._ready:
            return True
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self.spent, timeout_s)
            return self._ready

    def close(self) -> None:
        """Close the channel, which cancels the calls on it."""
        with self._changed:
            self.spent = True
            self._ready = False
            self._changed.notify_all()
        self._channel.unsubscribe(self._on_state)
        self._channel.close()

    def close_later(self) -> None:
        """Close the channel without waiting for gRPC's watching thread, which takes 0.2 s."""
        threading.Thread(target=self.close, name="shmcoord-close", daemon=True).start()

    def _on_state(self, state: grpc.ChannelConnectivity) -> None:
        with self._changed:
            if state is _READY:
                self._ready = not self.spent
            elif self._ready or state in _ENDED:
                self._ready = False
                self.spent = True
            self._changed.notify_all()
            spent = self.spent
        if spent:
            self._channel.unsubscribe(self._on_state)


class GrpcTransport:
    """Sends requests over gRPC from the calling thread."""

    def __init__(
        self,
        stub: Callable[[grpc.Channel], Any],
        *,
        connect_timeout_s: float = 1.0,
        credentials: grpc.ChannelCredentials | None = None,
        options: Options = (),
    ) -> None:
        """Make a transport; it connects to an endpoint when the first call goes there.

        Args:
            stub: The generated stub class, or any callable that makes a stub from a channel.
            connect_timeout_s: Longest wait for a connection, in seconds.
            credentials: For encrypted channels; None for plain ones.
            options: gRPC channel options.
        """
        self._stub = stub
        self._connect_timeout_s = connect_timeout_s
        self._credentials = credentials
        self._options = tuple({**_OPTIONS, **dict(options)}.items())
        self._lock = threading.Lock()
        self._current: dict[str, _Link] = {}
        self._open: set[_Link] = set()
        self._closed = False

    def send(
        self, endpoint: str, method: str, request: Any, *, lease: str, timeout_s: float | None
    ) -> Any:
        """Call a unary method of the stub; see `shmcoord.transport.Transport.send`.

        Raises:
            ValueError: The stub has no such method, or it streams.
            grpc.RpcError: The call failed otherwise.
        """
        budget = _Budget(timeout_s, self._connect_timeout_s)
        with self._link(endpoint) as link:
            call = _method(
                link.stub,
                method,
                grpc.UnaryUnaryMultiCallable,
                grpc.UnaryStreamMultiCallable,
                grpc.StreamUnaryMultiCallable,
                grpc.StreamStreamMultiCallable,
            )
            if not link.connect(budget.connect_s):
                raise budget.not_connected(endpoint, link.spent)
            try:
                return call(request, timeout=budget.left_s(), metadata=((LEASE_KEY, lease),))
            except grpc.RpcError as error:
                judged = _judge(error)
                if judged is error:
                    raise
                raise judged from error

    def close(self) -> None:
        """Close all channels; calls under way are cancelled."""
        with self._lock:
            self._closed = True
            links = list(self._open)
            self._open.clear()
            self._current.clear()
        for link in links:
            link.close()

    def __enter__(self) -> GrpcTransport:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @contextmanager
    def _link(self, endpoint: str) -> Iterator[_Link]:
        """Lend the link to an endpoint for one call."""
        old: _Link | None = None
        with self._lock:
            if self._closed:
                raise RuntimeError("the transport is closed")
            link = self._current.get(endpoint)
            if link is None or link.spent:
                if link is not None and link.calls == 0:
                    old = link
                    self._open.discard(old)
                link = self._make(endpoint)
            link.calls += 1
        if old is not None:
            old.close_later()
        try:
            yield link
        finally:
            with self._lock:
                link.calls -= 1
                done = link.spent and link.calls == 0 and link in self._open
                if done:
                    self._open.discard(link)
                    if self._current.get(endpoint) is link:
                        del self._current[endpoint]
            if done:
                link.close_later()

    def _make(self, endpoint: str) -> _Link:
        if self._credentials is None:
            channel = grpc.insecure_channel(endpoint, self._options)
        else:
            channel = grpc.secure_channel(endpoint, self._credentials, self._options)
        link = self._current[endpoint] = _Link(channel, self._stub(channel))
        self._open.add(link)
        return link


# --- client side, event loop


class _AioLink:
    """A channel for one connection on an event loop, its stub and its calls."""

    def __init__(self, channel: grpc.aio.Channel, stub: Any) -> None:
        self.stub = stub
        self.calls = 0
        self._channel = channel
        self._was_ready = False
        self._closed = False
        self._settling: asyncio.Task[None] | None = None

    @property
    def spent(self) -> bool:
        """Whether its connection has ended or could not be made."""
        if self._closed:
            return True
        state = self._channel.get_state()
        return state in _ENDED or (self._was_ready and state is not _READY)

    async def connect(self, timeout_s: float) -> bool:
        """Wait at most `timeout_s` seconds for the connection; tell if there is one."""
        if self._is_ready():
            return True
        if self._settling is None:
            # One task for all calls that wait: gRPC's own wait cannot be given up.
            self._settling = asyncio.ensure_future(self._settle())
        await asyncio.wait((self._settling,), timeout=timeout_s)
        return self._is_ready()

    async def close(self) -> None:
        """Close the channel, which cancels the calls on it."""
        self._closed = True
        await self._channel.close(None)
        if self._settling is not None:
            await asyncio.wait((self._settling,))

    def _is_ready(self) -> bool:
        if self._closed or self._channel.get_state(try_to_connect=True) is not _READY:
            return False
        self._was_ready = True
        return True

    async def _settle(self) -> None:
        while not self._closed:
            state = self._channel.get_state(try_to_connect=True)
            if state is _READY or state in _ENDED:
                return
            await self._channel.wait_for_state_change(state)


class AsyncGrpcTransport:
    """Sends requests over gRPC on an event loop, the one on which its first call runs."""

    def __init__(
        self,
        stub: Callable[[grpc.aio.Channel], Any],
        *,
        connect_timeout_s: float = 1.0,
        credentials: grpc.ChannelCredentials | None = None,
        options: Options = (),
    ) -> None:
        """Make a transport; arguments as those of `GrpcTransport`."""
        self._stub = stub
        self._connect_timeout_s = connect_timeout_s
        self._credentials = credentials
        self._options = tuple({**_OPTIONS, **dict(options)}.items())
        self._loop: asyncio.AbstractEventLoop | None = None
        self._current: dict[str, _AioLink] = {}
        self._open: set[_AioLink] = set()
        self._closed = False

    async def send(
        self, endpoint: str, method: str, request: Any, *, lease: str, timeout_s: float | None
    ) -> Any:
        """Call a unary method of the stub; see `shmcoord.transport.Transport.send`.

        Raises:
            ValueError: The stub has no such method, or it streams.
            grpc.aio.AioRpcError: The call failed otherwise.
        """
        budget = _Budget(timeout_s, self._connect_timeout_s)
        link = await self._take(endpoint)
        try:
            call = _method(
                link.stub,
                method,
                grpc.aio.UnaryUnaryMultiCallable,
                grpc.aio.UnaryStreamMultiCallable,
                grpc.aio.StreamUnaryMultiCallable,
                grpc.aio.StreamStreamMultiCallable,
            )
            if not await link.connect(budget.connect_s):
                raise budget.not_connected(endpoint, link.spent)
            return await call(request, timeout=budget.left_s(), metadata=((LEASE_KEY, lease),))
        except grpc.aio.AioRpcError as error:
            judged = _judge(error)
            if judged is error:
                raise
            raise judged from error
        finally:
            await self._give_back(endpoint, link)

    async def stream(
        self, endpoint: str, method: str, request: Any, *, lease: str, timeout_s: float | None
    ) -> AsyncIterator[Any]:
        """Call a method of the stub that streams its responses, and yield them.

        Closing the iterator cancels the call. Errors as those of `send`; see also
        `shmcoord.transport.AsyncTransport.stream`.
        """
        budget = _Budget(timeout_s, self._connect_timeout_s)
        link = await self._take(endpoint)
        call: Any = None
        try:
            start = _method(
                link.stub,
                method,
                grpc.aio.UnaryStreamMultiCallable,
                grpc.aio.UnaryUnaryMultiCallable,
                grpc.aio.StreamUnaryMultiCallable,
                grpc.aio.StreamStreamMultiCallable,
            )
            if not await link.connect(budget.connect_s):
                raise budget.not_connected(endpoint, link.spent)
            call = start(request, timeout=budget.left_s(), metadata=((LEASE_KEY, lease),))
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as error:
            judged = _judge(error)
            if judged is error:
                raise
            raise judged from error
        finally:
            if call is not None:
                call.cancel()  # nothing happens if it has ended
            await self._give_back(endpoint, link)

    async def close(self) -> None:
        """Close all channels; calls under way are cancelled."""
        self._closed = True
        links = list(self._open)
        self._open.clear()
        self._current.clear()
        for link in links:
            await link.close()

    async def __aenter__(self) -> AsyncGrpcTransport:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _take(self, endpoint: str) -> _AioLink:
        """Lend the link to an endpoint for one call."""
        if self._closed:
            raise RuntimeError("the transport is closed")
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise RuntimeError("the transport belongs to another event loop; make one per loop")
        link = self._current.get(endpoint)
        if link is not None and link.spent:
            del self._current[endpoint]
            if link.calls == 0:
                await self._close(link)
            link = self._current.get(endpoint)
        if link is None:
            if self._credentials is None:
                channel = grpc.aio.insecure_channel(endpoint, self._options)
            else:
                channel = grpc.aio.secure_channel(endpoint, self._credentials, self._options)
            link = self._current[endpoint] = _AioLink(channel, self._stub(channel))
            self._open.add(link)
        link.calls += 1
        return link

    async def _give_back(self, endpoint: str, link: _AioLink) -> None:
        """Take the link back after a call, and close it if its connection has ended."""
        link.calls -= 1
        if link.calls == 0 and link.spent:
            if self._current.get(endpoint) is link:
                del self._current[endpoint]
            await self._close(link)

    async def _close(self, link: _AioLink) -> None:
        self._open.discard(link)
        await link.close()


# --- server side


def lease_token(context: Any) -> str | None:
    """Return the lease token that came with a request, or None if it has none.

    Args:
        context: The servicer context of the request, of a threaded server or of grpc.aio.
    """
    for key, value in context.invocation_metadata() or ():
        if key == LEASE_KEY:
            return value if isinstance(value, str) else value.decode("ascii", "replace")
    return None


def refuse_lost_lease(context: grpc.ServicerContext) -> NoReturn:
    """End a request whose lease was lost; nothing of it may have been done.

    The router's side then raises `LeaseLost`, and its dispatcher tries another node.
    """
    context.set_trailing_metadata(((LEASE_LOST_KEY, "1"),))
    context.abort(grpc.StatusCode.FAILED_PRECONDITION, _REFUSED)


async def refuse_lost_lease_async(context: grpc.aio.ServicerContext[Any, Any]) -> NoReturn:
    """End a request of a grpc.aio server whose lease was lost; as `refuse_lost_lease`."""
    await context.abort(grpc.StatusCode.FAILED_PRECONDITION, _REFUSED, ((LEASE_LOST_KEY, "1"),))
