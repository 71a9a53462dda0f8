"""Learning from a response whether its node adopts leases: then it names itself in the metadata."""

from __future__ import annotations

from typing import Any

from shmcoord.grpc._common import NODE_KEY, node_value
from shmcoord.transport._grpc_links import Link

__all__ = ["learn"]


def learn(link: Link, call: Any, node: str) -> None:
    """Look at the metadata of a call that has ended well; after some in vain no more are looked at.

    It must be the name of the node that was called: a gateway may copy that of another. The link's
    connection leads to one process, so what one response says holds for all.
    """
    for name in ("trailing_metadata", "initial_metadata"):
        metadata = getattr(call, name, None)
        for pair in (metadata() if metadata is not None else None) or ():
            if pair[0] == NODE_KEY and pair[1] == node_value(node):
                link.adopts = True
                link.lessons = 0
                return
    if link.lessons:
        link.lessons -= 1
