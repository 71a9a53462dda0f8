"""Whole segments read at once."""

from __future__ import annotations

import time

import pytest
from helpers import wait_until

from shmcoord import Health, NodeNotFound, Router, Segment, State


def test_a_snapshot_has_every_node_and_no_router(segment, spawn_node):
    assert segment.snapshot() == ()
    child = spawn_node(segment.name, "dead", group="PINK")
    with (
        segment.join("A", group="GREEN", endpoint="e") as node,
        segment.join("B", group="GREEN", endpoint="e") as draining,
        Router(segment) as router,
    ):
        lease = router.acquire("GREEN")
        draining.drain()
        child.kill()
        snapshot = segment.snapshot()
        assert isinstance(snapshot, tuple)
        by_name = {status.node: status for status in snapshot}
        assert set(by_name) == {"dead", "A", "B"}
        assert by_name["dead"].health == Health.DEAD
        assert by_name["dead"].pid == child.pid
        assert by_name["B"].state == State.DRAINING
        assert sum(status.inflight for status in snapshot) == 1
        lease.release()
        assert snapshot[0] == by_name[snapshot[0].node]  # what was read does not move
        assert node.inflight == 0
    assert [status.node for status in segment.snapshot()] == ["dead"]


def test_a_segment_whose_processes_were_all_killed_can_be_read(name, spawn_node, segment):
    children = [spawn_node(name, f"n{i}", gauges=("kv",)) for i in range(3)]
    for child in children:
        child.kill()
    with Segment.attach(name) as observer:
        snapshot = observer.snapshot()
        assert [status.node for status in snapshot] == ["n0", "n1", "n2"]
        assert {status.health for status in snapshot} == {Health.DEAD}
        assert all(status.gauges == {"kv": 0.0} for status in snapshot)
        assert all(status.memory_bytes > 0 for status in snapshot)
        first = observer.status("n1").heartbeat_age_s
        time.sleep(0.02)
        assert observer.status("n1").heartbeat_age_s > first
        assert len(observer.to_numpy()) == 3
    assert segment.reap() == 3


def test_what_readers_keep_follows_the_owners(segment):
    """The reader's memory of slot and name is of one owner."""
    for round_ in range(6):
        with segment.join("A", group=f"g{round_}", endpoint=f"e{round_}"):
            with segment.join("B", group="x", endpoint=f"f{round_}"):
                assert segment.status("A").group == f"g{round_}"
                assert segment.status("B").endpoint == f"f{round_}"
            with segment.join(f"C{round_}", group="y", endpoint="e"):
                with pytest.raises(NodeNotFound, match=f"A, C{round_}"):
                    segment.status("B")
                assert segment.status(f"C{round_}").group == "y"
    with pytest.raises(NodeNotFound):
        segment.backend("A")


@pytest.mark.parametrize("wrong", [None, 3, b"A"])
def test_names_of_nodes_are_str(segment, wrong):
    with pytest.raises(TypeError):
        segment.status(wrong)
    with pytest.raises(TypeError):
        segment.backend(wrong)


def test_joining_and_leaving_while_others_read(name, segment, spawn):
    """Whatever is read is one owner's: name, group and endpoint always belong together."""
    child = spawn(
        """
segment = Segment.open(name)
say("ready")
number = 0
end = time.monotonic() + 1.5
while time.monotonic() < end:
    number += 1
    text = str(number % 50) * random.randrange(1, 20)
    with segment.join("n" + text, group="g" + text, endpoint="e" + text,
                      weight=len(text), gauges=(f"g{len(text)}",)) as node:
        node.publish(**{f"g{len(text)}": float(len(text))})
say(number)
""",
        name,
    )
    child.hear()
    seen = looks = 0
    end = time.monotonic() + 1.3
    with Router(segment) as router:
        while time.monotonic() < end:
            looks += 1
            for status in segment.snapshot():
                seen += 1
                text = status.node[1:]
                assert (status.group, status.endpoint) == ("g" + text, "e" + text)
                assert status.weight == len(text)
                assert status.gauges in (
                    {f"g{len(text)}": float(len(text))},
                    {f"g{len(text)}": 0.0},
                )
            for candidate in router.explain("g1").candidates:
                assert (candidate.node, candidate.endpoint) == ("n1", "e1")
    joins = int(child.hear())
    assert joins > 100
    assert seen > 100
    wait_until(lambda: segment.snapshot() == (), 2)


def test_uptime_and_age_move(segment):
    with segment.join("A", group="GREEN", endpoint="e", interval_s=0.05):
        first = segment.status("A").uptime_s
        time.sleep(0.03)
        second = segment.status("A").uptime_s
        assert 0.03 <= second - first < 0.5
        ages = []
        for _ in range(40):
            ages.append(segment.status("A").heartbeat_age_s)
            time.sleep(0.005)
        assert max(ages) < 0.15, "a heartbeat every 0.05 s"
        assert min(ages) < 0.02
