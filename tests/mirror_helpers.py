"""What the tests of mirrors share: a segment of another host, and its mirror on this one."""

from __future__ import annotations

import threading
from typing import Any

from shmcoord import (
    Node,
    Router,
    Segment,
)
from shmcoord.mirror import Mirror
from shmcoord.origin import Member, Origin, host_id

__all__ = ["HERE", "LEASES", "SUSPECT_S", "Pair", "wait_for_a_lease"]

HERE, LEASES = host_id("h1"), 8
SUSPECT_S = 5.0


class Pair:
    """A segment of another host, and its mirror on this one."""

    def __init__(self, there: str, here: str) -> None:
        self.there = Segment.open(there, slots=8, leases=LEASES)
        self.here = Segment.open(here, slots=16, leases=LEASES)
        self.origin = Origin(self.there)
        self.mirror = Mirror(self.here, HERE, SUSPECT_S)
        self.node: Node | None = None

    def join(self, name: str = "B", **options: Any) -> Node:
        """A node there, shown here."""
        node = self.there.join(name, **{"group": "G", "endpoint": f"e{name}", **options})
        assert self.members() == []
        self.tell()
        return node

    def members(self) -> list[tuple[Member, Exception]]:
        """Tell who is there."""
        return self.mirror.set_members(self.origin.incarnation, self.origin.members())

    def tell(self, age_ns: int = 0) -> int:
        """Tell all there is to say."""
        return self.mirror.apply(self.origin.entries(full=True), age_ns)

    def queue(self, name: str = "B") -> int:
        """What is seen here."""
        return self.here.status(name).queue

    def close(self) -> None:
        for closing in (self.mirror.leave, self.here.close, self.there.close):
            closing()


def wait_for_a_lease(router: Router, served: list[str]) -> threading.Thread:
    """Begin to wait for capacity; who served comes into `served`."""

    def wait() -> None:
        with router.acquire("G", timeout_s=20.0) as lease:
            served.append(lease.node)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread
