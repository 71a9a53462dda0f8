"""`Segment`: the handle that users open, on top of everything else."""

from __future__ import annotations

import weakref

from shmcoord.backend import Backend
from shmcoord.node import Node, join_segment
from shmcoord.observe import Observer, reap
from shmcoord.segment import Mapping
from shmcoord.status import Status

TYPE_CHECKING = False  # as of typing, which costs a third of a MiB to import
if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType
    from typing import Any

    import numpy

    from shmcoord.decision import PastDecision

__all__ = ["Segment"]


class Segment(Mapping):
    """One named piece of shared memory, as this process sees it.

    Made by `Segment.open` (reads and writes; creates it if absent) or `Segment.attach` (an
    observer: a read-only mapping). A context manager: leaving it closes.
    """

    _observer: Observer
    _nodes: weakref.WeakSet[Node]

    @property
    def _reader(self) -> Observer:
        try:
            return self._observer
        except AttributeError:
            self._observer = Observer(self)
            return self._observer

    def snapshot(self) -> tuple[Status, ...]:
        """Every node, dead ones included, each status consistent in itself."""
        return self._reader.snapshot()

    def status(self, node_name: str) -> Status:
        """One node's status.

        Raises:
            NodeNotFound: no node of that name is there.
        """
        return self._reader.status(node_name)

    def backend(self, node_name: str) -> Backend:
        """A live handle on one node; its `queue`, `state` and `alive` are read at each access.

        Raises:
            NodeNotFound: no node of that name is there.
        """
        return self._reader.backend(node_name)

    def to_numpy(self) -> numpy.ndarray[Any, Any]:
        """`snapshot` as one structured array of shape (nodes,); needs NumPy.

        Fields are those of `Status` but `gauges`; texts are unicode, state and health small
        integers (see `State` and `Health`).
        """
        from shmcoord.bulk import to_numpy

        return to_numpy(self.snapshot())

    def join(
        self,
        name: str,
        *,
        group: str,
        endpoint: str,
        capacity: int | None = None,
        weight: float = 1.0,
        interval_s: float = 2.0,
        gauges: Iterable[str] = (),
        slow_start_s: float = 0.0,
    ) -> Node:
        """Become a node: claim a slot, start the heartbeat.

        Args:
            name: unique among the living nodes of the segment; at most 63 bytes of UTF-8.
            group: the nodes that can serve the same requests; at most 63 bytes.
            endpoint: where it takes them; at most 255 bytes.
            capacity: leases it takes at once; None: as many as there are cells.
            weight: its share of the load relative to others, 1e-6 to 1e6.
            interval_s: heartbeat interval, 0.001 to 3600 seconds.
            gauges: names of up to 16 user gauges for `Node.publish`.
            slow_start_s: for how long routers raise its share of the traffic from a tenth to all
                of it, 0 to 3600 seconds; for nodes that have caches to fill.

        Raises:
            NodeExists: a living node has that name.
            SegmentFull: every slot is taken by a living participant.
            SegmentForbidden: the segment was attached as an observer.
        """
        node = join_segment(
            self, name, group, endpoint, capacity, weight, interval_s, gauges, slow_start_s
        )
        try:
            self._nodes.add(node)
        except AttributeError:
            self._nodes = weakref.WeakSet((node,))
        return node

    def decisions(self, group: str | None = None) -> list[PastDecision]:
        """The last decisions of every router of the segment, oldest first; 16 of each at most.

        Args:
            group: only those for this group.
        """
        from shmcoord.trace import read_decisions

        return read_decisions(self, group)

    def reap(self) -> int:
        """Give back what the dead held; returns slots and leases freed.

        Raises:
            SegmentForbidden: the segment was attached as an observer.
        """
        return reap(self)

    def close(self) -> None:
        """Leave with every node that joined through this handle, and refuse further use."""
        for node in list(getattr(self, "_nodes", ())):
            node.leave()
        self._close()

    def __enter__(self) -> Segment:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
