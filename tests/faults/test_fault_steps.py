"""SIGKILL at each single step of the protocol: what was held comes back, and nothing else moves.

A child on the build with step hooks dies behind one step; this process, on the ordinary build, has
a node and a router in the same segment, holds leases, and looks at everything afterwards.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import threading
import time
from pathlib import Path

import pytest
from fault_helpers import with_path
from helpers import Child, Raw, run, wait_until

import shmcoord
from shmcoord import NoBackend, Router, Saturated, Segment, SegmentFull, SegmentNotFound

CLAIM = ["membership", "slot", "generation", "meta", "load", "record", "link", "death"]
CLAIM += ["bitmap", "epoch"]
LEAVE = ["owned", "row", "word", "bitmap", "death", "unlink", "epoch", "unlock"]
REAP = ["owned", "row", "word", "bitmap", "death", "epoch"]
CREATE = ["open", "lock", "truncate", "allocate", "magic", "header", "ready"]

#: What the dying process does, and the steps behind which it dies.
SCENARIOS = {
    "join": [f"claim.{step}" for step in CLAIM],
    "first_acquire": [f"claim.{step}" for step in CLAIM],
    "leave": [*(f"leave.{step}" for step in LEAVE), "sweep.cas", "sweep.word"],
    "close_router": [f"leave.{step}" for step in LEAVE],
    "reap": [*(f"reap.{step}" for step in REAP), "sweep.cas", "sweep.word"],
    "take_name_of_dead": [f"reap.{step}" for step in REAP],
    "acquire_when_full": ["sweep.cas", "sweep.word"],
    "acquire": ["reserve.cas", "reserve.recheck", "reserve.word"],
    "adopt": ["adopt.cas"],
    "begin": ["begin.cas", "begin.word"],
    "release": ["free.cas", "free.word", "free.notify"],
    "end": ["free.cas", "free.word", "free.notify", "write.begin", "write.word", "write.commit"],
    "drain": ["drain.state"],
    "wait": ["wait.counted", "wait.turn", "wake.told", "wait.consumed"],
    "publish": ["write.begin", "write.word", "write.commit"],
    "create": [f"create.{step}" for step in CREATE],
}
CASES = [(scenario, step) for scenario, steps in SCENARIOS.items() for step in steps]

#: Forks a process for each line that it hears; it has no segment open itself.
ZYGOTE = """
import faultnative, psutil  # once, not in each child

def die():
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()

def victim():
    "A node that has a request, and a router that has leases on the parent's node; killed."
    def work():
        segment = Segment.open(name)
        node = segment.join("V", group="RED", endpoint="e", interval_s=3600)
        router = Router(segment)
        held = [node.begin(), router.acquire("GREEN"), router.acquire("GREEN")]
        die()
    assert os.waitstatus_to_exitcode(os.waitpid(forked(work), 0)[1]) == -signal.SIGKILL

def node_and_router():
    segment = Segment.open(name)
    node = segment.join("D", group="BLUE", endpoint="e", interval_s=3600, gauges=("a",))
    router = Router(segment)
    router.acquire("BLUE").release()
    return segment, node, router

def join(arm):
    segment = Segment.open(name)
    arm()
    segment.join("D", group="BLUE", endpoint="e", interval_s=3600)

def first_acquire(arm):
    router = Router(name)
    arm()
    router.acquire("GREEN")

def leave(arm):
    segment, node, router = node_and_router()
    held = [router.acquire("BLUE"), node.begin(), router.acquire("GREEN")]
    arm()
    node.leave()

def close_router(arm):
    router = Router(name)
    held = [router.acquire("GREEN")]
    arm()
    router.close()

def reap(arm):
    victim()
    segment = Segment.open(name)
    arm()
    segment.reap()

def take_name_of_dead(arm):
    victim()
    segment = Segment.open(name)
    arm()
    segment.join("V", group="RED", endpoint="e", interval_s=3600)

def acquire_when_full(arm):
    victim()
    router = Router(name)
    arm()
    router.acquire("GREEN")

def acquire(arm):
    segment, node, router = node_and_router()
    held = [router.acquire("GREEN")]
    arm()
    router.acquire("GREEN")

def adopt(arm):
    segment, node, router = node_and_router()
    lease = router.acquire("BLUE")
    arm()
    node.adopt(lease.token)

def begin(arm):
    segment, node, router = node_and_router()
    arm()
    node.begin()

def release(arm):
    segment, node, router = node_and_router()
    lease = router.acquire("GREEN")
    arm()
    lease.release()

def end(arm):
    segment, node, router = node_and_router()
    handle = node.begin()
    arm()
    handle.end()

def drain(arm):
    segment, node, router = node_and_router()
    arm()
    node.drain()

def publish(arm):
    segment, node, router = node_and_router()
    arm()
    node.publish(a=1)

def wait(arm):
    "Waits for capacity, is told of a release, and both sides may die of it."
    router = Router(name)
    held = [router.acquire("GREEN"), router.acquire("GREEN")]
    arm()
    threading.Timer(0.05, held[0].release).start()
    router.acquire("GREEN", timeout_s=10)

