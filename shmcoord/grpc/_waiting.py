"""The requests that wait inside of a server process, shown as `Node.waiting`."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

from shmcoord.errors import ShmcoordError

if TYPE_CHECKING:
    from shmcoord.node import Node

__all__ = ["Waiting"]


class Waiting:
    """A counter that threads move, and that a node shows.

    `Node.waiting` is one number that is stored. So whoever moves the counter stores it as well
    before the next one may move it: the last store is always the newest number.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._node: Node | None = None

    @property
    def count(self) -> int:
        """How many wait."""
        return self._count

    def show_by(self, node: Node | None) -> None:
        """Store the number in this node from now on; None: nowhere."""
        with self._lock:
            self._node = node
            self._store()

    def more(self) -> None:
        """Count one that begins to wait."""
        with self._lock:
            self._count += 1
            self._store()

    def less(self) -> None:
        """Count one that waits no longer."""
        with self._lock:
            self._count -= 1
            self._store()

    def _store(self) -> None:
        if self._node is not None:
            # It may have left, or belong to the parent of a fork: then nobody looks at it.
            with contextlib.suppress(ValueError, ShmcoordError):
                self._node.waiting = self._count
