"""The requests that wait inside of a server process, shown as `Node.waiting`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shmcoord.errors import ShmcoordError

if TYPE_CHECKING:
    from shmcoord.node import Node

__all__ = ["Waiting"]


class Waiting:
    """What waits, changed by any thread, and shown as the number that a node stores.

    No lock: adding and discarding is one step each under the GIL, and whoever stores the number
    looks afterwards whether it is still right, and stores again if not. So the last store is right
    as long as nothing changes, and whoever changes something stores after that. (A lock would be
    the one thing for which the serving thread and the workers wait for each other.)
    """

    def __init__(self) -> None:
        self._all: set[object] = set()
        self._node: Node | None = None

    @property
    def count(self) -> int:
        """How many wait."""
        return len(self._all)

    def show_by(self, node: Node | None) -> None:
        """Store the number in this node from now on; None: nowhere."""
        self._node = node
        self._show()

    def add(self, request: object) -> None:
        """Count one that begins to wait."""
        self._all.add(request)
        self._show()

    def discard(self, request: object) -> None:
        """Count one that waits no longer; nothing happens if it did not wait."""
        self._all.discard(request)
        self._show()

    def _show(self) -> None:
        while (node := self._node) is not None:
            count = len(self._all)
            try:
                node.waiting = count
            except (ValueError, ShmcoordError):
                return  # it has left, or is the parent's since a fork: nobody looks at it
            if len(self._all) == count:
                return
