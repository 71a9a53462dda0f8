"""multiprocessing.shared_memory with struct: bare bytes.

No liveness, no names, and a reader can see a record half written: what is timed is less than any
of the others does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

from bench.stores import Reading, Write
from bench.stores.record import HELD, LAYOUT, NODES, QUEUE


@contextmanager
def writing(place: Path) -> Iterator[Write]:
    """Creates the memory."""
    memory = SharedMemory(place.name, create=True, size=LAYOUT.size * len(NODES))

    def write(i: int, data: bytes) -> None:
        memory.buf[i * LAYOUT.size : (i + 1) * LAYOUT.size] = data

    try:
        yield write
    finally:
        memory.close()
        memory.unlink()


@contextmanager
def reading(place: Path) -> Iterator[Reading]:
    """Attaches to it."""
    memory = SharedMemory(place.name)
    # Before Python 3.13 the tracker believes that whoever attaches also owns.
    resource_tracker.unregister(f"/{place.name}", "shared_memory")
    unpack, view = QUEUE.unpack_from, memory.buf
    offsets = range(0, LAYOUT.size * len(NODES), LAYOUT.size)

    def least() -> int:
        best, shortest = -1, 1 << 62
        for i, offset in enumerate(offsets):
            (queue,) = unpack(view, offset)
            if queue < shortest:
                best, shortest = i, queue
        return best

    names = {"unpack": unpack, "view": view, "offset": HELD * LAYOUT.size}
    try:
        yield Reading("unpack(view, offset)[0]", names, least)
    finally:
        names.clear()
        memory.close()
