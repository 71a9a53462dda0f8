"""Forks with live handles, parents killed under their children, exec, and multiprocessing.

What protocol.md promises: the child's copies raise ForkedHandle and keep nothing of the parent's
alive, whatever becomes of either; exec is a death. The control forks past libc, so that the fork
handlers, which close the child's copies, do not run.
"""

from __future__ import annotations

import json

import pytest
from helpers import Raw, run

from shmcoord import Segment

FORKING = """
import ctypes, platform
rounds, how = int(sys.argv[2]), sys.argv[3]
libc = ctypes.PyDLL(None)  # with the GIL kept: the child would wait for it
#: clone(2), without the fork handlers of libc.
CLONE = {"x86_64": 56, "aarch64": 220}[platform.machine()]

def fork():
    if how == "fork":
        return os.fork()
    return libc.syscall(CLONE, signal.SIGCHLD, 0, 0, 0, 0)

def wait_for(predicate, timeout_s):
    end = time.monotonic() + timeout_s
    while not predicate():
        if time.monotonic() > end:
            return False
        time.sleep(0.0005)
    return True
"""

#: One process forks and forks; each child uses a copy and ends in one of many ways.
LIVE_HANDLES = (
    FORKING
    + """
segment = Segment.open(name, slots=8, leases=8)
observer = Segment.attach(name)
node = segment.join("B", group="G", endpoint="e", capacity=4, interval_s=0.02, gauges=("a",))
router = Router(segment)
lease, adopted = router.acquire("G"), router.acquire("G")
request, begun = node.adopt(adopted.token), node.begin()
backend = segment.backend("B")
USES = [
    segment.snapshot, segment.reap, observer.snapshot, lambda: segment.status("B"),
    lambda: segment.join("C", group="G", endpoint="e"), node.begin, node.drain, node.refresh,
    node.leave, lambda: node.publish(a=1), lambda: node.adopt(lease.token), begun.end, request.end,
    lease.release, lambda: router.pick("G"), lambda: router.acquire("G"), router.close,
    lambda: backend.queue, lambda: backend.alive, lambda: node.inflight,
]

def anew():
    "A child that opens the segment itself is a participant like any other."
    with Segment.open(name) as mine, mine.join("child", group="H", endpoint="e") as own:
        with Router(mine) as routing, routing.acquire("H") as taken, own.adopt(taken.token):
            return mine.status("B").inflight == 3

def end(kind):
    if kind == 0:
        os._exit(7)
    if kind == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == 2:
        os.execv("/bin/sh", ["sh", "-c", "exit 7"])
    gc.collect()
    sys.exit(7)  # with the handlers of atexit, and the collection of all copies

seen = {"forks": 0, "copies_used": 0, "worked": 0, "crashed": 0, "opened_anew": 0}
for number in range(rounds):
    picked = random.sample(USES, 4) if how == "fork" else [segment.snapshot, node.begin]
    out, into = os.pipe()
    pid = fork()
    if pid == 0:
        worked = 0
        for use in picked:
            try:
                use()
                worked += 1
            except ForkedHandle:
                pass
        opened = number % 4 == 0 and how == "fork" and anew()
        os.write(into, json.dumps([worked, bool(opened)]).encode())
        end(number % 4 if how == "fork" else 0)
    os.close(into)
    with open(out) as file:
        worked, opened = json.loads(file.read() or "[0, false]")
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    seen["crashed"] += status not in (7, -signal.SIGKILL)
    seen["forks"] += 1
    seen["copies_used"] += len(picked)
    seen["worked"] += worked
    seen["opened_anew"] += opened
    if how == "fork":
        assert backend.alive and segment.reap() == 0
        assert (node.inflight, segment.status("B").inflight) == (3, 3)
        with node.request(), Segment.open(name) as other:
            assert node.inflight == 4
            try:
                other.join("B", group="G", endpoint="e")
                raise AssertionError("the parent's name was taken")
            except NodeExists:
                pass
    elif worked or seen["crashed"]:
        break
if how == "fork":
    assert lease.release() is True and adopted.release() is False
    request.end()
    begun.end()
    assert node.inflight == 0 and [s.node for s in segment.snapshot()] == ["B"]
say(json.dumps(seen))
if how != "fork":
    os._exit(0)
node.leave()
"""
)


