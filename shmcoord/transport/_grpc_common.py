"""What both gRPC transports share: keys, errors, and the time of one call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import grpc
import grpc.aio

from shmcoord.errors import LeaseLost
from shmcoord.transport import ConnectionLost, Unreachable

LEASE_KEY = "shmcoord-lease"
"""Metadata key under which the lease token travels to the node."""

LEASE_LOST_KEY = "shmcoord-lease-lost"
"""Trailing metadata key by which a node says that it refused a lease before doing anything.

Its value is the token that was refused: a refusal that a gateway copied from elsewhere has another.
"""

_RETRY_KEY = "grpc-previous-rpc-attempts"

REFUSED = "the lease was lost before the request came; nothing was done"

READY = grpc.ChannelConnectivity.READY
ENDED = (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN)

# A fresh channel must not inherit the back-off of an earlier one from gRPC's shared pool.
OPTIONS: dict[str, Any] = {"grpc.use_local_subchannel_pool": 1}

LESSONS = 16
"""Responses without the key that tells of adopting nodes, after which no more are looked at."""

Options = Sequence[tuple[str, Any]]


def token_in(metadata: Iterable[Any] | None) -> str | None:
    """Return the lease token in the metadata of a request, None if there is none.

    If there are several, the first: our channels put theirs before what interceptors add.
    """
    for key, value in metadata or ():
        if key == LEASE_KEY:
            return value if isinstance(value, str) else value.decode("ascii", "replace")
    return None


def is_retry(metadata: Iterable[Any] | None) -> bool:
    """Whether a request is a repetition that gRPC itself has made by a service config (gRFC A6)."""
    return any(pair[0] == _RETRY_KEY for pair in metadata or ())


def without_retries(options: Options) -> Options:
    """Return the options for a link of a channel that routes.

    gRPC's own retries are off unless the user gives a service config, or asks for them: a link is
    one connection, so there is nothing to retry on; where a call may go after a failure is said by
    the lease. Without that layer a call takes 3 % less time, as much as the lease in its metadata
    costs.
    """
    if any(name in ("grpc.service_config", "grpc.enable_retries") for name, _ in options):
        return options
    return (("grpc.enable_retries", 0), *options)


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


def judge(error: grpc.RpcError, token: Callable[[], str]) -> Exception:
    """Return what a transport shall raise for gRPC's error: often the error itself.

    Args:
        error: It.
        token: Returns the token of the lease that was sent.
    """
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
    if code is grpc.StatusCode.FAILED_PRECONDITION:
        refused = [value for key, value in trailing if key == LEASE_LOST_KEY]
        if refused and token() in refused:
            return LeaseLost(error.details() or REFUSED)
    return error


def stub_method(stub: Any, name: str, kind: type, *others: type) -> Callable[..., Any]:
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


class Budget:
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
