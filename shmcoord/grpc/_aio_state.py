"""The connectivity of a channel to many nodes, as one state.

It is put together like that of gRPC's own balancers: READY if any node is connected; else
CONNECTING if a connection is being made; else IDLE if there is a node to which none was tried, or
whose connection has ended (the next call makes a new one); else, and so where no node is there at
all, TRANSIENT_FAILURE.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc

from shmcoord.errors import ShmcoordError

if TYPE_CHECKING:
    from shmcoord.grpc._aio_routes import Routes

__all__ = ["state_of"]

_State = grpc.ChannelConnectivity
_ORDER = (_State.READY, _State.CONNECTING, _State.IDLE)


def state_of(routes: Routes, try_to_connect: bool) -> grpc.ChannelConnectivity:
    """Return the state over all nodes of the group.

    Args:
        routes: Those of the channel.
        try_to_connect: Begin to connect where no connection is.
    """
    try:
        candidates = routes.router.explain(routes.group).candidates
    except (ShmcoordError, ValueError):  # its segment is gone, or the router was closed
        return _State.TRANSIENT_FAILURE
    if try_to_connect:
        routes.enter()
    states = {_of_one(routes, one.endpoint, try_to_connect) for one in candidates}
    for state in _ORDER:
        if state in states:
            return state
    return _State.TRANSIENT_FAILURE


def _of_one(routes: Routes, endpoint: str, try_to_connect: bool) -> grpc.ChannelConnectivity:
    links = routes.links
    link = links.current(endpoint)
    if link is None or link.spent:
        if link is not None and not link.was_ready and not try_to_connect:
            return _State.TRANSIENT_FAILURE
        if not try_to_connect:
            return _State.IDLE
        link = links.renew(endpoint)
    if link.is_ready(try_to_connect):
        return _State.READY
    return link.channel.get_state()