def test_forks_with_live_handles(name, count, report):
    said = json.loads(run(LIVE_HANDLES, name, count(80, 5000), "fork", timeout_s=1800))
    report("fork with live handles", **said, parent_harmed=0)
    assert said["worked"] == said["crashed"] == 0
    assert said["opened_anew"] == said["forks"] / 4
    assert Raw(name).taken() == 0


def test_a_clone_past_libc_is_found(name, report):
    """The control: without the fork handlers the child goes on to memory that it has not got."""
    said = json.loads(run(LIVE_HANDLES, name, 20, "clone"))
    report("fork with live handles, control by a raw clone", **said)
    assert said["worked"] + said["crashed"] > 0


#: A driver forks parents, each of which forks a child; parents are killed while the children use
#: their copies.
ORPHANS = (
    FORKING
    + """
segment = Segment.open(name, slots=8, leases=8)
target = segment.join("own", group="G", endpoint="e", interval_s=3600)

def parent(into):
    mine = Segment.open(name)
    node = mine.join("B", group="H", endpoint="e", interval_s=3600)
    router = Router(mine)
    held = [router.acquire("G"), router.acquire("G"), router.acquire("H"), node.begin()]
    adopted = node.adopt(held[2].token)
    child = fork()
    if child:
        os.write(into, str(child).encode() + b"\\n")
        time.sleep(60)
    if how != "fork":
        while True:  # its threads are not there; it only lives
            libc.pause()
    os.write(into, b"0\\n")
    while True:
        for use in (node.begin, mine.snapshot, held[0].release, lambda: router.acquire("G")):
            try:
                use()
                os.write(into, b"worked\\n")
            except ForkedHandle:
                pass

seen = {"parents_killed": 0, "slots_back": 0, "leases_back": 0, "copies_worked": 0}
slowest = 0.0
for number in range(rounds):
    out, into = os.pipe()
    pid = forked(lambda: parent(into))
    lines = open(out)
    child = int(lines.readline()) + (int(lines.readline()) if how == "fork" else 0)
    backend = segment.backend("B")
    assert backend.alive and segment.reap() == 0
    time.sleep(random.random() * 0.002)
    os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    os.waitpid(pid, 0)
    assert wait_for(lambda: not backend.alive, 2), "the dead parent lives"
    assert segment.status("B").health == Health.DEAD
    freed = []
    back = wait_for(
        lambda: freed.append(segment.reap()) or sum(freed) >= 6, 2 if how == "fork" else 0.5
    )
    slowest = max(slowest, time.monotonic() - began)
    assert os.path.exists(f"/proc/{child}"), "the child has ended before"
    os.kill(child, signal.SIGKILL)
    seen["parents_killed"] += 1
    if back:
        with segment.join("B", group="H", endpoint="heir") as heir, heir.request():
            seen["slots_back"] += sum(freed) - 4 == 2
        seen["leases_back"] += 4
    elif how == "fork":
        raise AssertionError(f"{sum(freed)} of 6 came back while the child lived")
    else:
        break
    os.close(into)
    seen["copies_worked"] += "worked" in lines.read()
    lines.close()
    assert target.inflight == 0
seen["given_back_after_ms"] = round(slowest * 1e3, 1)
say(json.dumps(seen))
target.leave()
"""
)


def test_parents_killed_while_their_children_use_their_copies(name, count, report):
    rounds = count(15, 1000)
    said = json.loads(run(ORPHANS, name, rounds, "fork", timeout_s=1800))
    report("parent killed while its child uses its copies", **said)
    assert said["slots_back"] == said["parents_killed"] == rounds
    assert said["leases_back"] == 4 * rounds
    assert said["copies_worked"] == 0
    assert Raw(name).taken() == 0


def test_a_child_that_keeps_the_descriptor_is_found(name, report):
    """The control: a raw clone keeps the owner lock, and with it the dead parent's slots."""
    said = json.loads(run(ORPHANS, name, 5, "clone"))
    report("parent killed while its child uses its copies, control by a raw clone", **said)
    assert said["slots_back"] < said["parents_killed"]


