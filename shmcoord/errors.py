"""Every error that shmcoord raises on purpose: one hierarchy, a leaf of the import graph.

Wrong arguments are the built-in `ValueError` and `TypeError`; all that depends on the state of
the machine or of the segment derives from `ShmcoordError`. A message says what was wrong and
what to do about it.
"""

from __future__ import annotations

__all__ = [
    "ForkedHandle",
    "LayoutMismatch",
    "LeaseLost",
    "LeaseReleased",
    "NoBackend",
    "NodeExists",
    "NodeNotFound",
    "Saturated",
    "SegmentCorrupt",
    "SegmentForbidden",
    "SegmentFull",
    "SegmentNotFound",
    "ShmcoordError",
]


class ShmcoordError(Exception):
    """Root of all errors of this library."""


class SegmentNotFound(ShmcoordError):
    """No segment of that name exists."""


class SegmentCorrupt(ShmcoordError):
    """The object of that name is no segment, or its header contradicts itself or its size."""


class LayoutMismatch(ShmcoordError):
    """A segment of another layout version, byte order or word size."""


class SegmentForbidden(ShmcoordError):
    """The object is not ours, or its permissions would let others write to it."""


class SegmentFull(ShmcoordError):
    """Every slot is taken by a living participant, or the memory file system is full."""


class NodeExists(ShmcoordError):
    """A living node has that name already."""


class NodeNotFound(ShmcoordError):
    """No node of that name is in the segment (any more)."""


class NoBackend(ShmcoordError):
    """Nobody is eligible; the message says why for each node."""


class Saturated(ShmcoordError):
    """Every eligible node was at its capacity until the time-out, or too many wait already.

    Attributes:
        retry_after_s: how long a new caller would wait, by the nodes' latencies, in seconds; None
            where they say nothing.
    """

    def __init__(self, message: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class LeaseLost(ShmcoordError):
    """The lease is no longer held: it was reaped, or never was one."""


class LeaseReleased(LeaseLost):
    """The lease was released before by its own holder."""


class ForkedHandle(ShmcoordError):
    """The handle belongs to the parent of a fork; the child must open the segment itself."""
