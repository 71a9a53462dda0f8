"""The gRPC transport for threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import grpc

from shmcoord.transport._grpc_common import (
    ENDED,
    LEASE_KEY,
    OPTIONS,
    READY,
    Budget,
    Options,
    judge,
    stub_method,
)

__all__ = ["GrpcTransport"]


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
            if state is READY:
                self._ready = not self.spent
            elif self._ready or state in ENDED:
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
        self._options = tuple({**OPTIONS, **dict(options)}.items())
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
        budget = Budget(timeout_s, self._connect_timeout_s)
        with self._link(endpoint) as link:
            call = stub_method(
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
                judged = judge(error)
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
