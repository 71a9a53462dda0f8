"""The last decisions of each router, read from the segment by whoever wants to look."""

from __future__ import annotations

import itertools
import os
import random
import secrets
import struct
import threading
import time

import pytest
from helpers import SIZES, Raw, run, wait_until

from shmcoord import NoBackend, Router, Saturated, Segment
from shmcoord.decision import PastDecision

RING = 16
ENTRY_BYTES = 32
ENTRIES_OFFSET = 64  # in the place of a router's record


@pytest.fixture
def node(segment):
    with segment.join("B", group="GREEN", endpoint="e", capacity=4, interval_s=3600) as node:
        yield node


def acquire(router, count, group="GREEN"):
    for _ in range(count):
        router.acquire(group).release()


def slots_of_routers(name):
    """Where a living router is."""
    raw = Raw(name)
    return [slot for slot in range(raw.slots) if raw.number("hot", "kind", 4, slot) == 2]


def ring_offset(name, slot):
    raw = Raw(name)
    return raw.number("header", "record_offset", 8) + slot * SIZES["record"] + ENTRIES_OFFSET


def test_kind_of_a_router(name, segment, node):
    """What the offsets of this file are good for."""
    with Router(segment) as router:
        acquire(router, 3)
        [slot] = slots_of_routers(name)
        entries = Raw(name).read(ring_offset(name, slot), RING * ENTRY_BYTES)
        assert [struct.unpack_from("<Q", entries, i * ENTRY_BYTES)[0] for i in range(5)] == [
            *(1, 2, 3, 0, 0)
        ]


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 33, 1000])
def test_the_last_sixteen(segment, node, count):
    with Router(segment) as router:
        acquire(router, count)
        decisions = segment.decisions()
        assert [one.number for one in decisions] == list(range(max(count - 15, 1), count + 1))
        assert all(one.outcome == "lease" for one in decisions)


def test_what_a_decision_says(segment, node):
    with Router(segment) as router:
        held = [router.acquire("GREEN", cost=3), router.acquire("GREEN")]
        one, two = segment.decisions()
        assert one == PastDecision(
            router=f"router-{os.getpid()}-{one.router.rpartition('-')[2]}",
            pid=os.getpid(),
            number=1,
            age_s=one.age_s,
            group="GREEN",
            outcome="lease",
            node="B",
            queue=0,
            candidates=1,
            waited_s=0.0,
        )
        assert 0 <= one.age_s < 1
        assert (two.number, two.queue) == (2, 3), "before its own, and in costs"
        assert str(two).startswith(f"{two.router} #{two.number}, ")
        assert "GREEN -> B, queue 3, of 1" in str(two)
        for lease in held:
            lease.release()


def test_refusals_are_noted(segment, node):
    with Router(segment) as router:
        leases = [router.acquire("GREEN") for _ in range(4)]
        with pytest.raises(Saturated):
            router.acquire("GREEN")
        with pytest.raises(Saturated):
            router.acquire("GREEN", timeout_s=0.01)
        node.drain()
        with pytest.raises(NoBackend):
            router.acquire("GREEN")
        with pytest.raises(NoBackend):
            router.acquire("BLUE")
        refusals = segment.decisions()[4:]
        assert [(one.outcome, one.node, one.group) for one in refusals] == [
            ("saturated", "", "GREEN"),
            ("saturated", "", "GREEN"),
            ("nobody", "", "GREEN"),
            ("nobody", "", "?"),  # no node has ever told that name
        ]
        assert [one.candidates for one in refusals] == [1, 1, 1, 0]
        assert str(refusals[0]).endswith("GREEN -> SATURATED, of 1")
        assert [one.group for one in segment.decisions("BLUE")] == ["BLUE"]
        for lease in leases:
            lease.release()


def test_pick_and_explain_are_no_decisions(segment, node):
    with Router(segment) as router:
        acquire(router, 1)
        for _ in range(5):
            router.pick("GREEN")
            router.explain("GREEN")
        assert len(segment.decisions()) == 1


