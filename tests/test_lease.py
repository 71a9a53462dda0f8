"""Leases: never above capacity, one owner each, and nothing leaks whoever dies when."""

from __future__ import annotations

import contextlib
import gc
import mmap
import struct
import threading
import time

import pytest
from helpers import MEMBERSHIP_LOCK, SHM, Raw, ofd_lock, run, wait_until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shmcoord import (
    Health,
    LeaseLost,
    LeaseReleased,
    NoBackend,
    Router,
    Saturated,
    Segment,
    State,
)


@pytest.fixture
def node(segment):
    with segment.join("B", group="GREEN", endpoint="host:1", capacity=4, interval_s=0.05) as node:
        yield node


@pytest.fixture
def router(segment):
    with Router(segment) as router:
        yield router


def states(name):
    """What is in the taken cells: 1 reserved, 2 running."""
    raw = Raw(name)
    return sorted(c >> 62 for slot in range(raw.slots) for c in raw.cells(slot) if c)


# --- one lease


def test_a_lease_knows_its_node(segment, node, router):
    lease = router.acquire("GREEN", cost=3)
    assert (lease.node, lease.endpoint, lease.group, lease.cost) == ("B", "host:1", "GREEN", 3)
    assert lease.backend == segment.backend("B")
    assert (lease.released, lease.decision) == (False, None)
    assert lease.backend.queue == 3
    assert segment.status("B").state == State.BUSY
    assert "B" in repr(lease)
    assert "held" in repr(lease)
    assert lease.release() is True
    assert lease.released
    assert "released" in repr(lease)
    assert lease.backend.queue == 0


def test_the_token_fits_into_headers(node, router):
    with router.acquire("GREEN") as lease:
        assert isinstance(lease.token, str)
        assert lease.token.isascii()
        assert lease.token.isprintable()
        assert not set(lease.token) & set(" ,;:=\"'")
        assert len(lease.token) < 128
        assert lease.token == lease.token.strip().lower()


def test_released_again_is_an_error_and_frees_nothing(name, segment, node, router):
    first = router.acquire("GREEN")
    first.release()
    second = router.acquire("GREEN")  # the same cell
    with pytest.raises(LeaseReleased):
        first.release()
    assert issubclass(LeaseReleased, LeaseLost)
    assert segment.status("B").inflight == 1
    assert states(name) == [1]
    with second:
        second.release()  # within: leaving the block is then no second release
    assert states(name) == []


def test_a_block_releases_also_on_error(name, node, router):
    with contextlib.suppress(KeyError), router.acquire("GREEN"):
        assert states(name) == [1]
        raise KeyError
    assert states(name) == []


def test_a_dropped_lease_is_released(name, segment, node, router):
    lease = router.acquire("GREEN")
    del lease
    assert states(name) == []
    assert segment.status("B").inflight == 0


def test_a_lease_outlives_the_name_router(name, segment, node):
    router = Router(name)
    lease = router.acquire("GREEN")
    router.close()
    assert states(name) == [], "closing gave it back"
    other = Router(segment)
    others = other.acquire("GREEN")
    assert lease.release() is False
    with pytest.raises(LeaseReleased):
        lease.release()
    assert states(name) == [1]
    others.release()
    other.close()


def test_a_router_that_is_dropped_gives_back_once_its_leases_go(name, segment, node):
    router = Router(name)
    lease = router.acquire("GREEN")
    del router
    assert states(name) == [1]
    assert lease.release() is True
    del lease
    with Router(segment) as other, other.acquire("GREEN"):
        assert states(name) == [1]


def test_a_collection_in_the_middle_of_everything(name, segment, node, router):
    """Finalisers that use the same node and router run whenever memory is asked for."""
    used = []

    class Garbage:
        def __init__(self):
            self.cycle = self

        def __del__(self):
            node.begin().end()
            with contextlib.suppress(Saturated):
                router.acquire("GREEN").release()
            with Segment.open(name) as other, other.join("x", group="x", endpoint="e"):
                used.append(1)

    before = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        for _ in range(200):
            Garbage()
            with router.acquire("GREEN") as lease, node.adopt(lease.token):
                pass
            Garbage()
            node.begin().end()
            Garbage()
            with Segment.open(name) as other, other.join("y", group="y", endpoint="e"):
                pass
    finally:
        gc.set_threshold(*before)
    gc.collect()
    assert len(used) > 100
    assert states(name) == []
    assert [status.node for status in segment.snapshot()] == ["B"]


