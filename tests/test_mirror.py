"""A segment of another host, as the bridge shows it on this one: what, who, and whose it is."""

from __future__ import annotations

import gc
import os
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from helpers import MEMBERSHIP_LOCK, SHM, Child, Raw, ofd_lock, wait_until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mirror_helpers import HERE, LEASES, SUSPECT_S, Pair

from shmcoord import (
    Health,
    NoBackend,
    Node,
    NodeExists,
    Router,
    Saturated,
    Segment,
    SegmentForbidden,
    State,
)
from shmcoord.mirror import Mirror
from shmcoord.origin import Member, Origin

# --- what is shown


def test_a_node_is_shown_as_it_is_there(pair: Pair) -> None:
    node = pair.join(capacity=4, weight=2.0, gauges=("kv",), slow_start_s=1.0)
    node.publish(kv=0.5)
    node.waiting = 2
    with node.request():
        pass
    with node.request():
        assert pair.tell() == 0
        seen, real = pair.here.status("B"), pair.there.status("B")
    for field in (
        *("node", "group", "endpoint", "state", "health", "queue", "waiting", "inflight"),
        *("capacity", "weight", "served", "failed", "latency_s", "gauges", "memory_bytes"),
    ):
        assert getattr(seen, field) == getattr(real, field), field
    assert seen.state is State.BUSY
    assert abs(seen.uptime_s - real.uptime_s) < 0.5
    node.busy = True
    node.waiting = 0
    pair.tell()
    assert pair.here.status("B").state is State.BUSY
    node.busy = False
    pair.tell()
    assert pair.here.status("B").state is State.IDLE


@pytest.mark.parametrize(
    ("change", "state"),
    [(Node.drain, State.DRAINING), (Node.shutdown, State.SHUTDOWN)],
    ids=["drain", "shutdown"],
)
def test_states_are_shown(pair: Pair, change: Callable[[Node], None], state: State) -> None:
    node = pair.join()
    with Router(pair.here) as router:
        assert router.pick("G").node == "B"
        change(node)
        pair.tell()
        assert pair.here.status("B").state is state
        with pytest.raises(NoBackend):
            router.pick("G")


def test_age_is_the_age_of_the_news(pair: Pair) -> None:
    node = pair.join()
    pair.tell(age_ns=2_000_000_000)
    assert 2.0 <= pair.here.status("B").heartbeat_age_s < 2.5
    assert pair.here.status("B").health is Health.ALIVE
    pair.tell(age_ns=int(SUSPECT_S * 1e9) + 100_000_000)
    assert pair.here.status("B").health is Health.SUSPECT
    pair.mirror.apply(b"", 0)  # a frame without any change is news as well
    assert pair.here.status("B").health is Health.ALIVE
    assert not node.left


def test_no_news_make_suspect_and_nobody_else_moves_the_beat(new_name: Callable[[], str]) -> None:
    pair = Pair(new_name(), new_name())
    pair.mirror = Mirror(pair.here, HERE, 0.1)
    node = pair.join(interval_s=0.02)
    wait_until(lambda: pair.here.status("B").health is Health.SUSPECT)
    assert pair.there.status("B").health is Health.ALIVE
    assert not node.left
    pair.close()


def test_a_hint_makes_suspect_until_the_next_news(pair: Pair) -> None:
    node = pair.join()
    pair.mirror.suspect()
    assert pair.here.status("B").health is Health.SUSPECT
    pair.mirror.suspect()
    assert pair.here.status("B").health is Health.SUSPECT
    pair.tell()
    assert pair.here.status("B").health is Health.ALIVE
    assert not node.left


def test_who_is_suspect_there_is_suspect_here(pair: Pair, spawn_node: Callable[..., Child]) -> None:
    child = spawn_node(pair.there.name, "B", group="G", interval_s=0.02)
    pair.members()
    pair.tell()
    assert pair.here.status("B").health is Health.ALIVE
    child.stop()
    wait_until(lambda: pair.tell() == 0 and pair.here.status("B").health is Health.SUSPECT)
    pair.mirror.apply(b"", 0)  # fresh news, which say nothing else
    assert pair.here.status("B").health is Health.SUSPECT
    child.go_on()
    wait_until(lambda: pair.tell() == 0 and pair.here.status("B").health is Health.ALIVE)


def test_a_suspect_is_one_by_every_clock(new_name: Callable[[], str]) -> None:
    """In a container with a time namespace of its own, stamps say nothing: only beats that stand
    still do. News that say "suspect" must not look like a heartbeat there."""
    pair = Pair(new_name(), new_name())
    pair.mirror = Mirror(pair.here, HERE, 0.15)
    node = pair.join()
    [member] = pair.origin.members()
    slot = pair.here.backend("B").info.slot
    Raw(pair.here.name).set("meta", "time_ns_id", 8, 1, slot)
    entry = [member.slot | member.generation << 32, 0, 0, 1, *[0] * 6]
    suspect = struct.pack("<10Q", *entry)
    with Segment.attach(pair.here.name) as there:
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            assert pair.mirror.apply(pair.origin.entries(full=True), 0) == 0
            assert there.status("B").health is Health.ALIVE
            time.sleep(0.02)

        def look() -> bool:
            assert pair.mirror.apply(suspect, 0) == 0
            return there.status("B").health is Health.SUSPECT

        wait_until(look, 2.0, 0.02)
        for _ in range(10):
            time.sleep(0.02)
            assert look()
        assert pair.mirror.apply(pair.origin.entries(full=True), 0) == 0
        assert there.status("B").health is Health.ALIVE
    assert not node.left
    pair.close()


# --- who is shown


def test_members_come_and_go(pair: Pair) -> None:
    b, c = pair.join("B"), pair.join("C")
    assert set(pair.mirror.nodes) == {"B", "C"}
    b.leave()
    pair.members()
    assert pair.mirror.nodes == ("C",)
    assert [status.node for status in pair.here.snapshot()] == ["C"]
    with pair.there.join("B", group="H", endpoint="other") as again:
        assert pair.members() == []
        assert pair.here.status("B").endpoint == "other"
        assert not again.left
    assert not c.left
    pair.mirror.leave()
    assert pair.here.snapshot() == ()
    pair.mirror.leave()


def test_another_incarnation_is_another_segment(pair: Pair) -> None:
    node = pair.join()
    before = pair.here.backend("B")
    assert pair.mirror.incarnation == pair.origin.incarnation
    members = pair.origin.members()
    assert pair.mirror.set_members(pair.origin.incarnation ^ 1, members) == []
    assert not before.alive
    assert pair.here.backend("B").alive
    with pytest.raises(ValueError, match="incarnation"):
        pair.mirror.set_members(0, members)
    assert not node.left


def test_entries_of_nodes_that_are_not_shown_are_counted(pair: Pair) -> None:
    node = pair.join()
    other = pair.there.join("C", group="G", endpoint="e")
    assert pair.tell() == 1
    assert set(pair.mirror.nodes) == {"B"}
    pair.members()
    assert pair.tell() == 0
    assert not node.left
    assert not other.left


def test_two_bridges_do_not_share_a_mirror(pair: Pair) -> None:
    node = pair.join()
    [(member, error)] = Mirror(pair.here, HERE, SUSPECT_S).set_members(
        pair.origin.incarnation, pair.origin.members()
    )
    assert member.node == "B"
    assert isinstance(error, NodeExists)
    assert not node.left


def test_nodes_of_this_host_and_mirrors_keep_apart(pair: Pair, name: str) -> None:
    with pytest.raises(SegmentForbidden, match="mirrors a segment of another host"):
        pair.here.join("mine", group="G", endpoint="e")
    with (
        Segment.open(name) as own,
        own.join("mine", group="G", endpoint="e"),
        pytest.raises(SegmentForbidden, match=r"nodes of this host \(mine"),
    ):
        Mirror(own, HERE, SUSPECT_S)


@pytest.mark.parametrize("host", [0, 1 << 24, -1])
def test_hosts_have_ids(pair: Pair, host: int) -> None:
    with pytest.raises((ValueError, OverflowError)):
        Mirror(pair.here, host, SUSPECT_S)


def test_an_observer_keeps_no_mirror(pair: Pair) -> None:
    with (
        Segment.attach(pair.here.name) as observer,
        pytest.raises(SegmentForbidden, match="read-only"),
    ):
        Mirror(observer, HERE, SUSPECT_S)


# --- nonsense


@pytest.mark.parametrize(
    "entries",
    [
        b"1234567",
        struct.pack("<9Q", *range(9)),
        struct.pack("<10Q", 1 << 16, *[0] * 9),  # says a gauge, and has none
        struct.pack("<10Q", 1 << 24, *[0] * 9),  # a share
        struct.pack("<27Q", 17 << 16, *[0] * 26),  # more gauges than there can be
    ],
)
def test_what_contradicts_itself_is_refused(pair: Pair, entries: bytes) -> None:
    with pytest.raises(ValueError, match=r"number of words|cut off"):
        pair.mirror.apply(entries, 0)


