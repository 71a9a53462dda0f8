"""Who is alive, who makes progress, whose slot may be taken: three questions, three answers."""

from __future__ import annotations

import os
import signal
import time

import pytest
from helpers import MEMBERSHIP_LOCK, SHM, Raw, ofd_lock, run, wait_until

import shmcoord.liveness
from shmcoord import (
    Health,
    NoBackend,
    NodeExists,
    NodeNotFound,
    Router,
    Segment,
    SegmentFull,
    ShmcoordError,
    State,
)

INTERVAL_S = 0.05


# --- dead


def test_a_killed_node_is_dead_within_milliseconds(name, segment, spawn_node):
    delays = []
    for round_ in range(5):
        child = spawn_node(name, f"n{round_}", interval_s=30)
        backend = segment.backend(f"n{round_}")
        assert backend.alive
        os.kill(child.pid, signal.SIGKILL)
        delays.append(wait_until(lambda backend=backend: not backend.alive, 5, 0.0002))
        # No heartbeat was late (the interval is 30 s): the kernel's mark alone says it.
        assert segment.status(f"n{round_}").health == Health.DEAD
        child.kill()
    assert sorted(delays)[2] < 0.02


@pytest.mark.parametrize(
    "end",
    [
        "os.kill(os.getpid(), signal.SIGKILL)",
        "os._exit(3)",
        "os.abort()",
        "import ctypes; ctypes.string_at(0)",
        "os.execv('/bin/sleep', ['sleep', '30'])",
        "threading.Thread(target=lambda: os._exit(0)).start(); time.sleep(30)",
    ],
)
def test_death_in_every_way_is_seen_and_reaped(name, segment, spawn, end):
    """exec counts as the death of the owner: what it held is not there any more."""
    child = spawn(
        f"""
import resource
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
segment = Segment.open(name)
node = segment.join("B", group="GREEN", endpoint="e", interval_s=30)
handles = [node.begin() for _ in range(3)]
say("joined")
hear()
{end}
""",
        name,
    )
    child.hear()
    backend = segment.backend("B")
    assert backend.queue == 3
    child.say()
    wait_until(lambda: not backend.alive, 5)
    assert segment.status("B").health == Health.DEAD
    with Router(segment) as router, pytest.raises(NoBackend, match="B: dead"):
        router.pick("GREEN")
    # The lock may be free a little later than the word is marked.
    freed = []
    wait_until(lambda: freed.append(segment.reap()) or sum(freed) >= 4, 5)
    assert sum(freed) == 4, "three leases and a slot"
    assert segment.snapshot() == ()
    assert Raw(name).taken() == 0
    assert segment.reap() == 0


@pytest.mark.parametrize(
    "end",
    [
        "",
        "raise SystemExit(0)",
        "node = None; gc.collect()",
        "sys.keep = node",
        "threading.Thread(target=lambda: time.sleep(0.05)).start()",
        "with contextlib.suppress(ValueError): node.leave()",
    ],
)
def test_a_regular_end_leaves_no_dead_node(name, segment, spawn, end):
    child = spawn(
        f"""
segment = Segment.open(name)
node = segment.join("B", group="GREEN", endpoint="e", interval_s=0.001)
router = Router(name)
lease = router.acquire("GREEN")
handle = node.begin()
say("joined")
hear()
{end}
""",
        name,
    )
    child.hear()
    assert segment.status("B").inflight == 2
    assert child.finish() == 0
    assert segment.snapshot() == ()
    assert segment.reap() == 0, "the node and the router have left by themselves"
    assert Raw(name).taken() == 0


def test_a_regular_end_during_a_slow_refresh_leaves_no_dead_node(name, segment, spawn):
    """The update thread is inside of a sample when the process ends."""
    child = spawn(
        """
from shmcoord import update
segment = Segment.open(name)
node = segment.join("B", group="GREEN", endpoint="e", interval_s=0.005)
inside = threading.Event()
def slow():
    inside.set()
    time.sleep(3)
    return 0, 0.0
update.sample = slow
inside.wait()
say("joined")
hear()
""",
        name,
    )
    child.hear()
    assert child.finish() == 0
    assert [(status.node, status.health) for status in segment.snapshot()] == []


# --- suspect


