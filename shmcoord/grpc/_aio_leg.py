"""One leg of a routed call: a lease, a link, and grpcio's call on it; they end together."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from shmcoord.grpc._aio_metadata import now
from shmcoord.grpc._common import NODE_KEY

if TYPE_CHECKING:
    from shmcoord.grpc._aio_base import RoutedCall
    from shmcoord.lease import Lease
    from shmcoord.transport._grpc_aio_links import AioLink, AioLinks

__all__ = ["Leg"]

_OK = grpc.StatusCode.OK


class Leg:
    """The done callback of grpcio's call: whatever ended that, the lease goes back.

    Attributes:
        lease: The unit of the node's capacity; None once it was given back.
        link: The link that the call is on.
        real: grpcio's call.
        owner: The routed call, or a weak reference to it where it shall be dropped with its
            user's last reference; None once the leg has ended.
    """

    __slots__ = ("lease", "link", "links", "owner", "real")

    def __init__(
        self,
        owner: RoutedCall | weakref.ref[RoutedCall],
        lease: Lease,
        link: AioLink[grpc.aio.Channel],
        links: AioLinks[grpc.aio.Channel],
    ) -> None:
        self.owner: RoutedCall | weakref.ref[RoutedCall] | None = owner
        self.lease: Lease | None = lease
        self.link = link
        self.links = links
        self.real: Any = None

    def __call__(self, real: Any) -> None:
        """React to the end of grpcio's call."""
        owner = self.owner
        self.owner = None
        if isinstance(owner, weakref.ref):
            owner = owner()
        code = self._code()
        if not self.link.adopts and self._names_node():
            self.link.adopts = True
        if owner is None:
            self.drop(failed=code is not _OK)
        else:
            owner._leg_ended(self, code)

    def drop(self, *, failed: bool) -> None:
        """Give back the lease and the link."""
        lease = self.lease
        if lease is not None:
            self.lease = None
            if not lease.released:
                lease.release()
        self.links.give_back(self.link, failed=failed)

    def error(self, code: grpc.StatusCode) -> grpc.aio.AioRpcError:
        """Return the error with which grpcio's call has ended."""
        real = self.real
        debug = getattr(real, "debug_error_string", None)  # the public interface lacks it
        return grpc.aio.AioRpcError(
            code,
            now(real.initial_metadata()),
            now(real.trailing_metadata()),
            now(real.details()),
            None if debug is None else now(debug()),
        )

    def _code(self) -> grpc.StatusCode | None:
        """The code of the call that has ended; None if an interceptor has failed otherwise."""
        try:
            code: grpc.StatusCode = now(self.real.code())
        except Exception:  # noqa: BLE001 - whoever awaits the call gets it
            return None
        return code

    def _names_node(self) -> bool:
        """Whether the response names the node, which then adopts leases."""
        try:
            trailing = now(self.real.trailing_metadata())
        except Exception:  # noqa: BLE001 - as above
            return False
        return any(key == NODE_KEY for key, _ in trailing or ())