@pytest.mark.parametrize(
    ("arguments", "options", "error"),
    [
        ((None,), {}, TypeError),
        ((b"GREEN",), {}, TypeError),
        (("GREEN",), {"cost": 0}, ValueError),
        (("GREEN",), {"cost": -1}, ValueError),
        (("GREEN",), {"cost": 65536}, ValueError),
        (("GREEN",), {"cost": 1.5}, TypeError),
        (("GREEN",), {"cost": True}, TypeError),
        (("GREEN",), {"cost": "1"}, TypeError),
        (("GREEN",), {"timeout_s": -1}, ValueError),
        (("GREEN",), {"timeout_s": float("nan")}, ValueError),
        (("GREEN",), {"timeout_s": "soon"}, ValueError),
        (("GREEN",), {"timeout_s": None}, TypeError),
        ((), {}, TypeError),
        (("GREEN",), {"nonsense": 1}, TypeError),
    ],
)
async def test_wrong_arguments_reserve_nothing(name, node, router, arguments, options, error):
    with pytest.raises(error):
        router.acquire(*arguments, **options)
    with pytest.raises(error):
        await router.acquire_async(*arguments, **options)
    assert states(name) == []


# --- capacity


def test_capacity_is_the_number_of_leases(segment, node, router):
    leases = [router.acquire("GREEN") for _ in range(4)]
    with pytest.raises(Saturated, match="B 4/4"):
        router.acquire("GREEN")
    leases.pop().release()
    leases.append(router.acquire("GREEN"))
    for lease in leases:
        assert lease.release()


def test_cost_is_for_the_queue_and_not_for_the_capacity(segment, node, router):
    leases = [router.acquire("GREEN", cost=65535) for _ in range(4)]
    assert segment.status("B").inflight == 4 * 65535
    with pytest.raises(Saturated):
        router.acquire("GREEN", cost=1)
    for lease in leases:
        lease.release()


def test_without_a_capacity_every_cell_counts(segment, router):
    with segment.join("C", group="PINK", endpoint="e") as node:
        assert node.capacity == segment.leases == 16
        leases = [router.acquire("PINK") for _ in range(16)]
        with pytest.raises(Saturated):
            router.acquire("PINK")
        for lease in leases:
            lease.release()


def test_work_without_a_lease_counts_and_is_never_refused(name, segment, node, router):
    handles = [node.begin() for _ in range(20)]  # 16 cells
    assert segment.status("B").inflight == 20
    assert states(name) == [2] * 16
    with pytest.raises(Saturated):
        router.acquire("GREEN")
    time.sleep(0.15)  # the beat's recount knows of those without a cell
    assert segment.status("B").inflight == 20
    for handle in handles:
        node.end(handle)
    assert segment.status("B").inflight == 0
    assert states(name) == []
    time.sleep(0.15)
    assert segment.status("B").inflight == 0
    router.acquire("GREEN").release()


CONTENDER = """
router = Router(name)
say("ready")
hear()
stop = time.monotonic() + 1.0
got = full = 0
while time.monotonic() < stop:
    try:
        leases = [router.acquire("GREEN") for _ in range(random.randrange(1, 4))]
    except Saturated:
        full += 1
        continue
    got += len(leases)
    if random.random() < 0.2:
        time.sleep(0.0002)
    for lease in leases:
        assert lease.release() is True
say(got, full)
hear()
"""