def test_no_bytes_do_harm(new_name: Callable[[], str]) -> None:
    """Whatever is applied: nobody crashes, a row has no more cells than it has, all come back."""
    pair = Pair(new_name(), new_name())
    node = pair.join(capacity=4)
    [member] = pair.origin.members()
    who = member.slot | member.generation << 32

    @settings(max_examples=300, deadline=None)
    @given(
        st.lists(st.integers(0, 2**64 - 1), min_size=9, max_size=9),
        st.lists(st.integers(0, 2**64 - 1), max_size=4),
        st.integers(0, 2**64 - 1),
    )
    def apply(words: list[int], shares: list[int], age_ns: int) -> None:
        shares = [share >> 24 | HERE << 40 if share & 1 else share for share in shares]
        entry = [who | len(shares) << 24, *words, *shares]
        assert pair.mirror.apply(struct.pack(f"<{len(entry)}Q", *entry), age_ns) == 0
        status = pair.here.status("B")
        assert 0 <= status.inflight < 1 << 20
        assert 0 <= status.waiting < 1 << 20

    apply()
    pair.tell()
    assert pair.queue() == 0
    with Router(pair.here) as router:
        leases = [router.acquire("G") for _ in range(4)]
        with pytest.raises(Saturated):
            router.acquire("G")
        for lease in leases:
            lease.release()
    assert not node.left
    pair.close()


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_whatever_bytes_come_the_row_stays_whole(shared_pair: Pair, data: st.DataObject) -> None:
    """Raw bytes, cut anywhere: refused or counted; no cell of a router is touched, none leaks."""
    pair = shared_pair
    [member] = pair.origin.members()
    whos = st.sampled_from([member.slot | member.generation << 32, member.slot, 2**64 - 1, 0])
    words = st.one_of(whos, st.integers(0, 2**64 - 1), st.integers(0, 40))
    entries = b"".join(
        struct.pack("<Q", word) for word in data.draw(st.lists(words, max_size=60))
    ) + data.draw(st.binary(max_size=9))
    with Router(pair.here) as router:
        lease = router.acquire("G")
        try:
            unknown = pair.mirror.apply(entries, data.draw(st.integers(0, 2**64 - 1)))
        except ValueError:
            pass
        else:
            assert 0 <= unknown <= len(entries) // 8
        raw = Raw(pair.here.name)
        slot = pair.here.backend("B").info.slot
        reserved = [cell for cell in raw.cells(slot) if cell >> 62 == 1]
        assert len(reserved) == 1, "the router's own"
        assert raw.taken() <= LEASES
        lease.release()
    pair.tell()
    assert raw.taken() == 0
    assert pair.queue() == 0
    assert raw.number("hot", "owed", 8, slot) == 0


@pytest.fixture
def shared_pair(pair: Pair) -> Pair:
    """One pair for all examples of a property: each leaves it as it was."""
    pair.node = pair.join(capacity=4)
    return pair


# What refuses may not be raised: the bridge has other nodes to show.
@pytest.mark.parametrize(
    "wrong",
    [
        {"slot": -1},
        {"slot": 4096},  # no segment has it, and an entry could not name it
        {"generation": -1},
        {"generation": 1 << 32},
        {"node": ""},
        {"node": "x" * 64},
        {"node": "\x1b[31m"},
        {"node": "\ud800"},
        {"group": ""},
        {"endpoint": "x" * 256},
        {"weight": float("nan")},
        {"weight": 10**400},
        {"slow_start_s": float("inf")},
        {"slow_start_s": -1.0},
        {"gauges": [f"g{i}" for i in range(17)]},
        {"gauges": ["a", "a"]},
        {"gauges": ["not an identifier"]},
        {"capacity": None},
    ],
)
def test_members_that_cannot_be_are_refused_alone(pair: Pair, wrong: dict[str, Any]) -> None:
    good = Member(1, 1, "good", "G", "e", 4, 1.0, [], 0.0)
    bad = Member(2, 1, "bad", "G", "e", 4, 1.0, [], 0.0)._replace(**wrong)
    [(member, error)] = pair.mirror.set_members(7, [bad, good])
    assert member is bad
    assert isinstance(error, (ValueError, TypeError, OverflowError))
    assert pair.mirror.nodes == ("good",)
    assert [status.node for status in pair.here.snapshot()] == ["good"]


