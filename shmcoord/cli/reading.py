"""What the commands show, read from shared memory as an observer: nothing is written there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

import shmcoord
from shmcoord.errors import SegmentNotFound, ShmcoordError
from shmcoord.segment import segments
from shmcoord.status import Health, Status

__all__ = ["Observers", "SegmentError", "SegmentView", "alive"]


@dataclass(frozen=True)
class SegmentView:
    """One segment at one reading; nodes in the order of their names."""

    name: str
    slots: int
    leases: int
    size_bytes: int
    created_at: float
    nodes: tuple[Status, ...]
    is_mirror: bool = False


@dataclass(frozen=True)
class SegmentError:
    """A segment that could not be read, and why."""

    name: str
    error: ShmcoordError


def alive(view: SegmentView) -> list[Status]:
    """Return the nodes whose process has not ended."""
    return [status for status in view.nodes if status.health is not Health.DEAD]


class Observers:
    """Read-only handles on segments, kept between readings so that heartbeats can be judged."""

    def __init__(self, names: Sequence[str] = ()) -> None:
        """Name the segments to read; none: all that this user can read, listed each time."""
        self._names = tuple(dict.fromkeys(names))
        self._segments: dict[str, shmcoord.Segment] = {}

    def read(self) -> list[SegmentView | SegmentError]:
        """Read each segment once.

        Raises:
            ValueError: A name is no segment name.
        """
        names = self._names or tuple(segments())
        for name in [name for name in self._segments if name not in names]:
            self._segments.pop(name).close()
        views = (self._read(name) for name in names)
        # One that goes away between the listing and the reading was not asked for by name.
        return [
            view
            for view in views
            if self._names
            or isinstance(view, SegmentView)
            or not isinstance(view.error, SegmentNotFound)
        ]

    def close(self) -> None:
        """Let go of all segments."""
        for segment in self._segments.values():
            segment.close()
        self._segments.clear()

    def __enter__(self) -> Observers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _read(self, name: str) -> SegmentView | SegmentError:
        try:
            segment = self._segments.get(name)
            if segment is not None and segment.is_stale():
                self._segments.pop(name).close()
                segment = None
            if segment is None:
                segment = self._segments[name] = shmcoord.Segment.attach(name)
            nodes = sorted(segment.snapshot(), key=lambda status: (status.node, status.pid))
            return SegmentView(
                name,
                segment.slots,
                segment.leases,
                segment.size_bytes,
                segment.created_at,
                tuple(nodes),
                segment.is_mirror,
            )
        except ShmcoordError as error:
            return SegmentError(name, error)