def test_never_above_capacity_with_many_processes(name, segment, spawn):
    with segment.join("B", group="GREEN", endpoint="e", capacity=5, interval_s=0.02):
        children = [spawn(CONTENDER, name) for _ in range(4)]
        for child in children:
            child.hear()
        for child in children:
            child.say("go")
        raw, most, looks = Raw(name), 0, 0
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            cells = raw.cells(0)
            assert not any(cells[5:]), "a cell above the capacity was taken"
            most = max(most, sum(cell != 0 for cell in cells))
            looks += 1
        results = [tuple(map(int, child.hear().split())) for child in children]
        assert most == 5
        assert all(got > 100 for got, _ in results)
        assert sum(full for _, full in results) > 0
        assert raw.taken() == 0
        time.sleep(0.06)
        assert segment.status("B").inflight == 0


def test_the_last_unit_is_held_by_one_of_many(name):
    """A mutex of capacity 1: what the holders do inside must not overlap."""
    said = run(
        """
import mmap
segment = Segment.open(name, slots=16, leases=4)
node = segment.join("B", group="GREEN", endpoint="e", capacity=1)
shared = mmap.mmap(-1, 8)

def work(index):
    router = Router(name)
    won = 0
    end = time.monotonic() + 0.8
    while time.monotonic() < end:
        try:
            lease = router.acquire("GREEN")
        except Saturated:
            continue
        assert shared[0] == 0, "two at once"
        shared[0] = index + 1
        for _ in range(random.randrange(50)):
            assert shared[0] == index + 1
        shared[0] = 0
        assert lease.release()
        won += 1
    return won

results = swarm(5, work)
assert None not in results, results
say(json.dumps(results))
""",
        name,
    )
    assert sum(map(int, said.strip("[]\n").split(","))) > 200


# --- adopt


def test_an_adopted_lease_is_the_nodes(name, segment, node, router):
    lease = router.acquire("GREEN", cost=2)
    with node.adopt(lease.token) as request:
        assert request.elapsed_s >= 0
        assert states(name) == [2]
        assert segment.status("B").inflight == 2, "the same unit, counted once"
        assert lease.release() is False, "adopted: it is not ours to free"
        assert states(name) == [2]
    assert states(name) == []
    status = segment.status("B")
    assert (status.inflight, status.served, status.failed) == (0, 1, 0)
    assert node.refused == 0


def test_the_router_may_release_after_the_node_has_ended(name, segment, node, router):
    lease = router.acquire("GREEN")
    node.end(node.adopt(lease.token))
    other = router.acquire("GREEN")  # perhaps in the same cell
    assert lease.release() is False
    assert states(name) == [1]
    other.release()
    assert segment.status("B").inflight == 0


def test_only_the_first_adopts(name, segment, node, router):
    lease = router.acquire("GREEN")
    request = node.adopt(lease.token)
    for count in (1, 2):
        with pytest.raises(LeaseLost):
            node.adopt(lease.token)
        assert node.refused == count
    node.end(request)
    with pytest.raises(LeaseLost):
        node.adopt(lease.token)
    assert (node.refused, node.served, states(name)) == (3, 1, [])


def test_a_released_lease_cannot_be_adopted(name, node, router):
    lease = router.acquire("GREEN")
    assert lease.release() is True, "which proves that nobody has adopted it"
    with pytest.raises(LeaseLost):
        node.adopt(lease.token)
    assert node.refused == 1
    fresh = router.acquire("GREEN")  # the same cell, another lease
    with pytest.raises(LeaseLost):
        node.adopt(lease.token)
    assert states(name) == [1]
    with node.adopt(fresh.token):
        pass


def test_a_lease_of_another_node_or_segment_is_lost(new_name, segment, node, router):
    other = segment.join("C", group="PINK", endpoint="e")
    lease = router.acquire("PINK")
    with pytest.raises(LeaseLost, match="another node"):
        node.adopt(lease.token)
    with Segment.open(new_name(), slots=8, leases=16) as elsewhere:
        same_slot = elsewhere.join("B", group="GREEN", endpoint="e")
        here = router.acquire("GREEN")
        with pytest.raises(LeaseLost, match="another segment"):
            same_slot.adopt(here.token)
        assert same_slot.refused == 1
        same_slot.leave()
    here.release()
    with other.adopt(lease.token):
        pass
    other.leave()