@pytest.mark.parametrize(("told", "shown"), [(0, 1), (-5, 1), (4, 4), (10**30, LEASES)])
def test_capacity_is_what_the_row_has_at_most(pair: Pair, told: int, shown: int) -> None:
    assert pair.mirror.set_members(7, [Member(1, 1, "B", "G", "e", told, 1.0, [], 0.0)]) == []
    assert pair.here.status("B").capacity == shown


def test_an_entry_is_of_its_generation_alone(pair: Pair) -> None:
    """Two members in one slot is nonsense; still neither gets what was told of the other."""
    members = [Member(1, g, f"N{g}", "G", "e", 4, 1.0, [], 0.0) for g in (1, 2)]
    assert pair.mirror.set_members(7, members) == []
    entry = [1 | 1 << 32, 3 << 48 | 3, *[0] * 8]
    assert pair.mirror.apply(struct.pack("<10Q", *entry), 0) == 0
    assert [(s.node, s.queue) for s in pair.here.snapshot()] == [("N1", 3), ("N2", 0)]
    assert pair.mirror.apply(struct.pack("<10Q", 1 | 3 << 32, *entry[1:]), 0) == 1
    assert pair.mirror.set_members(7, members[1:]) == []
    assert pair.mirror.apply(struct.pack("<10Q", *entry), 0) == 1
    assert pair.mirror.apply(struct.pack("<10Q", 1 | 2 << 32, *entry[1:]), 0) == 0
    assert [(s.node, s.queue) for s in pair.here.snapshot()] == [("N2", 3)]


def test_an_entry_with_other_gauges_is_not_of_the_node(pair: Pair) -> None:
    node = pair.join(gauges=("kv",))
    [member] = pair.origin.members()
    node.publish(kv=0.5)
    pair.tell()
    who = member.slot | member.generation << 32
    for gauges in (0, 2):
        entry = [who | gauges << 16, 3 << 48 | 3, *[0] * (8 + gauges)]
        assert pair.mirror.apply(struct.pack(f"<{len(entry)}Q", *entry), 0) == 1
    assert (pair.queue(), pair.here.status("B").gauges) == (0, {"kv": 0.5})


def test_what_stands_before_the_fault_is_written(pair: Pair) -> None:
    node = pair.join()
    node.waiting = 4
    with pytest.raises(ValueError, match="cut off"):
        pair.mirror.apply(pair.origin.entries(full=True) + struct.pack("<Q", 1), 0)
    assert pair.queue() == 4


# --- whose it is


def test_a_join_and_a_mirror_at_once_see_each_other(pair: Pair, name: str) -> None:
    """A node has looked whether this is a mirror, a bridge marks it, and only then it claims."""
    errors: list[Exception] = []

    def join() -> None:
        try:
            own.join("mine", group="G", endpoint="e")
        except SegmentForbidden as error:
            errors.append(error)

    with Segment.open(name) as own:
        with ofd_lock(SHM / name, MEMBERSHIP_LOCK):
            thread = threading.Thread(target=join)
            thread.start()
            time.sleep(0.1)  # it is past its look, and waits for the lock
            mirror = Mirror(own, HERE, SUSPECT_S)
        thread.join(10.0)
        assert "mirrors a segment of another host" in str(errors[0])
        assert own.snapshot() == ()
        assert mirror.set_members(7, [Member(1, 1, "B", "G", "e", 4, 1.0, [], 0.0)]) == []
        mirror.leave()


def test_a_refused_mirror_leaves_the_segment_as_it_was(name: str) -> None:
    with Segment.open(name) as own, own.join("mine", group="G", endpoint="e"):
        with pytest.raises(SegmentForbidden):
            Mirror(own, HERE, SUSPECT_S)
        assert Raw(name).number("sync", "mirror", 8) == 0
        with own.join("more", group="G", endpoint="e"):
            pass


def test_dead_nodes_of_this_host_are_no_obstacle(
    name: str, spawn_node: Callable[..., Child]
) -> None:
    spawn_node(name, "mine").kill()
    with Segment.open(name) as own:
        assert [status.health for status in own.snapshot()] == [Health.DEAD]
        mirror = Mirror(own, HERE, SUSPECT_S)
        assert own.snapshot() == ()
        mirror.leave()


