"""A segment as other hosts are told of it."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from typing import Any

import pytest
from helpers import Child, Raw, wait_until

from shmcoord import Node, Router, Segment
from shmcoord.mirror import Mirror
from shmcoord.origin import Origin, host_id

FIXED = 10


def parse(entries: bytes) -> dict[int, dict[str, Any]]:
    """Slot -> what its entry says (see _entry.pxd)."""
    words = struct.unpack(f"<{len(entries) // 8}Q", entries)
    found: dict[int, dict[str, Any]] = {}
    while words:
        gauges, shares = words[0] >> 16 & 0xFF, words[0] >> 24 & 0xFF
        end = FIXED + gauges + shares
        found[words[0] & 0xFFFF] = {
            "generation": words[0] >> 32,
            "cells": words[1] >> 48,
            "state": words[1] >> 44 & 0xF,
            "flags": words[1] >> 40 & 0xF,
            "waiting": words[1] >> 20 & 0xFFFFF,
            "inflight": words[1] & 0xFFFFF,
            "suspect": words[3],
            "up_s": words[9] / 1e9,
            "served": words[6],
            "failed": words[7],
            "gauges": _doubles(words[FIXED : FIXED + gauges]),
            "shares": {
                w >> 40: (w >> 28 & 0xFFF, w & 0xFFFFFFF) for w in words[FIXED + gauges : end]
            },
        }
        words = words[end:]
    return found


def _doubles(words: tuple[int, ...]) -> tuple[float, ...]:
    return struct.unpack(f"<{len(words)}d", struct.pack(f"<{len(words)}Q", *words))


def test_members_are_what_nodes_have_joined_with(segment: Segment) -> None:
    origin = Origin(segment)
    assert origin.members() == []
    with segment.join(
        "B",
        group="GREEN",
        endpoint="10.0.0.1:1",
        capacity=4,
        weight=2.0,
        gauges=("kv", "rows"),
        slow_start_s=1.5,
    ):
        [member] = origin.members()
        assert member[2:] == ("B", "GREEN", "10.0.0.1:1", 4, 2.0, ["kv", "rows"], 1.5)
        assert origin.incarnation != 0
    assert origin.members() == []


def test_an_entry_says_all_that_moves(segment: Segment) -> None:
    node = segment.join("B", group="G", endpoint="e", gauges=("kv",))
    origin = Origin(segment)
    slot = origin.members()[0].slot
    node.publish(kv=0.25)
    node.waiting = 3
    node.busy = True
    with node.request():
        pass
    with pytest.raises(RuntimeError), node.request():
        raise RuntimeError
    with node.request(), node.request():
        entry = parse(origin.entries(full=True))[slot]
    assert entry == {
        "generation": origin.members()[0].generation,
        "cells": 2,
        "state": 0,
        "flags": 1,
        "waiting": 3,
        "inflight": 2,
        "suspect": 0,
        "up_s": entry["up_s"],
        "served": 2,
        "failed": 1,
        "gauges": (0.25,),
        "shares": {},
    }


def test_changes_add_up_until_all_is_told_again(segment: Segment) -> None:
    b = segment.join("B", group="G", endpoint="e")
    c = segment.join("C", group="G", endpoint="e")
    origin = Origin(segment)
    slots = {member.node: member.slot for member in origin.members()}
    assert set(parse(origin.entries(full=True))) == set(slots.values())
    assert origin.entries(full=False) == b""
    b.waiting = 1
    assert set(parse(origin.entries(full=False))) == {slots["B"]}
    c.waiting = 1
    assert set(parse(origin.entries(full=False))) == set(slots.values())
    b.waiting = 0  # as it was when all was told: but in between something else was said
    assert parse(origin.entries(full=False))[slots["B"]]["waiting"] == 0
    origin.entries(full=True)
    assert origin.entries(full=False) == b""


def test_the_mark_moves_with_what_cannot_wait(segment: Segment) -> None:
    origin = Origin(segment)
    seen = {origin.mark()}

    def moved() -> bool:
        mark = origin.mark()
        known = mark in seen
        seen.add(mark)
        return not known

    node = segment.join("B", group="G", endpoint="e")
    assert moved()
    with node.request():
        assert not moved()  # IDLE and BUSY come and go with each request
    node.waiting = 5
    node.publish()
    assert not moved()
    node.drain()
    assert moved()
    node.resume()
    assert origin.mark() in seen
    node.busy = True
    assert origin.mark() in seen
    node.shutdown()
    assert moved()
    node.leave()
    assert origin.mark() == 0
    with segment.join("B", group="G", endpoint="e"):
        assert moved()  # the same name in the same slot is another node
    with segment.join("B", group="G", endpoint="e"), Router(segment) as router:
        before = origin.mark()
        with router.acquire("G"):  # who routes is nobody's business
            assert origin.mark() == before


def test_the_dead_are_not_told_of(segment: Segment, spawn_node: Callable[..., Child]) -> None:
    child = spawn_node(segment.name, "B", group="G")
    origin = Origin(segment)
    before = origin.mark()
    assert [member.node for member in origin.members()] == ["B"]
    child.kill()
    wait_until(lambda: origin.mark() != before)
    assert origin.members() == []
    assert origin.entries(full=True) == b""


def test_a_late_node_is_told_of_as_suspect(
    segment: Segment, spawn_node: Callable[..., Child]
) -> None:
    child = spawn_node(segment.name, "B", group="G", interval_s=0.02)
    origin = Origin(segment)
    [slot] = parse(origin.entries(full=True))
    child.stop()
    wait_until(lambda: parse(origin.entries(full=True))[slot]["suspect"] == 1)
    assert set(parse(origin.entries(full=False))) <= {slot}
    child.go_on()
    wait_until(lambda: parse(origin.entries(full=True))[slot]["suspect"] == 0)


def test_shares_say_for_which_host_requests_run(
    segment: Segment, new_name: Callable[[], str]
) -> None:
    node = segment.join("B", group="G", endpoint="e", capacity=8)
    origin = Origin(segment)
    slot = origin.members()[0].slot
    held = [node.request()]
    for host, costs in (("h1", (1, 3)), ("h2", (2,))):
        with Segment.open(new_name(), slots=8, leases=16) as seen:
            mirror = Mirror(seen, host_id(host), 5.0)
            mirror.set_members(origin.incarnation, origin.members())
            mirror.apply(origin.entries(full=True), 0)
            with Router(seen) as router:
                held += [node.adopt(router.acquire("G", cost=cost).token) for cost in costs]
            mirror.leave()
    entry = parse(origin.entries(full=True))[slot]
    assert entry["shares"] == {host_id("h1"): (2, 4), host_id("h2"): (1, 2)}
    assert (entry["cells"], entry["inflight"]) == (4, 7)
    for request in held:
        request.end()
    entry = parse(origin.entries(full=True))[slot]
    assert (entry["cells"], entry["inflight"], entry["shares"]) == (0, 0, {})


def test_nobody_passes_on_what_he_was_told(segment: Segment, new_name: Callable[[], str]) -> None:
    with (
        segment.join("B", group="G", endpoint="e"),
        Segment.open(new_name(), slots=8, leases=16) as seen,
    ):
        origin = Origin(segment)
        mirror = Mirror(seen, 1, 5.0)
        mirror.set_members(origin.incarnation, origin.members())
        second = Origin(seen)
        assert second.members() == []
        assert second.entries(full=True) == b""
        mirror.leave()


def test_ids_of_hosts() -> None:
    """All hosts must agree on them: they are in tokens and in frames."""
    word = 0xCBF29CE484222325  # FNV-1a, then the finisher of SplitMix64
    for byte in b"host1":
        word = (word ^ byte) * 0x100000001B3 % 2**64
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    assert host_id("host1") == (word ^ word >> 31) % 2**24
    ids = {host_id(f"host{i}") for i in range(1000)}
    assert len(ids) >= 999
    assert min(ids) >= 1
    assert max(ids) < 1 << 24


def test_a_slot_is_told_of_as_what_it_is_now(segment: Segment) -> None:
    """A node, nobody, a node beside a router, a node with other gauges."""
    origin = Origin(segment)
    node = segment.join("B", group="G", endpoint="e", gauges=("kv",))
    [first] = origin.members()
    node.waiting = 1
    origin.entries(full=True)
    node.leave()
    assert origin.entries(full=False) == b""
    with segment.join("C", group="G", endpoint="e") as other:
        assert [(m.node, m.slot) for m in origin.members()] == [("C", first.slot)]
        with Router(segment) as router, router.acquire("G"):
            assert [member.node for member in origin.members()] == ["C"]
            assert set(parse(origin.entries(full=True))) == {first.slot}
            other.leave()
            assert origin.members() == []
    with segment.join("B", group="G", endpoint="e", gauges=("x", "y")) as again:
        again.publish(x=1.0, y=2.0)
        [member] = origin.members()
        assert member.slot == first.slot
        assert member.generation > first.generation
        entry = parse(origin.entries(full=False))[member.slot]
        assert (entry["generation"], entry["gauges"]) == (member.generation, (1.0, 2.0))


@pytest.mark.parametrize("change", [Node.drain, Node.shutdown], ids=["drain", "shutdown"])
def test_who_takes_no_work_is_told_of_all_the_same(
    segment: Segment, change: Callable[[Node], None]
) -> None:
    with segment.join("B", group="G", endpoint="e") as node:
        origin = Origin(segment)
        origin.entries(full=True)
        change(node)
        assert [member.node for member in origin.members()] == ["B"]
        [entry] = parse(origin.entries(full=False)).values()
        assert entry["state"] == {Node.drain: 1, Node.shutdown: 2}[change]


def test_time_alone_is_no_change(segment: Segment) -> None:
    with segment.join("B", group="G", endpoint="e", interval_s=60.0):
        origin = Origin(segment)
        [before] = parse(origin.entries(full=True)).values()
        time.sleep(0.02)
        assert origin.entries(full=False) == b""
        [after] = parse(origin.entries(full=True)).values()
        assert after["up_s"] - before["up_s"] >= 0.02


def test_how_long_a_node_is_up_by_another_clock(segment: Segment) -> None:
    """In another time namespace its clock may be ahead or behind: its own stamps are compared."""
    with segment.join("B", group="G", endpoint="e", interval_s=60.0) as node:
        [member] = Origin(segment).members()
        time.sleep(0.02)
        node.publish()  # which renews the time of its record
        Raw(segment.name).set("meta", "time_ns_id", 8, 1, member.slot)
        time.sleep(0.05)
        [entry] = parse(Origin(segment).entries(full=True)).values()
        assert 0.02 <= entry["up_s"] < 0.05


def test_a_start_in_the_future_is_no_time_up(segment: Segment) -> None:
    """As of a node that joined since the reading began: it must not be up for 500 years."""
    with segment.join("B", group="G", endpoint="e", interval_s=60.0) as node:
        raw = Raw(segment.name)
        [member] = Origin(segment).members()
        node.publish()
        seq = raw.number("record", "seq", 8, member.slot)
        started = raw.offset("record", "copy", member.slot) + (seq & 1) * 32 * 8 + 8 * 8
        raw.write(started, struct.pack("<Q", time.monotonic_ns() + 10**9))
        [entry] = parse(Origin(segment).entries(full=True)).values()
        assert entry["up_s"] == 0.0


def test_of_more_hosts_than_fit_the_rest_are_nobodys(new_name: Callable[[], str]) -> None:
    with Segment.open(new_name(), slots=2, leases=400) as segment:
        node = segment.join("B", group="G", endpoint="e")
        origin = Origin(segment)
        [member] = origin.members()
        running = [
            node.adopt(f"2-{origin.incarnation:x}-{member.slot:x}-{member.generation:x}-{host:x}-2")
            for host in range(1, 301)
        ]
        running += [node.adopt(request_of(origin, host=7, cost=5)) for _ in range(2)]
        entry = parse(origin.entries(full=True))[member.slot]
        shares = dict.fromkeys(range(1, 256), (1, 2)) | {7: (3, 12)}
        assert entry["shares"] == shares
        assert (entry["cells"], entry["inflight"]) == (302, 610)
        for request in running:
            request.end()
        node.leave()


def request_of(origin: Origin, host: int, cost: int) -> str:
    """The token of a lease of another host on the only node."""
    [member] = origin.members()
    return f"2-{origin.incarnation:x}-{member.slot:x}-{member.generation:x}-{host:x}-{cost:x}"


def test_requests_without_a_cell_count_as_the_nodes_own(new_name: Callable[[], str]) -> None:
    """More than the row has cells: in flight they are, but nobody can tell whose."""
    with Segment.open(new_name(), slots=2, leases=2) as segment:
        node = segment.join("B", group="G", endpoint="e")
        origin = Origin(segment)
        [member] = origin.members()
        running = [node.adopt(request_of(origin, host=9, cost=3)) for _ in range(4)]
        entry = parse(origin.entries(full=True))[member.slot]
        assert (entry["cells"], entry["inflight"], entry["shares"]) == (2, 12, {9: (2, 6)})
        for request in running:
            request.end()
        assert parse(origin.entries(full=False))[member.slot]["inflight"] == 0
        node.leave()


def test_an_observer_can_tell(segment: Segment) -> None:
    """Reading is enough, and nothing is written."""
    with segment.join("B", group="G", endpoint="e", interval_s=60.0) as node:
        node.waiting = 2
        with Segment.attach(segment.name) as observer:
            before = Raw(segment.name).path.read_bytes()
            origin = Origin(observer)
            assert [member.node for member in origin.members()] == ["B"]
            assert len(origin.entries(full=True)) == 8 * FIXED
            assert origin.mark() != 0
            assert Raw(segment.name).path.read_bytes() == before


@pytest.mark.parametrize("mapping", [None, "name", 3])
def test_only_a_segment_is_told_of(mapping: Any) -> None:
    with pytest.raises(TypeError):
        Origin(mapping)


def test_an_entry_is_whole_while_its_node_works(
    segment: Segment, spawn: Callable[..., Child]
) -> None:
    """A busy node in another process: never more shares than cells, nothing out of its bounds."""
    child = spawn(
        "node = Segment.open(name).join('B', group='G', endpoint='e', gauges=('a', 'b'))\n"
        "say('joined')\n"
        "token = hear()\n"
        "say('works')\n"
        "while True:\n"
        "    running = [node.adopt(token) if i & 1 else node.begin() for i in range(5)]\n"
        "    node.publish(a=node.served, b=-node.served)\n"
        "    for one in running: one.end()\n",
        segment.name,
    )
    assert child.hear() == "joined"
    origin = Origin(segment)
    child.say(request_of(origin, host=3, cost=1))
    assert child.hear() == "works"
    busy, turn, until = 0, 0, time.monotonic() + 30.0
    while busy < 500:
        assert time.monotonic() < until, f"it was seen at work {busy} times"
        turn += 1
        for entry in parse(origin.entries(full=turn % 7 == 0)).values():
            first, second = entry["gauges"]
            assert first == -second, "of one publication"
            cells, cost = entry["shares"].get(3, (0, 0))
            assert cells == cost <= 2
            assert set(entry["shares"]) <= {3}
            assert cells <= entry["cells"] <= 5
            assert entry["inflight"] <= 6
            busy += turn % 7 != 0 and cells > 0


def test_a_closed_segment_is_read_no_more(segment: Segment) -> None:
    origin = Origin(segment)
    segment.close()
    for read in (origin.mark, origin.members, lambda: origin.entries(full=True)):
        with pytest.raises(ValueError, match="closed"):
            read()