def test_a_lease_of_an_earlier_owner_of_the_slot_is_lost(segment, router):
    first = segment.join("B", group="GREEN", endpoint="e")
    lease = router.acquire("GREEN")
    first.leave()
    with segment.join("B", group="GREEN", endpoint="e") as second:
        with pytest.raises(LeaseLost, match="earlier"):
            second.adopt(lease.token)
        assert lease.release() is False
        assert segment.status("B").inflight == 0


HEX = "0123456789abcdef"


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_forged_tokens_are_lost_and_counted(name, segment, node, router, data):
    """Garbage, and true tokens with something changed."""
    with router.acquire("GREEN") as lease:
        true = lease.token
        garbage = st.text(max_size=200) | st.from_regex(r"1(-[0-9a-f_+x ]{0,18}){4,6}")
        position = st.integers(0, len(true) - 1)
        changed = st.tuples(position, st.sampled_from(HEX + "-zé-+_ \0")).map(
            lambda change: true[: change[0]] + change[1] + true[change[0] + 1 :]
        )
        cut = position.map(lambda end: true[:end])
        parts = true.split("-")
        swapped = st.tuples(st.integers(0, 5), st.integers(0, 2**64 + 5)).map(
            lambda swap: "-".join([*parts[: swap[0]], f"{swap[1]:x}", *parts[swap[0] + 1 :]])
        )
        token = data.draw(garbage | changed | cut | swapped)
        before = node.refused, Raw(name).cells(0)
        if token == true:
            return
        with pytest.raises(LeaseLost):
            node.adopt(token)
        assert (node.refused, Raw(name).cells(0)) == (before[0] + 1, before[1])


@pytest.mark.parametrize("token", [None, b"1-2-3-4-5-6", 7, ["x"]])
def test_tokens_are_str(node, token):
    with pytest.raises(TypeError):
        node.adopt(token)


def test_refusals_are_of_one_owner(segment):
    for _ in range(2):
        with segment.join("B", group="GREEN", endpoint="e") as node:
            assert node.refused == 0
            with pytest.raises(LeaseLost):
                node.adopt("garbage")
            assert node.refused == 1


def test_adopt_against_release(name):
    """Node and router fight for each lease: one of both has it, always, and nothing stays."""
    said = run(
        """
segment = Segment.open(name, slots=8, leases=8)
reader, writer = os.pipe()
answers, answer = os.pipe()

def serve():
    node = Segment.open(name).join("B", group="GREEN", endpoint="e", interval_s=0.02)
    os.write(answer, b"j")
    with os.fdopen(reader) as lines:
        for line in lines:
            try:
                request = node.adopt(line.strip())
            except LeaseLost:
                os.write(answer, b"n")
            else:
                request.end()
                os.write(answer, b"y")

os.set_blocking(writer, True)
pid = forked(serve)
assert os.read(answers, 1) == b"j"
counts = {"router": 0, "node": 0}
router = Router(segment)
end = time.monotonic() + 1.0
while time.monotonic() < end:
    lease = router.acquire("GREEN")
    os.write(writer, lease.token.encode() + b"\\n")
    until = time.perf_counter() + random.random() * 60e-6
    while time.perf_counter() < until:
        pass
    ours = lease.release()
    theirs = os.read(answers, 1) == b"y"
    assert ours != theirs, (ours, theirs)
    counts["router" if ours else "node"] += 1
status = segment.status("B")
assert status.served == counts["node"]
time.sleep(0.05)
assert segment.status("B").inflight == 0
os.kill(pid, signal.SIGKILL)
os.waitpid(pid, 0)
say(counts["router"], counts["node"])
""",
        name,
    )
    router, node = map(int, said.split())
    assert router + node > 500
    assert router > 0
    assert node > 0
    assert Raw(name).taken() == 0


# --- death