def test_what_a_killed_bridge_showed_does_not_stay(pair: Pair, spawn: Callable[..., Child]) -> None:
    """Nodes that left meanwhile are not told of any more: nobody would clear their slots."""
    child = spawn(
        "from shmcoord.mirror import Mirror\nfrom shmcoord.origin import Member\n"
        "mirror = Mirror(Segment.open(name), 5, 5.0)\n"
        "mirror.set_members(7, [Member(i, 1, f'N{i}', 'G', 'e', 4, 1.0, [], 0.0) "
        "for i in range(3)])\nsay('shown')\nhear()",
        pair.here.name,
    )
    assert child.hear() == "shown"
    assert len(pair.here.snapshot()) == 3
    child.kill()
    again = Mirror(pair.here, HERE, SUSPECT_S)
    assert again.set_members(7, [Member(0, 1, "N0", "G", "e", 4, 1.0, [], 0.0)]) == []
    assert [(s.node, s.health) for s in pair.here.snapshot()] == [("N0", Health.ALIVE)]
    again.leave()


def test_a_bridge_that_ends_leaves(pair: Pair, spawn: Callable[..., Child]) -> None:
    child = spawn(
        "from shmcoord.mirror import Mirror\nfrom shmcoord.origin import Member\n"
        "mirror = Mirror(Segment.open(name), 5, 5.0)\n"
        "mirror.set_members(7, [Member(1, 1, 'B', 'G', 'e', 4, 1.0, [], 0.0)])\n"
        "say('shown')\nhear()",
        pair.here.name,
    )
    assert child.hear() == "shown"
    assert child.finish() == 0
    assert pair.here.snapshot() == ()


def test_a_mirror_that_nobody_holds_leaves(pair: Pair) -> None:
    node = pair.join()
    with node.request():
        pair.tell()
    assert [status.node for status in pair.here.snapshot()] == ["B"]
    del pair.mirror
    gc.collect()
    assert pair.here.snapshot() == ()
    assert Raw(pair.here.name).taken() == 0
    pair.mirror = Mirror(pair.here, HERE, SUSPECT_S)


def test_a_closed_mirror_only_leaves(pair: Pair) -> None:
    node = pair.join()
    pair.here.close()
    for use in (
        lambda: pair.mirror.apply(b"", 0),
        pair.mirror.suspect,
        pair.members,
        lambda: Mirror(pair.here, HERE, SUSPECT_S),
    ):
        with pytest.raises(ValueError, match="closed"):
            use()
    with Segment.attach(pair.here.name) as observer:
        assert [status.node for status in observer.snapshot()] == ["B"]
        pair.mirror.leave()
        assert observer.snapshot() == ()
    assert not node.left


def test_a_fork_of_the_bridge_keeps_nothing(pair: Pair) -> None:
    """The child can use nothing of it, and its end changes nothing."""
    node = pair.join()
    with node.request():
        pair.tell()
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            said = []
            for use in (
                lambda: pair.mirror.apply(b"", 0),
                pair.mirror.suspect,
                lambda: pair.mirror.set_members(pair.mirror.incarnation, ()),
                pair.mirror.leave,
                pair.origin.mark,
                lambda: Mirror(pair.here, HERE, SUSPECT_S),
                lambda: Origin(pair.there).members(),
            ):
                try:
                    use()
                except Exception as error:  # noqa: BLE001
                    said.append(type(error).__name__)
                else:
                    said.append("nothing")
            said.append(",".join(pair.mirror.nodes))
            os.write(write, " ".join(said).encode())
            del pair.mirror, pair.origin
            gc.collect()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        os.close(write)
        with open(read, encoding="ascii") as file:
            assert file.read() == "ForkedHandle " * 7 + "B"
        assert pair.here.status("B").health is Health.ALIVE
        assert pair.queue() == 1
    pair.tell()
    assert pair.queue() == 0


@pytest.mark.parametrize("suspect_after_s", [0, -1.0, 0.002, 1e5, float("nan")])
def test_suspicion_needs_a_time(pair: Pair, suspect_after_s: float) -> None:
    with pytest.raises(ValueError, match="suspect_after_s must be between"):
        Mirror(pair.here, HERE, suspect_after_s)


@pytest.mark.parametrize("mapping", [None, "name", 3])
def test_only_a_segment_is_a_mirror(mapping: Any) -> None:
    with pytest.raises(TypeError):
        Mirror(mapping, HERE, SUSPECT_S)