def test_groups_and_routers_are_told_apart(name, segment, node):
    with (
        segment.join("P", group="PINK", endpoint="e", interval_s=3600),
        Router(segment) as one,
        Router(segment) as two,
        Segment.attach(name) as observer,
    ):
        acquire(one, 2, "PINK")
        acquire(two, 3)
        acquire(one, 1)
        assert [(d.group, d.node, d.number) for d in observer.decisions("PINK")] == [
            *(("PINK", "P", 1), ("PINK", "P", 2)),
        ]
        assert len({d.router for d in observer.decisions()}) == 2
        assert sorted(d.number for d in observer.decisions("GREEN")) == [1, 2, 3, 3]
        assert observer.decisions("BLUE") == []
    assert segment.decisions() == [], "who has left is not asked"


@pytest.mark.parametrize("wait_s", [0.001, 0.004, 0.02, 0.1])
def test_the_wait_is_told_to_four_per_cent(segment, node, wait_s):
    """Of what was measured around the call; the call itself and waking up are in both."""
    with Router(segment) as router:
        leases = [router.acquire("GREEN") for _ in range(4)]
        off = []
        for _ in range(6):
            timer = threading.Timer(wait_s, leases.pop().release)
            timer.start()
            began = time.monotonic()
            leases.append(router.acquire("GREEN", timeout_s=5))
            waited_s = time.monotonic() - began
            timer.join()
            told_s = segment.decisions()[-1].waited_s
            if told_s:  # else the lease was back before we asked
                # Handing over to this thread comes after the decision was noted.
                off.append(waited_s / told_s - 1)
        assert min(map(abs, off)) < 0.045 + 0.0004 / wait_s
        for lease in leases:
            lease.release()


def test_the_wait_is_rounded_by_four_per_cent_at_most(name, segment, node):
    """Every value that the nine bits can hold is less than 4.5 % below the next."""
    with Router(segment) as router:
        acquire(router, 1)
        [slot] = slots_of_routers(name)
        offset = ring_offset(name, slot) + 24
        [what] = struct.unpack("<Q", Raw(name).read(offset, 8))
        seen = []
        for waited in range(1, 512):
            changed = what & ~(0x1FF << 40) | waited << 40
            Raw(name).write(offset, struct.pack("<Q", changed))
            [one] = segment.decisions()
            seen.append(one.waited_s)
        assert seen[0] == pytest.approx(1e-6)
        assert all(1 < b / a < 1.045 for a, b in itertools.pairwise(seen))
        assert seen[-1] > 1000


# --- a reader beside a router that writes

#: Groups of 1, 2 and 3 nodes; a router that asks them in turn, as fast as it can: decision `number`
#: is one for the group with `(number - 1) % 3 + 1` nodes, called by that number, to a node whose
#: name begins with it. 16 is no multiple of 3, so what was in an entry before was for another
#: group, and a torn entry contradicts itself.
WRITER = """
segment = Segment.open(name)
nodes = [
    segment.join(f"{group}{i}", group=group, endpoint="e", capacity=1, interval_s=3600)
    for group in "123" for i in range(int(group))
]
router = Router(segment)
say("up")
while True:
    for group in "123":
        router.acquire(group).release()
"""


def is_whole(one):
    """Whether an entry is one that the writer wrote."""
    group = str((one.number - 1) % 3 + 1)
    return (
        (one.group, one.outcome, one.queue, one.waited_s) == (group, "lease", 0, 0.0)
        and one.candidates == int(group)
        and one.node.startswith(group)
        and 0 <= one.age_s < 5
    )


@pytest.fixture
def roomy(new_name):
    with Segment.open(new_name(), slots=16, leases=4) as segment:
        yield segment


def test_a_reader_never_sees_a_torn_entry(roomy, spawn):
    writer = spawn(WRITER, roomy.name)
    writer.hear()
    observer = Segment.attach(roomy.name)
    ends = time.monotonic() + 1.0
    readings, entries, newest = 0, 0, []
    while time.monotonic() < ends:
        decisions = observer.decisions()
        assert all(map(is_whole, decisions)), [one for one in decisions if not is_whole(one)]
        numbers = [one.number for one in decisions]
        assert len(numbers) == len(set(numbers)) <= RING
        readings += 1
        entries += len(decisions)
        newest.append(max(numbers, default=0))
    writer.kill()
    assert newest == sorted(newest)
    assert newest[-1] - newest[0] > 20 * readings, "it did not write while it was read"
    assert entries > 4 * readings
    observer.close()