HOLDER = """
router = Router(name)
leases = [router.acquire("GREEN") for _ in range(int(sys.argv[2]))]
say(" ".join(lease.token for lease in leases))
hear()
"""


def test_leases_of_a_killed_router_are_swept_by_the_beat(name, segment, node, spawn):
    child = spawn(HOLDER, name, 3)
    child.hear()
    assert segment.status("B").inflight == 3
    child.kill()
    took = wait_until(lambda: Raw(name).taken() == 0, 2)
    assert took < 0.05 * 3
    wait_until(lambda: segment.status("B").inflight == 0, 0.5)
    assert segment.status("B").served == 0


def test_a_router_that_finds_all_taken_sweeps_at_once(name, segment, spawn):
    """No beat helps here: the node's interval is an hour."""
    with segment.join("B", group="GREEN", endpoint="e", capacity=4, interval_s=3600):
        child = spawn(HOLDER, name, 4)
        child.hear()
        with Router(segment) as router:
            with pytest.raises(Saturated):
                router.acquire("GREEN")
            child.kill()
            leases = [router.acquire("GREEN") for _ in range(4)]
            assert segment.status("B").inflight == 4
            for lease in leases:
                lease.release()
        assert segment.status("B").inflight == 0


def test_reap_frees_the_leases_of_the_dead(name, segment, spawn):
    with segment.join("B", group="GREEN", endpoint="e", interval_s=3600) as node:
        child = spawn(HOLDER, name, 3)
        token = child.hear().split()[0]
        request = node.adopt(token)
        child.kill()
        freed = segment.reap()
        assert freed == 2 + 1, "two leases and the router's slot; the adopted one is the node's"
        assert states(name) == [2]
        assert segment.status("B").inflight == 1
        node.end(request)
        assert states(name) == []


def test_an_adopted_lease_outlives_its_router(name, segment, node, spawn):
    child = spawn(HOLDER, name, 2)
    first, second = child.hear().split()
    request = node.adopt(first)
    child.kill()
    wait_until(lambda: states(name) == [2], 2)
    time.sleep(0.15)
    assert states(name) == [2]
    with pytest.raises(LeaseLost):  # reaped: refused before anything is done
        node.adopt(second)
    node.end(request)
    assert (node.served, node.refused, states(name)) == (1, 1, [])


def test_a_killed_node_frees_everything_and_is_passed_over(name, segment, spawn_node, router):
    child = spawn_node(name, "B", capacity=4)
    leases = [router.acquire("GREEN") for _ in range(3)]
    with segment.join("C", group="GREEN", endpoint="e", capacity=2) as other:
        other.waiting = 50
        child.kill()
        assert router.pick("GREEN").node == "C"
        with router.acquire("GREEN") as lease:
            assert lease.node == "C"
    with pytest.raises(NoBackend, match="dead"):
        router.acquire("GREEN", timeout_s=5)
    assert segment.reap() == 3 + 1
    for lease in leases:
        assert lease.release() is False
    with pytest.raises(NoBackend, match="has one joined"):
        router.acquire("GREEN")
    assert Raw(name).taken() == 0


def test_a_node_that_dies_between_scan_and_reserve(name, segment, spawn_node, router):
    """Killed at a random moment while a router acquires: an error or a lease, nothing stays."""
    outcomes = {"lease": 0, "none": 0}
    for round_ in range(4):
        child = spawn_node(name, f"n{round_}")
        router.acquire("GREEN").release()
        child.process.kill()
        end = time.monotonic() + 2
        while time.monotonic() < end:
            try:
                router.acquire("GREEN").release()
                outcomes["lease"] += 1
            except NoBackend:
                outcomes["none"] += 1
                break
        child.kill()
        segment.reap()
        assert Raw(name).taken() == 0
    assert outcomes["none"] == 4