def test_a_stopped_node_is_suspect_and_comes_back(name, segment, spawn_node):
    stopped = spawn_node(name, "stopped", interval_s=INTERVAL_S)
    other = segment.join("other", group="GREEN", endpoint="e", interval_s=INTERVAL_S)
    with Router(segment) as router:
        stopped.stop()
        began = time.monotonic()
        assert segment.status("stopped").health == Health.ALIVE
        wait_until(lambda: segment.status("stopped").health == Health.SUSPECT, 3)
        delay = time.monotonic() - began
        assert 1.5 * INTERVAL_S < delay < 10 * INTERVAL_S
        assert segment.backend("stopped").alive, "its process lives"
        assert segment.status("stopped").heartbeat_age_s > 2.5 * INTERVAL_S
        time.sleep(0.05)
        # Not routed to while others are there, however loaded those are.
        other.waiting = 1000
        assert {router.pick("GREEN").node for _ in range(100)} == {"other"}
        reasons = {c.node: c.passed_over for c in router.explain("GREEN").candidates}
        assert "suspect" in reasons["stopped"]
        assert reasons["other"] == ""
        # Never takes its slot: neither a reaper, nor the name, nor want of slots.
        assert segment.reap() == 0
        with pytest.raises(NodeExists):
            segment.join("stopped", group="GREEN", endpoint="e")
        fill = [segment.join(f"f{i}", group="x", endpoint="e") for i in range(6)]
        with pytest.raises(SegmentFull):
            segment.join("one more", group="x", endpoint="e")
        # Nobody else there: better a suspect than none.
        other.drain()
        assert router.pick("GREEN").node == "stopped"
        other.resume()
        stopped.go_on()
        wait_until(lambda: segment.status("stopped").health == Health.ALIVE, 3)
        wait_until(lambda: router.pick("GREEN").node == "stopped", 3)
        for node in [*fill, other]:
            node.leave()


def test_a_node_whose_gil_is_blocked_is_suspect(name, segment, spawn):
    """Its native thread beats on; that Python runs is another question."""
    child = spawn(
        """
import ctypes
segment = Segment.open(name)
node = segment.join("B", group="GREEN", endpoint="e", interval_s=0.05)
say("joined")
hear()
ctypes.PyDLL(None).usleep(900_000)  # PyDLL: with the GIL held
say("free")
hear()
""",
        name,
    )
    child.hear()
    beats = Raw(name).number("hot", "beats", 8)
    child.say()
    wait_until(lambda: segment.status("B").health == Health.SUSPECT, 2)
    assert segment.status("B").heartbeat_age_s < 0.15
    assert Raw(name).number("hot", "beats", 8) > beats
    assert segment.backend("B").alive
    child.hear()
    wait_until(lambda: segment.status("B").health == Health.ALIVE, 2)


def test_a_fresh_observer_judges_at_its_first_look(name, segment, spawn_node):
    child = spawn_node(name, "B", interval_s=INTERVAL_S)
    child.stop()
    time.sleep(5 * INTERVAL_S)
    with Segment.attach(name) as observer:
        assert observer.status("B").health == Health.SUSPECT
    child.go_on()


def test_stamps_of_another_clock_are_judged_by_movement(name, segment):
    """A stamp from the future, or of another time namespace, says nothing; the counters do."""
    with segment.join("B", group="GREEN", endpoint="e", interval_s=INTERVAL_S):
        raw = Raw(name)
        raw.set("meta", "time_ns_id", 8, 1)
        with Segment.attach(name) as observer:
            for _ in range(20):
                assert observer.status("B").health == Health.ALIVE
                time.sleep(INTERVAL_S / 4)
    with segment.join("C", group="GREEN", endpoint="e", interval_s=3600):
        raw.set("meta", "interval_ns", 8, int(INTERVAL_S * 1e9))  # it promises what it does not do
        raw.set("meta", "time_ns_id", 8, 1)
        raw.set("hot", "beat_ns", 8, 2**63)
        with Segment.attach(name) as observer:
            assert observer.status("C").health == Health.ALIVE
            wait_until(lambda: observer.status("C").health == Health.SUSPECT, 2)


def test_each_node_has_its_own_interval(name, segment):
    raw = Raw(name)
    with (
        segment.join("slow", group="GREEN", endpoint="e", interval_s=0.2) as slow,
        segment.join("fast", group="GREEN", endpoint="e", interval_s=0.02) as fast,
    ):
        assert (slow.interval_s, fast.interval_s) == (0.2, 0.02)
        before = [raw.number("hot", "beats", 8, slot) for slot in (0, 1)]
        time.sleep(1.0)
        after = [raw.number("hot", "beats", 8, slot) for slot in (0, 1)]
        assert 3 <= after[0] - before[0] <= 6
        assert 25 <= after[1] - before[1] <= 55


def test_the_default_heartbeat_is_two_seconds(segment):
    with segment.join("B", group="GREEN", endpoint="e") as node:
        assert node.interval_s == 2.0
        assert shmcoord.liveness.SUSPECT_INTERVALS == 3


