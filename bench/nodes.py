"""Real nodes to route to: in processes of their own, joined, alive."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import shmcoord
from bench.children import children
from bench.stores.record import NODES, QUEUES

GROUP = "GREEN"
SIX = tuple(f"{name}={queue}" for name, queue in zip(NODES, QUEUES, strict=True))
MANY = {
    "a quarter idle": tuple(f"n{i}={i % 4}" for i in range(1024)),
    "none idle": tuple(f"n{i}={1 + i % 4}" for i in range(1024)),
}
"""1,024 nodes and their queues. A policy that stops at the first idle node it meets is quick on the
first; on the second nothing less than a look at every node finds the least loaded."""


@contextmanager
def segment_of(processes: list[tuple[str, ...]], *, slots: int = 64) -> Iterator[shmcoord.Segment]:
    """A segment of its own name with the given nodes; each tuple is one process."""
    name = f"shmbench_{os.getpid()}_{secrets.token_hex(3)}"
    try:
        with shmcoord.Segment.open(name, slots=slots) as segment:
            commands = [["bench.holder", name, GROUP, *nodes] for nodes in processes]
            with children(commands):
                yield segment
    finally:
        with contextlib.suppress(shmcoord.SegmentNotFound):
            shmcoord.Segment.unlink(name)