def test_routers_and_nodes_killed_at_random_leak_nothing(name):
    said = run(
        """
import psutil
segment = Segment.open(name, slots=24, leases=16)

def route():
    router = Router(name)
    while True:
        held = []
        with contextlib.suppress(Saturated, NoBackend):
            for _ in range(random.randrange(1, 5)):
                held.append(router.acquire("GREEN", cost=random.randrange(1, 4)))
        for lease in held:
            if random.random() < 0.7:
                lease.release()
            else:
                del lease

def serve(index):
    mine = Segment.open(name)
    node = mine.join(f"n{index}", group="GREEN", endpoint="e", capacity=8, interval_s=0.02)
    router = Router(mine)
    while True:
        with contextlib.suppress(Saturated, LeaseLost, NoBackend):
            lease = router.acquire("GREEN")
            if lease.node == node.name:
                with node.adopt(lease.token):
                    handle = node.begin()
                    node.end(handle)

node = segment.join("own", group="GREEN", endpoint="e", capacity=8, interval_s=0.02)
kills = 0
running = {}
serial = 0
end = time.monotonic() + 2.5
while time.monotonic() < end or kills <= 50:  # slow builds take longer
    while len(running) < 6:
        serial += 1
        work = route if serial % 3 else (lambda index=serial: serve(index))
        running[forked(work)] = time.monotonic()
    time.sleep(random.random() * 0.012)
    pid = random.choice(list(running))
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL, "died by itself"
    del running[pid]
    kills += 1
for pid in running:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    kills += 1
freed = segment.reap()
time.sleep(0.06)
snapshot = segment.snapshot()
assert [status.node for status in snapshot] == ["own"], snapshot
assert snapshot[0].inflight == 0, snapshot[0]
say(kills, freed)
""",
        name,
    )
    kills, _freed = map(int, said.split())
    assert kills > 50
    assert Raw(name).taken() == 0


def test_adopt_against_reap(name):
    """The router dies with its leases in flight: each is adopted or reaped, never both or none."""
    said = run(
        """
import psutil
segment = Segment.open(name, slots=8, leases=32)
node = segment.join("B", group="GREEN", endpoint="e", interval_s=0.001)
adopted = lost = 0
for round in range(60):
    reader, writer = os.pipe()
    def route():
        router = Router(name)
        leases = [router.acquire("GREEN") for _ in range(24)]
        os.write(writer, " ".join(lease.token for lease in leases).encode())
        time.sleep(60)
    pid = forked(route)
    tokens = os.read(reader, 65536).decode().split()
    os.close(reader); os.close(writer)
    assert len(tokens) == 24
    os.kill(pid, signal.SIGKILL)
    requests = []
    for token in tokens:
        try:
            requests.append(node.adopt(token))
        except LeaseLost:
            lost += 1
    os.waitpid(pid, 0)
    segment.reap()
    time.sleep(0.005)
    assert segment.status("B").inflight == len(requests), (segment.status("B"), len(requests))
    for request in requests:
        request.end()
    adopted += len(requests)
time.sleep(0.01)
assert (node.served, node.refused) == (adopted, lost)
assert segment.status("B").inflight == 0
say(adopted, lost)
""",
        name,
    )
    adopted, lost = map(int, said.split())
    assert adopted + lost == 60 * 24
    assert Raw(name).taken() == 0


# --- drain


def test_a_draining_node_takes_no_new_lease_and_keeps_the_old(name, segment, node, router):
    lease = router.acquire("GREEN")
    node.drain()
    with pytest.raises(NoBackend, match="draining"):
        router.acquire("GREEN")
    with pytest.raises(NoBackend, match="draining"):
        router.pick("GREEN")
    with node.adopt(lease.token):
        assert (node.inflight, node.state) == (1, State.DRAINING)
    assert node.inflight == 0
    node.resume()
    router.acquire("GREEN").release()
    node.shutdown()
    with pytest.raises(NoBackend, match="shutdown"):
        router.acquire("GREEN")
    assert segment.status("B").state == State.SHUTDOWN
    assert segment.status("B").health == Health.ALIVE


