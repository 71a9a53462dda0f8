"""Other ways to share six small records between processes, to compare shmcoord with.

Each module here is one store, with two context managers:

- `writing(place)`: in the writer's process, yields a function that writes record i;
- `reading(place)`: in the reader's process, yields a `Reading`.

`place` is an empty folder that both know; whatever a store keeps is in it, or named after it, and
is gone afterwards. A store that cannot run here raises `UnavailableError`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

NAMES = ("iceoryx2", "redis", "manager", "lmdb", "shared_memory")


class UnavailableError(RuntimeError):
    """The store cannot run on this machine; the text says why."""


@dataclass(frozen=True)
class Reading:
    """How one reads from a store, as fast as its public interface allows.

    Attributes:
        queue: a Python expression that reads the queue of one node.
        names: what the expression refers to.
        least: finds the number of the node with the shortest queue.
        unchanged: an expression that only asks whether that node's record is still the one read
            before (stores that offer it).
    """

    queue: str
    names: Mapping[str, Any]
    least: Callable[[], int]
    unchanged: str = ""


Write = Callable[[int, bytes], None]
