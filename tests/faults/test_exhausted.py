"""Slots, leases, descriptors and threads run out: a typed error, and it works again afterwards."""

from __future__ import annotations

import contextlib
import json

import pytest
from helpers import SHM, Raw, ofd_lock, run

from shmcoord import NoBackend, Router, Saturated, Segment, SegmentFull


def fill_slots(segment):
    """All six slots taken, more refused, and all given back; how many were refused."""
    with contextlib.ExitStack() as stack:
        nodes = [
            stack.enter_context(segment.join(f"n{i}", group="GREEN", endpoint="e"))
            for i in range(6)
        ]
        for _ in range(3):
            with pytest.raises(SegmentFull, match="6 slots"):
                segment.join("more", group="GREEN", endpoint="e")
        with Router(segment) as router, pytest.raises(SegmentFull):
            router.acquire("GREEN")
        nodes[5].leave()
        with Router(segment) as router:
            assert router.acquire("GREEN").release()
        stack.enter_context(segment.join("again", group="GREEN", endpoint="e"))
    assert segment.snapshot() == ()
    return 4


def test_slots(name, count, report):
    rounds = count(20, 3000)
    with Segment.open(name, slots=6, leases=4) as segment:
        refused = sum(fill_slots(segment) for _ in range(rounds))
    report("slots exhausted", rounds=rounds, segment_full=refused, works_afterwards=rounds)


def test_a_slot_that_does_not_come_back_is_found(name, report):
    """The control: somebody has left and kept the lock of his slot."""
    with Segment.open(name, slots=6, leases=4) as segment:
        fill_slots(segment)
        with ofd_lock(SHM / name, 3), pytest.raises(SegmentFull) as found:
            fill_slots(segment)
        fill_slots(segment)
    report("slots exhausted, control: one lock is kept", f"found: {type(found.value).__name__}")


def fill_leases(name, router, nodes):
    """All leases of two nodes taken, more refused, all given back; how many were refused."""
    held = [router.acquire("GREEN") for _ in range(10)]
    assert Raw(name).taken() == 10
    for timeout_s in (0, 0.0005):
        with pytest.raises(Saturated):
            router.acquire("GREEN", timeout_s=timeout_s)
    # What no router reserved is let in, and counted, also beyond the capacity.
    own = [nodes[0].begin() for _ in range(6)]
    for handle in own:
        nodes[0].end(handle)
    assert held.pop().release()
    with router.acquire("GREEN"):
        assert nodes[0].inflight + nodes[1].inflight == 10
    for lease in held:
        assert lease.release()
    assert Raw(name).taken() == 0
    return 2


def two_nodes(segment):
    return [
        segment.join(f"n{i}", group="GREEN", endpoint="e", capacity=5, interval_s=60)
        for i in range(2)
    ]


def test_a_lease_that_nobody_owns_is_found(name, native, report):
    """The control: what a plain counter leaves behind takes capacity away for ever."""
    with Segment.open(name, slots=4, leases=8) as segment, Router(segment) as router:
        nodes = two_nodes(segment)
        fill_leases(name, router, nodes)
        native.take_ownerless(segment.backend("n0"))
        with pytest.raises(Saturated):
            fill_leases(name, router, nodes)
    report("leases exhausted, control: one has no owner", "found: Saturated")


def test_leases(name, count, report):
    rounds = count(50, 20_000)
    with Segment.open(name, slots=4, leases=8) as segment, Router(segment) as router:
        nodes = two_nodes(segment)
        refused = sum(fill_leases(name, router, nodes) for _ in range(rounds))
        for node in nodes:
            assert node.inflight == 0
            node.leave()
        with pytest.raises(NoBackend):
            router.acquire("GREEN")
    report("leases exhausted", rounds=rounds, saturated=refused, leaked=0)


DESCRIPTORS = """
import resource
rounds, leaks = int(sys.argv[2]), sys.argv[3:] == ["leak"]

def descriptors():
    "How many are open; the update thread's own, which reads /proc now and then, do not count."
    counts = []
    for _ in range(10):
        counts.append(len(os.listdir("/proc/self/fd")))
        time.sleep(0.003)
    return min(counts)

with Segment.open(name, slots=8, leases=8) as warm:
    with warm.join("w", group="GREEN", endpoint="e", interval_s=0.01) as node:
        with Router(name) as router:
            router.acquire("GREEN").release()
        time.sleep(0.05)
warm = node = router = None
gc.collect()
errors, made = {}, 0
before = descriptors()
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
for round in range(rounds):
    for spare in range(0, 7):
        soft = max(map(int, os.listdir("/proc/self/fd"))) + spare
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        held = []
        try:
            for _ in range(8):
                held.append(Segment.open(name))
                held.append(Segment.attach(name))
                node = held[0].join("B", group="GREEN", endpoint="e", interval_s=0.005)
                held.append(node)
                router = Router(name)
                held.append(router)
                router.acquire("GREEN").release()
                node.leave()
        except (ShmcoordError, OSError) as error:
            word = f"{type(error).__name__} {getattr(error, 'errno', '')}".strip()
            errors[word] = errors.get(word, 0) + 1
        else:
            raise AssertionError("there was no end of descriptors")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            for one in reversed(held):
                one.leave() if isinstance(one, Node) else one.close()
            held.clear()
            node = router = one = None
            gc.collect()
        # Works again.
        with Segment.open(name) as segment, segment.join("B", group="GREEN", endpoint="e") as node:
            with Router(segment) as router:
                router.acquire("GREEN").release()
        segment = node = router = None
        made += 1
        gc.collect()
        if leaks:
            os.dup(0)
        now = descriptors()
        if leaks and now != before:
            say(json.dumps([made, {"leaked": now - before}]))
            sys.exit()
        assert now == before, (before, now, os.listdir("/proc/self/fd"), spare)
segment = Segment.open(name)
assert segment.reap() == 0 and segment.snapshot() == ()
say(json.dumps([made, errors]))
"""


