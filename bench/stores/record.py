"""The record of 64 bytes that every store holds for every node."""

from __future__ import annotations

import struct
import time

LAYOUT = struct.Struct("<16sIIqqqdd")
"""Name, state, capacity, queue, memory in bytes, requests served, CPU in percent, time written."""

QUEUE = struct.Struct("<24xq")
"""Unpacks nothing but the queue."""

NODES = ("A", "B", "C", "D", "E", "F")
QUEUES = (3, 1, 0, 4, 0, 2)
"""How much each node has to do, the same for every store and for shmcoord: two have nothing."""

HELD = NODES.index("B")
"""The node whose queue is read."""

assert LAYOUT.size == 64


def pack(i: int) -> bytes:
    """Returns the record of node i as it is now."""
    return LAYOUT.pack(
        NODES[i].encode(), int(QUEUES[i] > 0), 64, QUEUES[i], 45 << 20, 1000, 1.5, time.time()
    )