# --- claim and reclaim


def test_a_name_is_taken_while_its_node_lives(name, segment, spawn_node):
    child = spawn_node(name, "B")
    with pytest.raises(NodeExists, match=str(child.pid)):
        segment.join("B", group="PINK", endpoint="e")
    assert segment.status("B").group == "GREEN"
    child.kill()
    with segment.join("B", group="PINK", endpoint="new") as node:  # reuse after death, no reap
        assert segment.status("B").endpoint == "new"
        assert [status.node for status in segment.snapshot()] == ["B"]
        with pytest.raises(NodeExists):
            segment.join("B", group="PINK", endpoint="e")
        node.leave()
        segment.join("B", group="PINK", endpoint="e").leave()
    with pytest.raises(NodeNotFound, match="none"):
        segment.status("B")


def test_a_full_segment_works_again_afterwards(name, spawn_node):
    with Segment.open(name, slots=3, leases=4) as segment:
        children = [spawn_node(name, f"n{i}") for i in range(3)]
        with pytest.raises(SegmentFull, match="3 slots"):
            segment.join("late", group="GREEN", endpoint="e")
        with Router(segment) as router:
            assert router.pick("GREEN").node in {"n0", "n1", "n2"}, "a pick needs no slot"
            with pytest.raises(SegmentFull):
                router.acquire("GREEN")
            children[0].kill()
            assert router.acquire("GREEN").release()  # takes the slot of the dead
            children[1].finish()
            with segment.join("late", group="GREEN", endpoint="e"):
                assert {s.node for s in segment.snapshot()} == {"n2", "late"}
                with pytest.raises(SegmentFull):
                    segment.join("later", group="GREEN", endpoint="e")


def test_slots_are_claimed_by_one_process_each(name):
    """40 processes for 16 slots, many times: no slot twice, the rest get SegmentFull."""
    said = run(
        """
import psutil
Segment.open(name, slots=16, leases=2).close()

def work(index):
    got = []
    for turn in range(6):
        segment = Segment.open(name)
        try:
            node = segment.join(f"n{index}.{turn}", group="GREEN", endpoint="e", interval_s=0.02)
        except SegmentFull:
            continue
        with node.request():
            status = segment.status(node.name)
            assert (status.pid, status.inflight) == (os.getpid(), 1)
            time.sleep(0.002)
            assert segment.status(node.name).pid == os.getpid()
        got.append(turn)
        if index % 4 == 0:
            os.kill(os.getpid(), signal.SIGKILL)  # with all that it holds
        if index % 4 == 1:
            node.begin()
            del node, segment
        else:
            node.leave()
    return len(got)

results = swarm(40, work)
assert all((result is None) == (index % 4 == 0) for index, result in enumerate(results)
           if result != 0), results
with Segment.open(name) as segment:
    segment.reap()
    assert segment.snapshot() == (), segment.snapshot()
    nodes = [segment.join(f"x{i}", group="g", endpoint="e") for i in range(16)]
    assert len(segment.snapshot()) == 16
    assert all(status.inflight == 0 for status in segment.snapshot())
say(sum(result or 0 for result in results))
""",
        name,
    )
    assert int(said) > 20
    assert Raw(name).taken() == 0


def test_one_name_is_joined_by_one_of_many(name):
    said = run(
        """
import psutil
Segment.open(name, slots=64, leases=2).close()
def work(index):
    segment = Segment.open(name)
    try:
        node = segment.join("B", group="GREEN", endpoint="e")
    except NodeExists:
        return 0
    time.sleep(0.5)
    return 1
for _ in range(2):
    assert sum(swarm(30, work)) == 1
""",
        name,
    )
    assert said == ""


def test_one_process_and_many_nodes(name, spawn, segment):
    """One native thread holds all words: all are marked at death, the middle ones may go before."""
    child = spawn(
        """
segment = Segment.open(name)
again = Segment.open(name)
nodes = [
    (segment, again)[i % 2].join(f"n{i}", group="GREEN", endpoint="e", interval_s=0.02)
    for i in range(7)
]
for i in (3, 0, 6):
    nodes[i].leave()
say("left")
hear()
""",
        name,
    )
    child.hear()
    assert {s.node for s in segment.snapshot()} == {"n1", "n2", "n4", "n5"}
    backends = [segment.backend(f"n{i}") for i in (1, 2, 4, 5)]
    assert all(backend.alive for backend in backends)
    # The slots that were left belong to another process now: nothing of the first may lead there.
    heirs = [segment.join(f"h{i}", group="x", endpoint="e", interval_s=3600) for i in range(3)]
    child.kill()
    assert not any(backend.alive for backend in backends)
    assert all(segment.backend(heir.name).alive for heir in heirs)
    assert segment.reap() == 4
    for heir in heirs:
        heir.leave()