EXECS = (
    FORKING
    + """
segment = Segment.open(name, slots=8, leases=8)
target = segment.join("own", group="G", endpoint="e", interval_s=3600)

def work(into):
    mine = Segment.open(name)
    node = mine.join("B", group="H", endpoint="e", interval_s=3600)
    router = Router(mine)
    held = [router.acquire("G"), node.begin()]
    if how == "inherited":  # the control: the descriptor of the lock goes through exec
        for fd in map(int, os.listdir("/proc/self/fd")):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/self/fd/{fd}").endswith(name):
                    os.set_inheritable(fd, True)
    os.write(into, b"1")
    os.execv("/bin/sleep", ["sleep", "60"])

seen = {"execs": 0, "slots_and_leases_back": 0, "descriptors_kept": 0}
slowest = 0.0
for number in range(rounds):
    out, into = os.pipe()
    pid = forked(lambda: work(into))
    os.close(into)
    assert os.read(out, 1) == b"1"
    began = time.monotonic()
    freed = []
    back = wait_for(
        lambda: freed.append(segment.reap()) or sum(freed) >= 4, 2 if how == "fork" else 0.5
    )
    slowest = max(slowest, time.monotonic() - began)
    wait_for(lambda: os.readlink(f"/proc/{pid}/exe").endswith("sleep"), 2)
    kept = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):  # it still opens and closes libraries
            kept.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    seen["execs"] += 1
    seen["slots_and_leases_back"] += back
    seen["descriptors_kept"] += sum("/dev/shm" in path for path in kept)
    os.close(out)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    segment.reap()
seen["given_back_after_ms"] = round(slowest * 1e3, 1)
say(json.dumps(seen))
target.leave()
"""
)


def test_exec_is_a_death(name, count, report):
    """The process goes on as another program: what it held is given back while that runs."""
    rounds = count(20, 1000)
    said = json.loads(run(EXECS, name, rounds, "fork", timeout_s=1800))
    report("exec of a node with a router", **said)
    assert said["slots_and_leases_back"] == said["execs"] == rounds
    assert said["descriptors_kept"] == 0


def test_an_inherited_descriptor_is_found(name, report):
    said = json.loads(run(EXECS, name, 3, "inherited"))
    report("exec of a node with a router, control without O_CLOEXEC", **said)
    assert said["slots_and_leases_back"] == 0
    assert said["descriptors_kept"] > 0


PROCESSES = """
import multiprocessing, os, signal, sys
from shmcoord import Router, Segment

def serve(name, label, joined, leave):
    with Segment.open(name) as segment, segment.join(label, group="G", endpoint="e") as node:
        with Router(segment) as router, router.acquire("G"), node.request():
            joined.release()
            leave.acquire()

if __name__ == "__main__":
    method, name, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
    context = multiprocessing.get_context(method)
    segment = Segment.open(name, slots=8, leases=8)
    parent = segment.join("parent", group="P", endpoint="e")  # before the children are made
    kept = parent.begin()
    router = Router(segment)
    killed = ended = 0
    for number in range(rounds):
        joined, leave = context.Semaphore(0), context.Semaphore(0)
        children = [
            context.Process(target=serve, args=(name, f"{number}.{i}", joined, leave))
            for i in range(2)
        ]
        for child in children:
            child.start()
        for _ in children:
            assert joined.acquire(timeout=30)
        assert {s.node for s in segment.snapshot()} == {"parent", f"{number}.0", f"{number}.1"}
        os.kill(children[0].pid, signal.SIGKILL)
        children[0].join()
        assert not segment.backend(f"{number}.0").alive
        assert {router.pick("G").node for _ in range(20)} == {f"{number}.1"}
        leave.release()
        leave.release()
        children[1].join(30)
        assert children[1].exitcode == 0
        segment.reap()
        assert [s.node for s in segment.snapshot()] == ["parent"]
        assert parent.inflight == 1 and segment.backend("parent").alive
        killed, ended = killed + 1, ended + 1
    kept.end()
    parent.leave()
    print(killed, ended)
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_children_of_multiprocessing(name, tmp_path, method, count, report):
    """One of two is killed each time, the other ends regularly; the parent keeps what it has."""
    script = tmp_path / "main.py"
    script.write_text(PROCESSES)
    code = "import subprocess; subprocess.run([sys.executable, *sys.argv[2:]], check=True)"
    said = run(code, name, script, method, name, count(2, 100), timeout_s=1800)
    killed, ended = map(int, said.split())
    report(
        f"multiprocessing, {method}",
        killed=killed,
        ended_regularly=ended,
        leaked=0,
        parent_harmed=0,
    )
    with Segment.open(name) as segment:
        assert segment.snapshot() == ()
    assert Raw(name).taken() == 0
