"""What is asked of grpcio's call in the moment in which it has ended."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from shmcoord.grpc._common import NODE_KEY, node_value

if TYPE_CHECKING:
    from shmcoord.grpc._aio_base import RoutedCall
    from shmcoord.lease import Lease
    from shmcoord.transport._grpc_aio_links import AioLink, AioLinks

__all__ = ["WeakEnd", "code_of", "drop", "error_of", "learn"]


def code_of(real: Any) -> grpc.StatusCode | None:
    """Return the code of a call that has ended; None if an interceptor has failed otherwise."""
    try:
        code: grpc.StatusCode = now(real.code())
    except Exception:  # noqa: BLE001 - whoever awaits the call gets it
        return None
    return code


def error_of(real: Any, code: grpc.StatusCode) -> grpc.aio.AioRpcError:
    """Return the error with which grpcio's call has ended."""
    debug = getattr(real, "debug_error_string", None)  # the public interface lacks it
    return grpc.aio.AioRpcError(
        code,
        now(real.initial_metadata()),
        now(real.trailing_metadata()),
        now(real.details()),
        None if debug is None else now(debug()),
    )


def learn(link: AioLink[grpc.aio.Channel], real: Any, succeeded: bool, node: str) -> None:
    """Note if a response names its node: then the node adopts leases.

    It must be the one that was called: a gateway may copy the name of another. After some that do
    not, no more are looked at; failures do not count, since they may have been made here.
    """
    try:
        trailing = now(real.trailing_metadata())
    except Exception:  # noqa: BLE001 - an interceptor's; whoever awaits the call gets it
        return
    if any(key == NODE_KEY and value == node_value(node) for key, value in trailing or ()):
        link.adopts = True
        link.lessons = 0
    elif succeeded:
        link.lessons -= 1


def drop(
    lease: Lease,
    link: AioLink[grpc.aio.Channel],
    links: AioLinks[grpc.aio.Channel],
    failed: bool,
) -> None:
    """Give back what a leg has taken."""
    if not lease.released:
        lease.release()
    links.give_back(link, failed=failed)


class WeakEnd:
    """The done callback of grpcio's call that does not keep the routed call alive.

    Attributes:
        kept: The routed call, where it is kept alive all the same.
    """

    __slots__ = ("_lease", "_link", "_links", "_owner", "kept")

    def __init__(
        self,
        owner: RoutedCall,
        lease: Lease,
        link: AioLink[grpc.aio.Channel],
        links: AioLinks[grpc.aio.Channel],
    ) -> None:
        self.kept: RoutedCall | None = None
        self._owner = weakref.ref(owner)
        self._lease = lease
        self._link = link
        self._links = links

    def __call__(self, real: Any) -> None:
        """React to the end of grpcio's call."""
        owner = self._owner()  # before it is let go
        self.kept = None
        if owner is not None:
            owner._real_ended(real)
        else:
            drop(self._lease, self._link, self._links, code_of(real) is not grpc.StatusCode.OK)


def now(coroutine: Any) -> Any:
    """Return the result of a coroutine that need not wait, such as `call.code()` after its end.

    Raises:
        RuntimeError: It would have to wait.
    """
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    coroutine.close()
    raise RuntimeError("the call has not ended")
