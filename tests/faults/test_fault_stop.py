"""SIGSTOP past every time-out, then SIGCONT: SUSPECT, not routed to, slot kept, healthy again."""

from __future__ import annotations

import random
import time

from fault_helpers import stopped_node_is_kept
from helpers import Raw, wait_until

from shmcoord import Health, Router, Segment

#: Does everything that a node does, all the time.
BUSY = """
segment = Segment.open(name)
node = segment.join(
    "B", group="GREEN", endpoint="e", capacity=4, interval_s=0.03, gauges=("a", "b")
)
router = Router(segment)
say("joined")
threading.Thread(target=lambda: (hear(), os._exit(0)), daemon=True).start()
number = 0
while True:
    number += 1
    node.publish(a=number, b=number)
    node.begin().end()
    with contextlib.suppress(Saturated):
        lease = router.acquire("GREEN")
        if lease.node == "B":
            node.adopt(lease.token).end()
        lease.release()
"""


def test_stopped_and_continued(new_name, spawn, spawn_node, count, report):
    """At random instants of a process that never rests; nobody takes anything from it."""
    stops, late = count(6, 300), []
    name = new_name()
    with Segment.open(name, slots=4, leases=4) as segment:  # B, its router, and two more
        child = spawn(BUSY, name)
        assert child.hear() == "joined"
        pid = segment.status("B").pid
        # Its router claims a slot with its first lease.
        wait_until(lambda: bin(int.from_bytes(Raw(name).read(384, 8), "little")).count("1") == 2)
        for _ in range(stops):
            time.sleep(random.random() * 0.02)
            child.stop()
            cells = Raw(name).cells(0)
            wait_until(lambda: segment.status("B").health == Health.SUSPECT, 5)
            stopped_node_is_kept(segment, spawn_node)
            status = segment.status("B")
            assert status.gauges["a"] == status.gauges["b"]
            assert Raw(name).cells(0) == cells, "a lease of the stopped one was touched"
            child.go_on()
            late.append(wait_until(lambda: segment.status("B").health == Health.ALIVE, 5))
            assert segment.status("B").pid == pid
            gauges = segment.status("B").gauges["a"]
            wait_until(lambda seen=gauges: segment.status("B").gauges["a"] > seen, 5)
        child.kill()
        segment.reap()
        assert Raw(name).taken() == 0
    report(
        "SIGSTOP and SIGCONT", stops=stops, slot_kept=len(late), healthy_again_s=f"{max(late):.3f}"
    )


def test_asking_for_life_alone_routes_to_the_stopped(name, spawn_node, report):
    """The control: a stopped process lives, so without the heartbeat it would be picked."""
    with Segment.open(name, slots=4, leases=4) as segment, Router(segment) as router:
        child, other = spawn_node(name, "B"), spawn_node(name, "C")
        child.stop()
        wait_until(lambda: segment.status("B").health == Health.SUSPECT, 5)
        careless = {
            min(
                (backend for backend in map(segment.backend, "BC") if backend.alive),
                key=lambda backend: (backend.queue, random.random()),
            ).node
            for _ in range(200)
        }
        # A router judges four times per interval, so it may learn of it a little later.
        time.sleep(0.05)
        careful = {router.pick("GREEN").node for _ in range(200)}
        report("SIGSTOP, control", f"life alone picks {sorted(careless)}", picked=sorted(careful))
        assert careless == {"B", "C"}
        assert careful == {"C"}
        child.kill()
        other.kill()