def create(arm):
    arm()
    Segment.open(name, slots=8, leases=8)

# The negative controls: deaths that leave something behind, since a protection is missing.

def ownerless_lease(arm):
    faultnative.take_ownerless(Segment.open(name).backend("own"))
    die()

def sweep_of_the_living(arm):
    faultnative.sweep_everything(Segment.open(name).backend("own"))
    die()

def unmarked_death(arm):
    segment, node, router = node_and_router()
    faultnative.claim_death_word(segment.backend("D"), 1)
    die()

def release_to_waiter(arm):
    router = Router(name)
    lease = router.acquire("GREEN")
    end = time.monotonic() + 20
    with open(f"/dev/shm/{name}", "rb", buffering=0) as file:
        while time.monotonic() < end:
            file.seek(256 + 12)  # sync.waiters
            if any(file.read(4)):
                break
            time.sleep(0.001)
    time.sleep(0.02)  # counted; now it goes to sleep
    arm()
    lease.release()

say(shmcoord.__file__)
while True:
    words = hear().split()
    if not words:
        break
    scenario, step, name = words
    def arm():
        os.environ["SHMCOORD_KILL_AT"] = step
    pid = forked(lambda: globals()[scenario](arm))
    say(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.fixture(scope="module")
def zygote(step_build, native_path):
    """`zygote(scenario, step, name)`: the exit code of a process that went through it."""
    executable = with_path(step_build, native_path)
    child = Child(ZYGOTE, "-", executable=executable)
    try:
        assert Path(child.hear()).parent.parent == step_build, "children run another build"

        def run(scenario, step, name):
            child.say(f"{scenario} {step} {name}")
            return int(child.hear(60))

        yield run
    finally:
        child.close()


class Bystander:
    """A node and a router that live through the death of another, and what they hold."""

    def __init__(self, name):
        self.name = name
        self.segment = Segment.open(name, slots=8, leases=8)
        self.node = self.segment.join(
            "own", group="GREEN", endpoint="e", capacity=4, interval_s=0.03
        )
        self.router = Router(self.segment)
        self.lease = self.router.acquire("GREEN")
        self.adopted = self.router.acquire("GREEN")
        self.request = self.node.adopt(self.adopted.token)
        self.kept = self.cells()
        assert len(self.kept) == 2

    def cells(self):
        """Where something is taken, and by whom: {(slot, index): value}."""
        raw = Raw(self.name)
        return {
            (slot, index): cell
            for slot in range(raw.slots)
            for index, cell in enumerate(raw.cells(slot))
            if cell
        }

    def close(self):
        self.router.close()
        self.segment.close()


def survives(bystander):
    """What must hold after the death of another process; an AssertionError if it does not."""
    segment, router, node = bystander.segment, bystander.router, bystander.node
    raw = Raw(bystander.name)

    # Nobody else's lease was touched, and the others go on at once: their whole capacity is there.
    cells = bystander.cells()
    assert {at: cells.get(at) for at in bystander.kept} == bystander.kept, "a lease was touched"
    try:
        leases = [router.acquire("GREEN") for _ in range(node.capacity - 2)]
    except Saturated as error:
        raise AssertionError(f"capacity is lost: {error}") from None
    with pytest.raises(Saturated):
        router.acquire("GREEN")
    for lease in leases:
        assert lease.release() is True
    with segment.join("E", group="GREY", endpoint="e"), router.acquire("GREY"):
        pass
    for group in ("BLUE", "RED"):  # the dead one's
        try:
            routed = router.acquire(group)
        except NoBackend:
            continue
        raise AssertionError(f"routed to a dead node: {routed.node}")

    # The next sweep completes, and finds nothing a second time.
    segment.reap()
    assert segment.reap() == 0
    assert bystander.cells() == bystander.kept, "leases leaked"
    assert [status.node for status in segment.snapshot()] == ["own"]
    assert bin(int.from_bytes(raw.read(384, 512), "little")).count("1") == 2, "slots leaked"
    assert raw.number("sync", "waiters", 4) == 0

    # Load words are right within two beats.
    slot = next(slot for slot, _ in bystander.kept)
    beats = raw.number("hot", "beats", 8, slot)
    wait_until(
        lambda: (
            segment.status("own").inflight == 2 or raw.number("hot", "beats", 8, slot) > beats + 2
        ),
        5,
    )
    assert segment.status("own").inflight == 2, "the load word is wrong after two beats"

    # All slots and their whole capacity are there again, and the names too.
    names = ["D", "V", "n1", "n2", "n3", "n4"]
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(segment.join(name, group=name, endpoint="e", interval_s=3600))
        with pytest.raises(SegmentFull):
            segment.join("n5", group="n5", endpoint="e")
        for name in names:
            leases = [router.acquire(name) for _ in range(8)]
            with pytest.raises(Saturated):
                router.acquire(name)
            del leases
    assert bystander.cells() == bystander.kept
    assert bystander.lease.release() is True
    bystander.request.end()
    assert raw.taken() == 0
    assert node.inflight == 0


def test_every_step_of_the_sources_is_killed_at():
    sources = Path(shmcoord.get_include())
    named = {
        name
        for path in itertools.chain(sources.glob("*.pyx"), sources.glob("*.pxd"))
        for name in re.findall(r'\bstep\(b"([\w.]+)"\)', path.read_text())
    }
    assert named == {step for _, step in CASES}


@pytest.fixture
def tally(report, request):
    """Counts kills, and those after which all was well; one line when the test is over."""
    done = {"kills": 0, "all given back and nothing else touched": 0}
    yield done
    report(f"SIGKILL at each step of {request.node.callspec.params['scenario']}", **done)


@pytest.mark.parametrize("scenario", [name for name in SCENARIOS if name != "create"])
def test_a_process_killed_at_each_step(new_name, zygote, count, tally, scenario):
    for _ in range(count(1, 20)):
        for step in SCENARIOS[scenario]:
            for _attempt in range(10):
                bystander = Bystander(new_name())
                try:
                    code = zygote(scenario, step, bystander.name)
                    if code == 0 and scenario == "acquire_when_full":
                        continue  # the node's own beat has swept first: once more
                    assert code == -9, f"{scenario} did not come to {step}: exit code {code}"
                    tally["kills"] += 1
                    survives(bystander)
                    tally["all given back and nothing else touched"] += 1
                    break
                except AssertionError as error:
                    raise AssertionError(f"killed at {step} of {scenario}: {error}") from error
                finally:
                    bystander.close()
                    Segment.unlink(bystander.name)
            else:
                raise AssertionError(f"{scenario} never came to {step}")


@pytest.mark.parametrize("step", SCENARIOS["create"])
def test_a_creator_killed_at_each_step(new_name, zygote, count, report, step):
    kills = count(2, 20)
    for _ in range(kills):
        name = new_name()
        assert zygote("create", step, name) == -9
        if step == "create.ready":
            Segment.attach(name).close()
            assert name in shmcoord.segments()
        else:
            with pytest.raises(SegmentNotFound):
                Segment.attach(name)
            assert name not in shmcoord.segments()
        bystander = Bystander(name)
        try:
            assert (bystander.segment.slots, bystander.segment.leases) == (8, 8)
            survives(bystander)
        finally:
            bystander.close()
            Segment.unlink(name)
    report(f"SIGKILL at step {step}", kills=kills, made_anew=kills)


CARELESS = """
path = f"/dev/shm/{name}"

def creator():
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.ftruncate(fd, 4096)
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    os.pwrite(fd, b"READY", 0)

os.waitpid(forked(creator), 0)
end = time.monotonic() + 1
while os.pread(os.open(path, os.O_RDONLY), 5, 0) != b"READY":
    if time.monotonic() > end:
        say("never ready")
        break
    time.sleep(0.05)
else:
    say("ready")
"""


def test_waiting_for_a_dead_creator_is_found(new_name, report):
    """The control: who creates without a lock that his death gives back leaves all waiting."""
    said = {how: run(CARELESS, new_name(), how).strip() for how in ("lives", "killed")}
    report("SIGKILL at step create, control without an init lock", **said)
    assert said == {"lives": "ready", "killed": "never ready"}


@pytest.mark.parametrize("step", ["free.cas", "free.word", "free.notify"])
def test_who_waits_is_served_when_the_releaser_dies(new_name, zygote, report, step):
    """A releaser that dies before it wakes anybody costs a waiter 0.25 s, not the whole wait."""
    bystander = Bystander(new_name())
    took = []

    def wait():
        wait_until(lambda: len(bystander.cells()) == 4, 20)
        began = time.monotonic()
        bystander.router.acquire("GREEN", timeout_s=20).release()
        took.append(time.monotonic() - began)

    # Two are its own, one is ours, and the dying process takes the fourth.
    third = bystander.router.acquire("GREEN")
    thread = threading.Thread(target=wait)
    try:
        thread.start()
        assert zygote("release_to_waiter", step, bystander.name) == -9
        thread.join(30)
        assert len(took) == 1
        assert took[0] < 5
        third.release()
        wait_until(lambda: Raw(bystander.name).number("sync", "waiters", 4) == 0, 5)
        survives(bystander)
    finally:
        thread.join(30)
        bystander.close()
    report(f"waiting while a releaser dies at {step}", served_after_s=round(took[0], 3))


@pytest.mark.parametrize("control", ["ownerless_lease", "sweep_of_the_living", "unmarked_death"])
def test_deaths_without_a_protection_are_found(new_name, zygote, report, control):
    bystander = Bystander(new_name())
    try:
        assert zygote(control, "-", bystander.name) == -9
        with pytest.raises(AssertionError) as found:
            survives(bystander)
    finally:
        bystander.close()
    report(f"SIGKILL at steps, control {control}", f"found: {str(found.value).splitlines()[0]}")
