"""A history of reservations, written by processes that are killed, and what it must look like.

Each process writes fixed-size entries into a file of its own, mapped, so that what it has written
outlives it. A lease was held at least from the entry behind its reservation to the entry before
its release, or to the moment before its holder was killed. Where two such times overlap, the two
leases were held at the same time for certain: that is what is counted here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ENTRY = struct.Struct("<QQQQ")  # kind, when, slot and generation and index, value of the cell
GOT, GIVING, FREED, LOST, ADOPTED, ENDING = range(1, 7)
#: The writer's side, for scripts of child processes.
WRITER = """
import mmap, struct
ENTRY = struct.Struct("<QQQQ")
GOT, GIVING, FREED, LOST, ADOPTED, ENDING = range(1, 7)

class Log:
    "Entries in a file; the number of those that are whole stands in front."
    def __init__(self, path, size=1 << 20):
        with open(path, "w+b") as file:
            file.truncate(size)
            self.memory = mmap.mmap(file.fileno(), size)
        self.count = 0
        self.most = size // ENTRY.size - 2

    def add(self, kind, when, key):
        if self.count >= self.most:
            time.sleep(3600)  # until killed
        ENTRY.pack_into(self.memory, (self.count + 1) * ENTRY.size, kind, when, *key)
        self.count += 1
        struct.pack_into("<Q", self.memory, 0, self.count)

def key_of(token):
    _, _, slot, generation, index, value = token.split("-")
    place = int(slot, 16) << 48 | int(generation, 16) << 16 | int(index, 16)
    return place, int(value, 16)
"""


@dataclass
class Process:
    """One process of the load, as the one who killed it knows it."""

    path: Path
    killed_ns: int  # read just before the signal was sent
    node: int | None  # slot << 32 | generation, of a node


@dataclass
class _Lease:
    got_ns: int | None = None
    holder: Process | None = None
    giving_ns: int | None = None
    freed: bool = False
    lost_ns: int | None = None
    adopter: Process | None = None
    adopted_ns: int | None = None
    ending_ns: int | None = None


@dataclass
class Findings:
    """What a history shows."""

    leases: int = 0
    adopted: int = 0
    most: int = 0  # leases of one node at the same time
    doubled: int = 0  # cells with two leases at the same time
    unexplained: int = 0  # leases of a living holder that were gone and that no node had adopted


def read(path: Path) -> list[tuple[int, int, int, int]]:
    """The whole entries of one file, in order."""
    data = path.read_bytes()
    if len(data) < ENTRY.size:
        return []  # killed before the file had its size
    (count,) = struct.unpack_from("<Q", data)
    return list(ENTRY.iter_unpack(data[ENTRY.size : (count + 1) * ENTRY.size]))


def check(processes: Iterable[Process], living: int) -> Findings:
    """Look at all that was written; `living` is a node that was never killed."""
    processes = list(processes)
    leases: dict[tuple[int, int], _Lease] = {}
    last_ns: dict[int, int] = {}  # of each node, its last entry
    killed_ns = {p.node: p.killed_ns for p in processes if p.node is not None}
    for process in processes:
        for kind, when, place, value in read(process.path):
            lease = leases.setdefault((place, value), _Lease())
            if kind == GOT:
                lease.got_ns, lease.holder = when, process
            elif kind == GIVING:
                lease.giving_ns = when
            elif kind == FREED:
                lease.freed = True
            elif kind == LOST:
                lease.lost_ns = when
            elif kind == ADOPTED:
                lease.adopted_ns, lease.adopter = when, process
            elif kind == ENDING:
                lease.ending_ns = when
            if process.node is not None:
                last_ns[process.node] = when

    found = Findings(leases=len(leases))
    spans: dict[int, list[tuple[int, int, int]]] = {}
    for (place, _), lease in leases.items():
        node, index = place >> 16, place & 0xFFFF
        start = lease.got_ns if lease.got_ns is not None else lease.adopted_ns
        assert start is not None
        if lease.adopter is not None:
            found.adopted += 1
            end = lease.ending_ns if lease.ending_ns is not None else lease.adopter.killed_ns
        elif lease.giving_ns is not None:
            end = lease.giving_ns
        else:
            assert lease.holder is not None
            end = lease.holder.killed_ns
        end = min(end, killed_ns.get(node, end))
        if lease.adopter is not None and lease.freed:
            found.doubled += 1  # the router freed what the node had adopted
        if lease.lost_ns is not None and lease.adopter is None:
            # Fine if the node had died, or may have died between adopting it and writing so.
            dead = killed_ns.get(node)
            silent = last_ns.get(node, 0) < lease.lost_ns
            if node == living or (dead is not None and not (dead < lease.lost_ns or silent)):
                found.unexplained += 1
        if end > start:
            spans.setdefault(node, []).append((start, end, index))
    for held in spans.values():
        found.most = max(found.most, _most_at_once(held))
        cells: dict[int, list[tuple[int, int, int]]] = {}
        for span in held:
            cells.setdefault(span[2], []).append(span)
        found.doubled += sum(_most_at_once(of_cell) > 1 for of_cell in cells.values())
    return found


def _most_at_once(spans: list[tuple[int, int, int]]) -> int:
    """How many of them overlap; one that ends when another starts does not."""
    steps = sorted([(start, 1) for start, _, _ in spans] + [(end, -1) for _, end, _ in spans])
    most = now = 0
    for _, step in steps:
        now += step
        most = max(most, now)
    return most