def test_drain_against_acquire(name):
    """After drain() and one look at the cells nothing arrives, however fast routers are."""
    said = run(
        """
import psutil
segment = Segment.open(name, slots=16, leases=16)
node = segment.join("B", group="GREEN", endpoint="e", interval_s=0.02)

def route(index):
    router = Router(name)
    got = none = 0
    end = time.monotonic() + 1.2
    while time.monotonic() < end:
        try:
            lease = router.acquire("GREEN")
        except NoBackend:
            none += 1
        else:
            lease.release()
            got += 1
    return [got, none]

drains = []
def drain():
    end = time.monotonic() + 1.1
    while time.monotonic() < end:
        node.drain()
        until = time.monotonic() + 5
        while node.inflight and time.monotonic() < until:
            pass
        assert node.inflight == 0
        time.sleep(0.004)
        assert node.inflight == 0, "a lease after the drain"
        drains.append(1)
        node.resume()
        time.sleep(0.004)
thread = threading.Thread(target=drain)
thread.start()
results = swarm(3, route)
thread.join()
assert None not in results
say(len(drains), sum(got for got, _ in results), sum(none for _, none in results))
""",
        name,
    )
    drains, got, none = map(int, said.split())
    assert drains > 5
    assert got > 500
    assert none > 100


@pytest.mark.parametrize("change", ["drain", "shutdown", "leave", "kill"])
def test_what_changes_between_scan_and_reserve_is_seen(name, segment, spawn_node, change):
    """A router's first acquire picks, then claims its slot: there it is held up for the change."""
    child = node = None
    if change == "kill":
        child = spawn_node(name, "B", interval_s=3600)
    else:
        node = segment.join("B", group="GREEN", endpoint="e", interval_s=3600)
    outcome = []

    def acquire(router):
        try:
            outcome.append(router.acquire("GREEN"))
        except NoBackend as error:
            outcome.append(error)

    with Router(segment) as router:
        thread = threading.Thread(target=acquire, args=(router,))
        with ofd_lock(SHM / name, MEMBERSHIP_LOCK):
            thread.start()
            time.sleep(0.05)
            assert outcome == []
            if child is not None:
                child.kill()
            else:
                getattr(node, change)()
        thread.join()
        assert isinstance(outcome[0], NoBackend)
        assert Raw(name).taken() == 0


def test_a_sweep_never_frees_what_was_adopted(name, spawn):
    """Sweeper and node meet at each cell, very often: the death word of a router is falsified."""
    with (
        Segment.open(name, slots=4, leases=16) as segment,
        segment.join("B", group="GREEN", endpoint="e", interval_s=3600) as node,
        Router(segment) as router,
    ):
        router.acquire("GREEN").release()  # it has slot 1 now
        raw = Raw(name)
        word, cells = raw.offset("hot", "death", 1), raw.number("header", "lease_offset", 8)
        sweeper = spawn(
            """
segment = Segment.open(name)
say("ready")
hear()
end = time.monotonic() + 2.0
while time.monotonic() < end:
    segment.reap()
""",
            name,
        )
        sweeper.hear()
        with raw.path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
            alive = memory[word : word + 4]
            sweeper.say("go")
            adopted = lost = 0
            end = time.monotonic() + 1.7
            while time.monotonic() < end:
                leases = [router.acquire("GREEN") for _ in range(16)]
                tokens = [lease.token for lease in leases]
                memory[word : word + 4] = (0x40000000).to_bytes(4, "little")
                requests = []
                for token in tokens:
                    try:
                        requests.append(node.adopt(token))
                    except LeaseLost:
                        lost += 1
                row = struct.unpack("<16Q", memory[cells : cells + 128])
                assert sum(cell >> 62 == 2 for cell in row) == len(requests)
                memory[word : word + 4] = alive
                adopted += len(requests)
                for request in requests:
                    request.end()
                for lease in leases:
                    lease.release()
        assert adopted > 100
        assert lost > 100
        assert raw.taken() == 0


def test_late_releases_are_counted(name, segment, node, router):
    before = Raw(name).number("sync", "late_releases", 8)
    lease = router.acquire("GREEN")
    with node.adopt(lease.token):
        lease.release()
    assert Raw(name).number("sync", "late_releases", 8) == before + 1