def test_generations_tell_owners_apart(name, segment):
    raw = Raw(name)
    seen = []
    for _ in range(4):
        with segment.join("B", group="GREEN", endpoint="e"):
            seen.append(raw.number("hot", "generation", 4))
    assert seen == [seen[0] + i for i in range(4)]
    raw.set("hot", "generation", 4, 0xFFFFFFFF)
    with segment.join("B", group="GREEN", endpoint="e") as node:
        assert raw.number("hot", "generation", 4) & 0xFFFF != 0
        assert segment.status("B").state == State.IDLE
        with node.request():
            assert segment.status("B").inflight == 1


def test_epochs_move_with_the_membership(name, segment):
    raw = Raw(name)
    epochs = [raw.number("sync", "epoch", 8)]
    node = segment.join("B", group="GREEN", endpoint="e")
    epochs.append(raw.number("sync", "epoch", 8))
    node.begin().end()
    node.waiting = 3
    assert raw.number("sync", "epoch", 8) == epochs[-1]
    node.leave()
    epochs.append(raw.number("sync", "epoch", 8))
    assert epochs == sorted(set(epochs))


def test_a_stopped_joiner_holds_others_up_for_a_bounded_time(name, segment, monkeypatch):
    monkeypatch.setattr(shmcoord.liveness, "_CLAIM_PATIENCE_S", 0.1)
    with (
        ofd_lock(SHM / name, MEMBERSHIP_LOCK),
        pytest.raises(ShmcoordError, match="membership lock"),
    ):
        segment.join("B", group="GREEN", endpoint="e")
    segment.join("B", group="GREEN", endpoint="e").leave()


def test_a_slot_whose_lock_is_held_is_never_taken(name, segment):
    """The mark of death alone gives nobody a slot: its process may not be gone yet."""
    with ofd_lock(SHM / name, 0):
        node = segment.join("B", group="GREEN", endpoint="e", interval_s=3600)
        raw = Raw(name)
        assert raw.number("hot", "kind", 4, 0) == 0
        assert raw.number("hot", "kind", 4, 1) == 1
        node.leave()
        # A slot that looks dead, of an owner that is not gone.
        raw.set("hot", "kind", 4, 1)
        raw.set("hot", "death", 4, 0x40000000)
        raw.write(384, b"\x01")
        assert segment.reap() == 0
        nodes = [segment.join(f"n{i}", group="GREEN", endpoint="e") for i in range(7)]
        with pytest.raises(SegmentFull):
            segment.join("more", group="GREEN", endpoint="e")
    assert segment.reap() == 1
    segment.join("more", group="GREEN", endpoint="e").leave()
    del nodes


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_nodes_in_children_of_multiprocessing(name, segment, tmp_path, method):
    script = tmp_path / "main.py"
    script.write_text(
        """
import multiprocessing, sys
from shmcoord import Router, Segment

def serve(name, index, joined, leave):
    with Segment.open(name) as segment:
        with segment.join(f"n{index}", group="GREEN", endpoint=f"local:{index}"):
            joined.release()
            leave.acquire()

if __name__ == "__main__":
    method, name = sys.argv[1:]
    context = multiprocessing.get_context(method)
    mine = Segment.open(name)
    parent = mine.join("parent", group="GREEN", endpoint="e")  # before the children are made
    joined, leave = context.Semaphore(0), context.Semaphore(0)
    children = [context.Process(target=serve, args=(name, i, joined, leave)) for i in range(3)]
    for child in children:
        child.start()
    for child in children:
        assert joined.acquire(timeout=20)
    assert sorted(s.node for s in mine.snapshot()) == ["n0", "n1", "n2", "parent"]
    children[0].kill()
    children[0].join()
    assert not mine.backend("n0").alive
    with Router(mine) as router:
        assert {router.pick("GREEN").node for _ in range(200)} == {"n1", "n2", "parent"}
    for child in children:
        leave.release()
    for child in children[1:]:
        child.join()
        assert child.exitcode == 0
    assert mine.reap() == 1
    assert [s.node for s in mine.snapshot()] == ["parent"]
    assert mine.backend("parent").alive
"""
    )
    run(
        "import subprocess; subprocess.run([sys.executable, *sys.argv[2:]], check=True)",
        name,
        script,
        method,
        name,
    )
    assert segment.snapshot() == ()
