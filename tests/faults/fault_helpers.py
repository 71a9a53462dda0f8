"""What several rows of the fault harness check."""

from __future__ import annotations

from pathlib import Path

import pytest

from shmcoord import Health, NodeExists, Router, Saturated, SegmentFull


def with_path(*folders: Path) -> tuple[str, ...]:
    """For `Child(..., executable=)`: run Python with these folders before all others."""
    # The working folder comes first on the path of `python -c`, and it must not be the tree.
    path = ":".join(map(str, folders))
    return ("env", "-C", str(folders[0]), f"PYTHONPATH={path}")


def stopped_node_is_kept(segment, spawn_node):
    """Node B of a segment with three slots is SUSPECT: whatever others do, it stays what it is."""
    before = segment.status("B")
    other = spawn_node(segment.name, "C", capacity=4)
    with Router(segment) as router:
        leases = [router.acquire("GREEN") for _ in range(4)]
        assert {lease.node for lease in leases} == {"C"}, "routed to a stopped node"
        assert router.explain("GREEN").chosen is not None
        with pytest.raises(Saturated):  # C is full, and nobody spills over to B
            router.acquire("GREEN")
        with pytest.raises(SegmentFull):  # B's is the third slot
            segment.join("D", group="GREEN", endpoint="e")
        with pytest.raises(NodeExists):
            segment.join("B", group="GREEN", endpoint="e")
        assert segment.reap() == 0
        for lease in leases:
            lease.release()
    after = segment.status("B")
    assert (after.health, after.pid, after.gauges) == (Health.SUSPECT, before.pid, before.gauges)
    other.kill()
    segment.reap()