def test_descriptors(name, count, report):
    """RLIMIT_NOFILE at every distance: EMFILE as it is, nothing half-made, none leaked."""
    made, errors = json.loads(run(DESCRIPTORS, name, count(2, 300), timeout_s=1800))
    assert set(errors) == {"OSError 24"}, errors
    report("descriptors exhausted", refused=sum(errors.values()), works_afterwards=made, leaked=0)


def test_a_descriptor_that_leaks_is_found(name, report):
    """The control: one that is not closed in a round."""
    made, errors = json.loads(run(DESCRIPTORS, name, 1, "leak"))
    assert (made, errors) == (1, {"leaked": 1})
    report("descriptors exhausted, control: one is not closed", "found")


THREADS = """
import resource
rounds = int(sys.argv[2])
with Segment.open(name) as warm:  # so that all that is imported late is there
    with warm.join("w", group="w", endpoint="e", capacity=1), Router(name) as router:
        with router.acquire("w"), contextlib.suppress(Saturated):
            router.acquire("w", timeout_s=0.01)
Segment.unlink(name)
if os.geteuid() == 0:  # the limit does not hold for root
    os.setgid(54321)
    os.setuid(54321)
segment = Segment.open(name, slots=8, leases=2)
errors, made = {}, 0
hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]

def attempt(round):
    "In a child, whose threads have not started: each of them is refused, then all work."
    mine = Segment.open(name)
    refused = []
    def refuse(what, action):
        resource.setrlimit(resource.RLIMIT_NPROC, (0, hard))
        try:
            action()
        except (ShmcoordError, RuntimeError) as error:
            refused.append(f"{what}: {type(error).__name__}")
        finally:
            resource.setrlimit(resource.RLIMIT_NPROC, (hard, hard))
    join = lambda: mine.join("B", group="GREEN", endpoint="e", interval_s=0.02, capacity=2)
    refuse("join", join)
    assert mine.snapshot() == (), "a half-joined node stays"
    node = join()
    with Router(mine) as router:
        held = [router.acquire("GREEN") for _ in range(2)]
        refuse("wait", lambda: router.acquire("GREEN", timeout_s=0.5))
        threading.Timer(0.02, held[0].release).start()
        router.acquire("GREEN", timeout_s=5).release()
        held[1].release()
    time.sleep(0.1)
    for _ in range(500):  # a busy machine may be late for once
        if mine.status("B").health == Health.ALIVE:
            break
        time.sleep(0.01)
    assert mine.status("B").health == Health.ALIVE
    node.leave()
    os.write(into, (json.dumps(refused) + "\\n").encode())

out, into = os.pipe()
lines = []
with open(out) as file:
    for round in range(rounds):
        pid = forked(lambda: attempt(round))
        assert os.waitpid(pid, 0)[1] == 0
        for word in json.loads(file.readline()):
            errors[word] = errors.get(word, 0) + 1
        made += 1
assert segment.reap() == 0 and segment.snapshot() == ()
segment.close()
Segment.unlink(name)
say(json.dumps([made, errors]))
"""


def test_threads(name, count, report):
    """RLIMIT_NPROC: neither the beat thread nor the waiting thread can start."""
    made, errors = json.loads(run(THREADS, name, count(3, 300), timeout_s=1800))
    assert errors == {"join: ShmcoordError": made, "wait: RuntimeError": made}, errors
    report("threads exhausted", refused=sum(errors.values()), works_afterwards=made)


def test_the_limits_are_felt(report):
    """The control: without anybody's care the limits do refuse here."""
    said = run(
        """
import resource
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, hard))
try:
    while True:
        os.dup(0)
except OSError as error:
    say(error.errno)
""",
        "-",
    )
    assert said == "24\n"
    said = run(
        """
import resource
if os.geteuid() == 0:
    os.setgid(54321)
    os.setuid(54321)
resource.setrlimit(resource.RLIMIT_NPROC, (0, resource.getrlimit(resource.RLIMIT_NPROC)[1]))
try:
    threading.Thread(target=print).start()
except RuntimeError:
    say("refused")
""",
        "-",
    )
    assert said == "refused\n"
    report("limits, control", "EMFILE", "no thread is started")
