"""A segment of another host, as the bridge shows it on this one."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import re
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from helpers import MEMBERSHIP_LOCK, SHM, Child, Raw, ofd_lock, wait_until
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from policy_helpers import chi_square, chi_square_limit

from shmcoord import (
    Health,
    LeaseLost,
    LeaseReleased,
    NoBackend,
    Node,
    NodeExists,
    Router,
    Saturated,
    Segment,
    SegmentForbidden,
    State,
)
from shmcoord.dispatch import Dispatcher, NoneReachable
from shmcoord.mirror import Mirror
from shmcoord.origin import Member, Origin, host_id
from shmcoord.transport import ConnectionLost

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


@pytest.fixture
def pair(new_name: Callable[[], str]) -> Iterator[Pair]:
    made = Pair(new_name(), new_name())
    yield made
    made.close()


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


# --- shares


def test_our_part_is_ours_alone(pair: Pair) -> None:
    """Each request is counted once, before and after the news of it have come."""
    node = pair.join(capacity=4)
    with Router(pair.here) as router:
        lease = router.acquire("G")
        assert pair.queue() == 1
        request = node.adopt(lease.token)
        pair.tell()
        assert pair.queue() == 1
        theirs = node.request()
        pair.tell()
        assert pair.queue() == 2
        lease.release()
        assert pair.queue() == 1  # at once, though the news still have it
        pair.tell()
        assert pair.queue() == 1
        request.end()
        pair.tell()
        assert pair.queue() == 1
        theirs.end()
        pair.tell()
        assert pair.queue() == 0


def test_load_and_capacity_agree_with_a_model(new_name: Callable[[], str]) -> None:
    """Whatever happens in whatever order, the queue seen here is what was told without our part,
    plus what our routers hold; and no more cells are given than are free of both."""
    pair = Pair(new_name(), new_name())
    node = pair.join(capacity=4)
    router = Router(pair.here)
    elsewhere = host_id("h3")

    # Leases, others and tellings most: what matters is a row that is full.
    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.tuples(st.sampled_from("lllnnftttrabe"), st.integers(1, 3)), max_size=60))
    @example([("l", 1)] * 4 + [("n", 1)] * 2 + [("t", 1), ("r", 1), ("l", 1)])
    def run(steps: list[tuple[str, int]]) -> None:
        leases: list[Any] = []  # of our routers
        ours: list[Any] = []  # adopted ones, running there
        others: list[tuple[Any, int]] = []  # requests of that host, or of a third one
        told: list[int] = []  # their costs, as told last
        for step, cost in steps:
            if step == "l":
                free = 4 - len(leases) - len(told)
                if free > 0:
                    leases.append(router.acquire("G", cost=cost))
                else:
                    with pytest.raises(Saturated):
                        router.acquire("G", cost=cost)
            elif step == "r" and leases:
                assert leases.pop().release() is False
            elif step == "a" and len(ours) < len(leases):
                ours.append(node.adopt(leases[len(ours)].token))
            elif step == "b" and ours:
                ours.pop().end()
            elif step == "n" and len(ours) + len(others) < LEASES:
                others.append((node.request(), 1))
            elif step == "f" and len(ours) + len(others) < LEASES:
                info = pair.there.backend("B").info
                token = (
                    f"2-{pair.origin.incarnation:x}-{info.slot:x}-{info.generation:x}-"
                    f"{elsewhere:x}-{cost:x}"
                )
                others.append((node.adopt(token), cost))
            elif step == "e" and others:
                others.pop(0)[0].end()
            elif step == "t":
                pair.tell()
                told = [cost for _, cost in others]
            assert pair.queue() == sum(told) + sum(lease.cost for lease in leases)
        for lease in leases:
            lease.release()
        for request in (*ours, *(one for one, _ in others)):
            request.end()
        pair.tell()
        assert pair.queue() == 0

    run()
    router.close()
    pair.close()


def test_more_than_the_row_has_is_counted(pair: Pair) -> None:
    node = pair.join(capacity=2)
    with Router(pair.here) as router:
        lease = router.acquire("G")
        running = [node.request() for _ in range(LEASES + 3)]  # more than there are cells
        pair.tell()
        assert pair.queue() == LEASES + 3 + 1
        for request in running:
            request.end()
        pair.tell()
        assert pair.queue() == 1
        lease.release()
    assert pair.queue() == 0


def test_what_stands_above_the_capacity_comes_down(pair: Pair) -> None:
    """Two of ours have the two places; their third stands above, and takes a place that is free."""
    node = pair.join(capacity=2)
    with Router(pair.here) as router:
        ours = [router.acquire("G"), router.acquire("G")]
        theirs = node.request()
        pair.tell()
        assert pair.queue() == 3
        ours.pop().release()
        pair.tell()
        assert pair.queue() == 2
        with pytest.raises(Saturated):
            router.acquire("G")
        ours.pop().release()
        with router.acquire("G"):
            assert pair.queue() == 2
        theirs.end()


def _wait_for_a_lease(router: Router, served: list[str]) -> threading.Thread:
    def wait() -> None:
        with router.acquire("G", timeout_s=20.0) as lease:
            served.append(lease.node)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_who_waits_here_is_woken_by_news(pair: Pair) -> None:
    """By a request of others that has ended, and by a node that takes work again."""
    node = pair.join(capacity=1)
    theirs = node.request()
    pair.tell()
    served: list[str] = []
    with Router(pair.here) as router:
        thread = _wait_for_a_lease(router, served)
        wait_until(lambda: Raw(pair.here.name).number("sync", "waiters", 4) == 1)
        theirs.end()
        pair.tell()
        thread.join(10.0)
        assert served == ["B"]

        theirs = node.request()
        pair.tell()
        thread = _wait_for_a_lease(router, served)
        wait_until(lambda: Raw(pair.here.name).number("sync", "waiters", 4) == 1)
        node.drain()
        theirs.end()
        pair.tell()
        node.resume()
        pair.tell()
        thread.join(10.0)
        assert served == ["B", "B"]


def test_leases_of_dead_routers_come_back(pair: Pair, spawn: Callable[..., Child]) -> None:
    node = pair.join(capacity=2)
    child = spawn(
        "router = Router(name)\n"
        "leases = [router.acquire('G') for _ in range(2)]\n"
        "say('held')\n"
        "hear()",
        pair.here.name,
    )
    assert child.hear() == "held"
    assert pair.queue() == 2
    child.kill()
    with Router(pair.here) as router, router.acquire("G", timeout_s=5.0):
        pass
    wait_until(lambda: pair.queue() == 0)
    assert not node.left


# --- places owed


@pytest.mark.parametrize("leases", [2, LEASES], ids=["full row", "room above"])
def test_a_place_that_two_hosts_took_is_not_taken_again(
    new_name: Callable[[], str], leases: int
) -> None:
    """Both of ours and both of theirs are in two places. Who frees one must not have it again,
    whether theirs stand above the capacity or find no cell in the row at all."""
    with (
        Segment.open(new_name(), slots=4, leases=leases) as there,
        Segment.open(new_name(), slots=4, leases=leases) as here,
        there.join("B", group="G", endpoint="e", capacity=2) as node,
        Router(here) as router,
    ):
        origin, mirror = Origin(there), Mirror(here, HERE, SUSPECT_S)

        def tell() -> None:
            mirror.apply(origin.entries(full=True), 0)

        mirror.set_members(origin.incarnation, origin.members())
        ours = [router.acquire("G") for _ in range(2)]
        theirs = [node.request() for _ in range(2)]
        tell()
        for _ in range(2):  # before the news and after it
            ours.pop().release()
            for _ in range(2):
                with pytest.raises(Saturated):
                    router.acquire("G")
                tell()
        theirs.pop().end()
        tell()
        with router.acquire("G"), pytest.raises(Saturated):
            router.acquire("G")
        theirs.pop().end()
        tell()
        with router.acquire("G"), router.acquire("G"):
            pass
        assert Raw(here.name).taken() == 0
        mirror.leave()


def test_without_news_a_place_comes_back_all_the_same(pair: Pair) -> None:
    """What is owed is owed to requests that were told of: the rest of the capacity stays ours."""
    node = pair.join(capacity=3)
    with Router(pair.here) as router, node.request():
        ours = [router.acquire("G") for _ in range(3)]
        pair.tell()  # 3 of ours, 1 of theirs; and then nothing is heard any more
        ours.pop().release()
        with pytest.raises(Saturated):
            router.acquire("G")
        ours.pop().release()
        ours.append(router.acquire("G"))  # 2 of ours, 1 of theirs
        with pytest.raises(Saturated):
            router.acquire("G")
        for lease in ours:
            lease.release()


def test_two_hosts_come_down_to_the_capacity(new_name: Callable[[], str]) -> None:
    """Both take all four places at once, unheard of each other, and go on as fast as they can:
    as requests end, no more than four are left."""
    with (
        Segment.open(new_name(), slots=4, leases=16) as there,
        Segment.open(new_name(), slots=4, leases=16) as first,
        Segment.open(new_name(), slots=4, leases=16) as second,
        there.join("B", group="G", endpoint="e", capacity=4) as node,
    ):
        origin = Origin(there)
        hosts = [
            (Mirror(seen, host_id(f"h{i}"), SUSPECT_S), Router(seen), [])
            for i, seen in enumerate((first, second))
        ]
        for mirror, _, _ in hosts:
            mirror.set_members(origin.incarnation, origin.members())
        most = []
        for turn in range(40):
            for mirror, _, _ in hosts:
                if turn:
                    mirror.apply(origin.entries(full=True), 0)
            for _, router, running in hosts:
                if running:
                    lease, request = running.pop(0)
                    request.end()
                    lease.release()
                with contextlib.suppress(Saturated):  # at once, before the next news
                    while True:
                        lease = router.acquire("G")
                        running.append((lease, node.adopt(lease.token)))
            most.append(node.inflight)
        assert most[0] == 8, "they did not know"
        assert max(most[8:]) == 4
        assert min(most) == 4, "no place stays free"
        for mirror, router, running in hosts:
            for lease, request in running:
                request.end()
                lease.release()
            router.close()
            mirror.leave()
        assert node.inflight == 0


def test_who_waits_is_told_when_nothing_is_owed_any_more(pair: Pair) -> None:
    """The freed cell alone is not for him: it was given to others meanwhile. Then they end."""
    node = pair.join(capacity=1)
    served: list[str] = []
    with Router(pair.here) as router, Router(pair.here) as other:
        lease = other.acquire("G")
        theirs = node.request()
        pair.tell()
        thread = _wait_for_a_lease(router, served)
        wait_until(lambda: Raw(pair.here.name).number("sync", "waiters", 4) == 1)
        lease.release()
        for _ in range(2):
            time.sleep(0.1)
            assert served == []
            pair.tell()
        theirs.end()
        pair.tell()
        began = time.monotonic()
        thread.join(10.0)
        assert served == ["B"]
        assert time.monotonic() - began < 0.5, "he was not told, and looked by himself"


def test_costs_count_in_the_queue_and_cells_in_the_capacity(pair: Pair) -> None:
    node = pair.join(capacity=4)
    [member] = pair.origin.members()
    theirs = [
        node.adopt(
            f"2-{pair.origin.incarnation:x}-{member.slot:x}-{member.generation:x}-9-{cost:x}"
        )
        for cost in (3, 5, 65535)
    ]
    pair.tell()
    raw, slot = Raw(pair.here.name), pair.here.backend("B").info.slot
    assert pair.queue() == 3 + 5 + 65535
    assert raw.taken() == 3
    assert sum(cell >> 24 & 0xFFFF for cell in raw.cells(slot)) == pair.queue()
    with Router(pair.here) as router, router.acquire("G", cost=7):
        assert pair.queue() == 3 + 5 + 65535 + 7
        with pytest.raises(Saturated):
            router.acquire("G")
        theirs.pop().end()
        pair.tell()
        assert pair.queue() == 3 + 5 + 7
    for request in theirs:
        request.end()
    pair.tell()
    assert (pair.queue(), raw.taken()) == (0, 0)


def test_routers_and_the_bridge_at_once(pair: Pair, spawn: Callable[..., Child]) -> None:
    """Routers of three processes work as fast as they can while the news change all the time."""
    node = pair.join(capacity=3)
    children = [
        spawn(
            "router = Router(name)\n"
            "say('there')\n"
            "while hear() == 'go':\n"
            "    for _ in range(3000):\n"
            "        try:\n"
            "            leases = [router.acquire('G', cost=random.randint(1, 3))]\n"
            "            with contextlib.suppress(Saturated): leases.append(router.acquire('G'))\n"
            "            for lease in leases: lease.release()\n"
            "        except Saturated:\n"
            "            pass\n"
            "    say('done')\n",
            pair.here.name,
        )
        for _ in range(3)
    ]
    for child in children:
        assert child.hear() == "there"
        child.say("go")
    raw, slot = Raw(pair.here.name), pair.here.backend("B").info.slot
    theirs: list[Any] = []
    draw = random.Random(5)
    ended = 0
    until = time.monotonic() + 20.0
    finished = threading.Event()

    def listen() -> None:
        for child in children:
            child.hear()
        finished.set()

    listener = threading.Thread(target=listen)
    listener.start()
    while not finished.is_set():
        assert time.monotonic() < until
        if theirs and draw.random() < 0.5:
            theirs.pop(draw.randrange(len(theirs))).end()
            ended += 1
        elif len(theirs) < 5:
            theirs.append(node.request())
        pair.tell()
        cells = raw.cells(slot)
        reserved = [cell for cell in cells if cell >> 62 == 1]
        assert len(reserved) <= 3
        assert all(cell >> 62 != 1 for cell in cells[3:]), "routers keep below the capacity"
        held = sum(cell >> 62 == 2 for cell in cells)
        assert held <= len(theirs)
    listener.join()
    assert ended > 10
    pair.tell()
    # The word is a hint, which the beat thread's count may once have met in between.
    wait_until(lambda: pair.queue() == len(theirs))
    assert [cell >> 62 for cell in raw.cells(slot) if cell] == [2] * len(theirs)
    for request in theirs:
        request.end()
    pair.tell()
    wait_until(lambda: pair.queue() == 0)
    assert raw.taken() == 0


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


# --- leases that go away


def test_tokens_name_the_node_there(pair: Pair) -> None:
    node = pair.join(capacity=4)
    with Router(pair.here) as router, router.acquire("G", cost=3) as lease:
        kind, incarnation, slot, generation, host, cost = lease.token.split("-")
        assert kind == "2"
        assert int(incarnation, 16) == pair.origin.incarnation
        info = pair.there.backend("B").info
        assert (int(slot, 16), int(generation, 16)) == (info.slot, info.generation)
        assert (int(host, 16), int(cost, 16)) == (HERE, 3)
        with node.adopt(lease.token):
            assert node.inflight == 3
        with pytest.raises(LeaseLost):
            node.adopt(f"1-{incarnation}-{slot}-{generation}-0-0")


@pytest.mark.parametrize(
    ("part", "value", "why"),
    [
        (1, "1", "another segment"),
        (2, "7", "another node"),
        (3, "ffff", "another node"),
        (4, "0", "no host"),
        (4, "1000000", "no host"),
        (5, "0", "no cost"),
        (5, "10000", "no cost"),
        (5, "", "not a lease token"),
        (0, "3", "not a lease token"),
    ],
)
def test_other_tokens_are_refused(pair: Pair, part: int, value: str, why: str) -> None:
    node = pair.join()
    with Router(pair.here) as router, router.acquire("G") as lease:
        parts = lease.token.split("-")
        parts[part] = value
        with pytest.raises(LeaseLost, match=why):
            node.adopt("-".join(parts))
        assert node.inflight == 0
        assert node.refused == 1


@pytest.mark.parametrize("change", [Node.drain, Node.shutdown], ids=["drain", "shutdown"])
def test_who_takes_no_more_refuses_before_it_begins(
    pair: Pair, change: Callable[[Node], None]
) -> None:
    node = pair.join()
    with Router(pair.here) as router, router.acquire("G") as lease:
        change(node)
        with pytest.raises(LeaseLost, match="no more requests from other hosts"):
            node.adopt(lease.token)
        assert node.inflight == 0


def test_a_release_proves_nothing_across_hosts(pair: Pair) -> None:
    node = pair.join()
    with Router(pair.here) as router:
        lease = router.acquire("G")
        assert lease.release() is False
        with node.adopt(lease.token):  # it is on its way, and nobody can call it back
            assert node.inflight == 1


def test_the_bridge_dies_and_another_takes_over(pair: Pair, spawn: Callable[..., Child]) -> None:
    node = pair.there.join("B", group="G", endpoint="e", capacity=2)
    child = spawn(
        "from shmcoord.mirror import Mirror\nfrom shmcoord.origin import Origin\n"
        "origin = Origin(Segment.attach(sys.argv[2]))\n"
        "mirror = Mirror(Segment.open(name), 5, 5.0)\n"
        "mirror.set_members(origin.incarnation, origin.members())\n"
        "mirror.apply(origin.entries(True), 0)\nsay('shown')\nhear()",
        pair.here.name,
        pair.there.name,
    )
    assert child.hear() == "shown"
    with Router(pair.here) as router:
        lease = router.acquire("G")
        child.kill()
        wait_until(lambda: pair.here.status("B").health is Health.DEAD)
        with pytest.raises(NoBackend):
            router.acquire("G")
        assert pair.members() == []
        pair.tell()
        assert pair.here.status("B").health is Health.ALIVE
        assert pair.queue() == 0
        with router.acquire("G"):
            assert lease.release() is False  # of a time that is over: it frees nothing
            assert pair.queue() == 1
    assert not node.left


class _Broken:
    """A transport whose connection breaks once the node has begun."""

    def __init__(self, nodes: dict[str, Node]) -> None:
        self.nodes = nodes
        self.begun: list[str] = []

    def send(self, endpoint: str, method: str, request: Any, *, lease: str, timeout_s: Any) -> Any:
        self.nodes[endpoint].adopt(lease).end()
        self.begun.append(endpoint)
        raise ConnectionLost(endpoint)

    def close(self) -> None:
        pass


@pytest.mark.parametrize(("idempotent", "times"), [((), 1), (("say",), 2)])
def test_what_may_have_begun_elsewhere_is_not_sent_again(
    pair: Pair, idempotent: tuple[str, ...], times: int
) -> None:
    """On one host the lease that is still ours proves that nobody began. Here nothing does."""
    nodes = {f"e{name}": pair.join(name) for name in "BC"}
    with Router(pair.here) as router:
        transport = _Broken(nodes)
        dispatcher = Dispatcher(router, transport, adopts=True, idempotent=idempotent)
        with pytest.raises((ConnectionLost, NoneReachable)):
            dispatcher.call("G", "say", b"x", timeout_s=5.0)
        assert len(transport.begun) == times
    assert Raw(pair.here.name).taken() == 0


def test_a_lease_of_a_router_that_left_is_given_back_once(pair: Pair) -> None:
    node = pair.join(capacity=2)
    with Router(pair.here) as router:
        kept, dropped = router.acquire("G"), router.acquire("G")
        assert pair.queue() == 2
        del dropped
        gc.collect()
        assert pair.queue() == 1
        with kept:
            pass
        assert kept.released
        with pytest.raises(LeaseReleased):
            kept.release()
        kept = router.acquire("G")
    assert pair.queue() == 0
    assert kept.release() is False
    assert node.inflight == 0


def test_the_same_name_again_is_another_node(pair: Pair) -> None:
    """A lease on the former one frees nothing of the new one, and its token is refused."""
    before = pair.join(capacity=2)
    with Router(pair.here) as router:
        lease = router.acquire("G")
        before.leave()
        after = pair.join(capacity=2)
        assert pair.queue() == 0
        with pytest.raises(LeaseLost, match="an earlier process"):
            after.adopt(lease.token)
        with router.acquire("G") as again:
            assert lease.release() is False
            assert pair.queue() == 1
            with after.adopt(again.token):
                pass
    assert Raw(pair.here.name).taken() == 0


def test_a_segment_made_anew_there_is_another(pair: Pair, new_name: Callable[[], str]) -> None:
    former = pair.join()
    with Router(pair.here) as router, Segment.open(new_name(), slots=8, leases=LEASES) as there:
        lease = router.acquire("G")
        node = there.join("B", group="G", endpoint="e")
        origin = Origin(there)
        assert pair.mirror.set_members(origin.incarnation, origin.members()) == []
        pair.mirror.apply(origin.entries(full=True), 0)
        assert pair.queue() == 0
        with pytest.raises(LeaseLost, match="another segment"):
            node.adopt(lease.token)
        assert lease.release() is False
        with node.adopt(router.acquire("G").token):
            pass
    assert not former.left


# --- routing


def joined(pair: Pair, count: int, **options: Any) -> list[Node]:
    return [pair.join(f"N{i}", **options) for i in range(count)]


def test_two_are_drawn_among_nodes_of_other_hosts(pair: Pair) -> None:
    """The least loaded of six gets what chance gives to one of two: 1 in 3, not everything."""
    nodes = joined(pair, 6)
    for i, node in enumerate(nodes):
        node.waiting = i
    pair.tell()
    with Router(pair.here, seed=7) as router:
        count = Counter(router.pick("G").node for _ in range(6000))
    # Of 15 pairs the least loaded is in 5, the next in 4 more, ..., the last is never the better.
    for i, node in enumerate(nodes):
        assert abs(count[node.name] - 6000 * (5 - i) / 15) < 200


def test_two_of_them_are_compared_as_ours_are(pair: Pair) -> None:
    nodes = joined(pair, 2)
    nodes[0].waiting = 1
    pair.tell()
    with Router(pair.here) as router:
        assert {router.pick("G").node for _ in range(100)} == {"N1"}


def test_ours_come_first_by_the_margin(pair: Pair, name: str) -> None:
    nodes = joined(pair, 4)
    with (
        Segment.open(name) as own,
        own.join("mine", group="G", endpoint="e") as mine,
        Router(own, pair.here, remote_margin=2.0) as router,
    ):
        assert {router.pick("G").node for _ in range(100)} == {"mine"}
        mine.waiting = 1
        assert {router.pick("G").node for _ in range(100)} == {"mine"}
        mine.waiting = 3
        assert {router.pick("G").node for _ in range(400)} == {"N0", "N1", "N2", "N3"}
    assert not any(node.left for node in nodes)


def test_every_place_is_found_though_only_two_are_looked_at(pair: Pair) -> None:
    joined_nodes = joined(pair, 6, capacity=2)
    with Router(pair.here) as router:
        leases = [router.acquire("G") for _ in range(12)]
        assert Counter(lease.node for lease in leases) == {f"N{i}": 2 for i in range(6)}
        with pytest.raises(Saturated):
            router.acquire("G")
        for lease in leases:
            lease.release()
    assert len(joined_nodes) == 6


def test_suspects_of_other_hosts_are_no_reason_for_panic(
    new_name: Callable[[], str], name: str
) -> None:
    """One healthy node of ours, five silent ones: with nodes of ours that would be panic."""
    pair = Pair(new_name(), new_name())
    nodes = joined(pair, 5)
    pair.mirror.suspect()
    with (
        Segment.open(name) as own,
        own.join("mine", group="G", endpoint="e") as mine,
        Router(own, pair.here) as router,
    ):
        mine.waiting = 10
        decision = router.explain("G")
        assert not decision.panic
        assert {router.pick("G").node for _ in range(100)} == {"mine"}
        mine.drain()
        assert router.pick("G").node in {node.name for node in nodes}  # rather them than nobody
    pair.close()


def passed_over(router: Router) -> dict[str, str]:
    return {one.node: one.passed_over for one in router.explain("G").candidates}


def test_explain_tells_of_other_hosts(pair: Pair, name: str) -> None:
    """Each remark is true of the very draw: explain decides as pick does."""
    nodes = joined(pair, 4, capacity=4)
    nodes[3].waiting = 9
    pair.tell()
    with (
        Segment.open(name) as own,
        own.join("mine", group="G", endpoint="e") as mine,
        Router(own, pair.here, remote_margin=2.0, seed=3) as router,
    ):
        assert passed_over(router) == {
            "mine": "",
            **{f"N{i}": "of another host" for i in range(3)},
            "N3": "higher score",
        }
        mine.waiting = 7
        seen = {tuple(sorted(passed_over(router).items())) for _ in range(300)}
        not_drawn = "of another host, and not one of the two that were drawn"
        for reasons in map(dict, seen):
            [chosen] = [node for node, reason in reasons.items() if not reason]
            assert chosen != "N3", "of two that were drawn it is the worse"
            assert reasons["N3"] == "higher score"
            if chosen == "mine":
                raise AssertionError("two idle ones of another host, or one and N3, are better")
            assert reasons["mine"] == "higher score"
            assert {reasons[node] for node in ("N0", "N1", "N2") if node != chosen} == {"tie"}
        nodes[0].waiting = nodes[1].waiting = 3
        pair.tell()
        seen = {tuple(sorted(passed_over(router).items())) for _ in range(300)}
        assert {dict(one)["N2"] for one in seen} == {"", not_drawn}
        for reasons in map(dict, seen):
            if reasons["N2"] == "":
                assert reasons["N0"] == reasons["N1"] == "higher score"


def test_explain_tells_why_a_remote_node_is_suspect(pair: Pair) -> None:
    nodes = joined(pair, 2)
    with Router(pair.here, seed=3) as router:
        pair.mirror.suspect()
        wait_until(lambda: all("suspect" in w for w in passed_over(router).values() if w))
        [why] = [why for why in passed_over(router).values() if why]
        assert re.fullmatch(
            r"suspect: no news of it for 5\.\d s, or its own host finds it late", why
        )
        nodes[0].drain()
        pair.tell()
        pair.mirror.suspect()
        assert passed_over(router)["N0"] == "draining"


def test_with_no_margin_an_idle_node_is_one_wherever_it_is(pair: Pair, name: str) -> None:
    nodes = joined(pair, 5)
    with (
        Segment.open(name) as own,
        own.join("mine", group="G", endpoint="e") as mine,
        Router(own, pair.here, remote_margin=0.0, seed=11) as router,
    ):
        count = Counter(router.pick("G").node for _ in range(6000))
        # Of the idle ones ours and the two that are drawn tie.
        assert abs(count["mine"] - 2000) < 200
        assert all(abs(count[node.name] - 800) < 150 for node in nodes)
        mine.waiting = 1
        count = Counter(router.pick("G").node for _ in range(6000))
        assert count["mine"] == 0


def test_the_two_are_drawn_among_those_that_can_be_taken(pair: Pair) -> None:
    """Of six two are out of reach and one drains: each of the others is as likely."""
    nodes = joined(pair, 6)
    nodes[2].drain()
    pair.tell()
    with Router(pair.here, seed=5, panic_threshold=0.3) as router:
        for node in ("N0", "N1"):
            router.mark_unreachable(pair.here.backend(node), 60.0)
        count = Counter(router.pick("G").node for _ in range(6000))
        assert chi_square(count, ["N3", "N4", "N5"]) < chi_square_limit(2)
        for node in ("N3", "N4"):
            router.mark_unreachable(pair.here.backend(node), 60.0)
        # One of five that take work: panic, so that all but the draining one are used.
        count = Counter(router.pick("G").node for _ in range(6000))
        assert set(count) == {"N0", "N1", "N3", "N4", "N5"}
        nodes[5].drain()
        pair.tell()
        assert router.pick("G").node in {"N0", "N1", "N3", "N4"}


@pytest.mark.parametrize("count", [1, 2, 3, 9, 40])
def test_a_draw_finds_the_only_one_that_is_open(new_name: Callable[[], str], count: int) -> None:
    with (
        Segment.open(new_name(), slots=64, leases=2) as there,
        Segment.open(new_name(), slots=64, leases=2) as here,
    ):
        nodes = [there.join(f"N{i}", group="G", endpoint="e") for i in range(count)]
        for node in nodes[:-1]:
            node.drain()
        origin, mirror = Origin(there), Mirror(here, HERE, SUSPECT_S)
        mirror.set_members(origin.incarnation, origin.members())
        mirror.apply(origin.entries(full=True), 0)
        with Router(here, seed=1) as router:
            assert {router.pick("G").node for _ in range(50)} == {f"N{count - 1}"}
            leases = [router.acquire("G") for _ in range(2)]
            with pytest.raises(Saturated):
                router.acquire("G")
            for lease in leases:
                lease.release()
            nodes[-1].drain()
            mirror.apply(origin.entries(full=True), 0)
            with pytest.raises(NoBackend, match="draining"):
                router.acquire("G")
        mirror.leave()


def test_saturated_groups_of_two_hosts_wait_for_either(pair: Pair, name: str) -> None:
    """All places of ours and theirs are taken; whoever frees one wakes who waits."""
    theirs = pair.join("theirs", capacity=1)
    with (
        Segment.open(name) as own,
        own.join("mine", group="G", endpoint="e", capacity=1) as mine,
        Router(own, pair.here) as router,
    ):
        held = {lease.node: lease for lease in (router.acquire("G"), router.acquire("G"))}
        assert set(held) == {"mine", "theirs"}
        with pytest.raises(Saturated):
            router.acquire("G")
        for node in ("theirs", "mine"):
            served: list[str] = []
            thread = _wait_for_a_lease(router, served)
            segment = pair.here if node == "theirs" else own
            wait_until(lambda at=segment: Raw(at.name).number("sync", "waiters", 4) == 1)
            held.pop(node).release()
            thread.join(10.0)
            assert served == [node]
            held[node] = router.acquire("G")
        for lease in held.values():
            lease.release()
    assert not theirs.left
    assert mine.left


def test_a_node_that_fails_there_is_ejected_here(new_name: Callable[[], str]) -> None:
    """Served and failed are published, so that each host judges by itself."""
    pair = Pair(new_name(), new_name())
    pair.mirror = Mirror(pair.here, HERE, 0.3)
    nodes = joined(pair, 3)
    with Router(pair.here, seed=1, eject_s=60.0) as router:
        assert {router.pick("G").node for _ in range(60)} == {"N0", "N1", "N2"}
        for _ in range(5):
            nodes[0].end(nodes[0].begin(), failed=True)
        pair.tell()

        def ejected() -> bool:
            pair.tell()
            return passed_over(router)["N0"].startswith("ejected for failing")

        wait_until(ejected)
        assert {router.pick("G").node for _ in range(60)} == {"N1", "N2"}
    pair.close()


def test_a_newcomer_there_starts_slowly_here(pair: Pair) -> None:
    """Since it joined there, not since we heard of it."""
    old = pair.join("old", slow_start_s=0.2)
    time.sleep(0.25)
    new = pair.join("new", slow_start_s=3600.0)
    again = Mirror(pair.here, HERE, SUSPECT_S)  # as of a bridge that was started again
    pair.mirror.leave()
    pair.mirror = again
    pair.members()
    pair.tell()
    with Router(pair.here, seed=1) as router:
        shares = {one.node: one.share for one in router.explain("G").candidates}
        assert shares == {"old": 1.0, "new": 0.1}
        count = Counter(router.pick("G").node for _ in range(2000))
        assert count["new"] < 200
    assert not old.left
    assert not new.left