def test_torn_entries_are_there_to_be_found(roomy, spawn):
    """The negative control: a reader that does not look at the number again takes torn entries
    for whole; the same reader takes none if it does."""
    writer = spawn(WRITER, roomy.name)
    writer.hear()
    wait_until(roomy.decisions)
    [slot] = slots_of_routers(roomy.name)
    entry = ring_offset(roomy.name, slot)
    torn = kept = 0
    with Raw(roomy.name).path.open("rb", buffering=0) as file:

        def word(index):
            return int.from_bytes(os.pread(file.fileno(), 8, entry + index * 8), "little")

        ends = time.monotonic() + 5
        while time.monotonic() < ends and (torn < 5 or kept < 20):
            number, candidates = word(0), word(3) & 0xFFFFF
            if number == 0:
                continue
            is_right = candidates == (number - 1) % 3 + 1
            torn += not is_right
            if word(0) == number:
                kept += 1
                assert is_right
    assert torn >= 5
    assert kept >= 20


def test_a_router_killed_while_it_writes_leaves_whole_entries(roomy, spawn):
    chance = random.Random(2)
    name = roomy.name
    for _ in range(12):
        writer = spawn(WRITER, name)
        writer.hear()
        time.sleep(chance.random() * 0.03)
        writer.kill()
        decisions = roomy.decisions()
        assert len(decisions) >= RING - 1, "one entry at most is lost"
        assert all(map(is_whole, decisions))
        numbers = [one.number for one in decisions]
        assert max(numbers) - min(numbers) <= RING
        roomy.reap()
        assert roomy.decisions() == []
    with roomy.join("1x", group="1", endpoint="e"), Router(roomy) as router:
        acquire(router, 2, "1")
        assert [one.number for one in roomy.decisions()] == [1, 2], "the ring begins anew"


# --- whatever stands there


def test_garbage_in_the_ring_is_harmless(name, segment, node):
    chance = random.Random(secrets.randbits(32))
    with Router(segment) as router, Segment.attach(name) as observer:
        acquire(router, 20)
        [slot] = slots_of_routers(name)
        raw = Raw(name)
        for _ in range(200):
            raw.write(ring_offset(name, slot), chance.randbytes(RING * ENTRY_BYTES))
            for one in observer.decisions():
                assert one.outcome in ("lease", "saturated", "nobody", "?")
                assert one.age_s >= 0
                assert 0 <= one.waited_s < 1e4
                assert one.number > 0
                assert str(one)
            observer.decisions("GREEN")
        raw.write(ring_offset(name, slot), b"\xff" * RING * ENTRY_BYTES)
        observer.decisions()
        raw.write(raw.offset("meta", "name", slot), b"\xff" * 64)  # no end, no UTF-8
        assert observer.decisions()[0].router == "\ufffd" * 64
        acquire(router, 16)  # the router does not read what it has written
        assert [one.number for one in observer.decisions()] == list(range(21, 37))


def test_the_command_line_survives_garbage_in_the_ring(name, segment, node):
    pytest.importorskip("click")
    pytest.importorskip("rich")
    with Router(segment) as router:
        acquire(router, 20)
        [slot] = slots_of_routers(name)
        Raw(name).write(ring_offset(name, slot), b"\xff" * RING * ENTRY_BYTES)
        Raw(name).write(Raw(name).offset("meta", "name", slot), b"\x1b[2J\xff\0")
        said = run(
            """
from shmcoord.cli import main
for more in ([], ["--json"]):
    sys.argv = ["shmcoord", "explain", "GREEN", name, *more]
    try:
        main()
    except SystemExit as end:
        assert not end.code, end
""",
            name,
        )
        assert "\x1b" not in said


def test_decisions_of_a_closed_segment_are_refused(name, segment, node):
    observer = Segment.attach(name)
    observer.close()
    with pytest.raises(ValueError, match="closed"):
        observer.decisions()


def test_a_router_that_waits_is_read_as_well(segment, node):
    with Router(segment) as router:
        leases = [router.acquire("GREEN") for _ in range(4)]
        done = threading.Event()

        def wait():
            router.acquire("GREEN", timeout_s=10).release()
            done.set()

        threading.Thread(target=wait).start()
        wait_until(lambda: Raw(segment.name).number("sync", "waiters", 4) == 1)
        assert [one.number for one in segment.decisions()] == [1, 2, 3, 4]
        for lease in leases:
            lease.release()
        assert done.wait(5)
        assert [one.number for one in segment.decisions()] == [1, 2, 3, 4, 5]
