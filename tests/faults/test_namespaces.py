"""Liveness across pid and time namespaces, reused pids, and wall clocks that jump."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers import Raw, run, wait_until

from shmcoord import Segment

INTERVAL_S = 0.05
HOST: tuple[str, ...] = ()
PID = ("--pid", "--mount-proc")
AHEAD = ("--time", "--monotonic", "100000", "--boottime", "100000")

#: A node that answers what it sees of the others. Arguments: segment, its name.
PEER = """
segment = Segment.open(name)
node = segment.join(sys.argv[2], group="GREEN", endpoint="e", interval_s=0.05)
router = Router(segment)
held = [node.begin() for _ in range(3)]
say(os.getpid())
while command := hear():
    what, _, other = command.partition(" ")
    if what == "see":
        status = segment.status(other)
        picked = {router.pick("GREEN").node for _ in range(50)}
        reasons = {c.node: c.passed_over for c in router.explain("GREEN").candidates}
        say(json.dumps([status.health.name, status.heartbeat_age_s, status.uptime_s,
                        other in picked, reasons[other], os.path.exists(f"/proc/{status.pid}")]))
    elif what == "gone":
        say(json.dumps([other not in {s.node for s in segment.snapshot()}]))
    elif what == "reap":
        say(json.dumps([segment.reap()]))
    elif what == "clock":
        say(json.dumps([os.stat("/proc/self/ns/time").st_ino]))
    elif what == "load":  # more than the others have, so that those are picked
        node.waiting = int(other)
        say("[]")
"""


def unshare(*flags: str) -> tuple[str, ...]:
    """The words before a command that run it in namespaces of its own."""
    if not flags:
        return ()
    user = () if os.geteuid() == 0 else ("--user", "--map-root-user")
    words = ("unshare", *user, *flags, "--fork", "--kill-child=SIGKILL")
    if shutil.which("unshare") is None:
        pytest.skip("no unshare(1)")
    done = subprocess.run([*words, "true"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no namespaces here: {done.stderr.strip()}")
    return words


class Peer:
    """One process of the pair, perhaps in namespaces of its own."""

    def __init__(self, spawn, segment: str, node: str, flags: tuple[str, ...]) -> None:
        self.node = node
        self.child = spawn(PEER, segment, node, executable=unshare(*flags))
        self.pid = int(self.child.hear())  # as it sees itself
        self.outer = self.child.pid
        if flags:
            children = Path(f"/proc/{self.outer}/task/{self.outer}/children").read_text()
            self.outer = int(children)

    def ask(self, what: str):
        self.child.say(what)
        return json.loads(self.child.hear())

    def sees(self, other: Peer) -> dict[str, object]:
        words = ("health", "age_s", "uptime_s", "picked", "passed_over", "pid_exists")
        return dict(zip(words, self.ask(f"see {other.node}"), strict=True))

    def kill(self) -> None:
        os.kill(self.outer, signal.SIGKILL)
        self.child.process.wait(10)


PAIRS = {
    "both pid 1": (PID, PID),
    "pid 1 and host": (PID, HOST),
    "clock +100,000 s and host": (AHEAD, HOST),
    "clock +100,000 s and pid 1": (AHEAD, PID),
    "both with their own pid and clock": ((*PID, *AHEAD), (*PID, *AHEAD)),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_liveness_across_namespaces(name, spawn, pair, count, report):
    rounds = count(1, 12)
    kills = 0
    slowest = 0.0
    fooled = 0
    with Segment.open(name, slots=8, leases=8):
        for round_ in range(rounds):
            for first, second in (PAIRS[pair], PAIRS[pair][::-1]):
                a = Peer(spawn, name, f"a{round_}", first)
                b = Peer(spawn, name, f"b{round_}", second)
                if "--pid" in first and "--pid" in second:
                    assert (a.pid, b.pid) == (1, 1)
                time.sleep(4 * INTERVAL_S)  # more than the three intervals after which one is late
                for me, other in ((a, b), (b, a)):
                    me.ask("load 50")
                    seen = me.sees(other)
                    me.ask("load 0")
                    assert seen["health"] == "ALIVE", seen
                    assert seen["picked"], seen
                    assert seen["age_s"] < 1, seen
                    assert 0 < seen["uptime_s"] < 60, seen
                    assert me.ask("reap") == [0], "the living keep what they have"
                # Stopped: suspect, and healthy again.
                os.kill(a.outer, signal.SIGSTOP)
                wait_until(lambda a=a, b=b: b.sees(a)["health"] == "SUSPECT", 3)
                os.kill(a.outer, signal.SIGCONT)
                wait_until(lambda a=a, b=b: b.sees(a)["health"] == "ALIVE", 3)
                # Killed: dead at once, and given back.
                began = time.monotonic()
                a.kill()
                wait_until(lambda a=a, b=b: b.sees(a)["health"] == "DEAD", 3)
                slowest = max(slowest, time.monotonic() - began)
                seen = b.sees(a)
                assert not seen["picked"]
                fooled += bool(seen["pid_exists"])
                freed: list[int] = []
                # Three leases, the node's slot; its router never reserved, so it has none.
                wait_until(lambda b=b, freed=freed: freed.extend(b.ask("reap")) or sum(freed) >= 4)
                assert b.ask(f"gone {a.node}") == [True]
                assert b.sees(b)["health"] == "ALIVE"
                b.kill()
                with Segment.open(name) as segment:
                    wait_until(lambda segment=segment: segment.reap() or not segment.snapshot())
                kills += 2
    if pair == "both pid 1":
        assert fooled == 2 * rounds, "the control: whoever judges by pid holds the dead for living"
    report(
        f"namespaces: {pair}",
        kills=kills,
        dead_seen_within_ms=f"{slowest * 1e3:.0f}",
        wrong_judgements=0,
        control_judged_by_pid_wrong=fooled,
    )
    assert Raw(name).taken() == 0


def test_a_stamp_of_another_clock_would_mislead(name, spawn, report):
    """The control: where the time namespace is not told apart, the living look late."""
    here = Peer(spawn, name, "here", HOST)  # the first to join: slot 0
    ahead = Peer(spawn, name, "ahead", AHEAD)
    Raw(name).set("meta", "time_ns_id", 8, ahead.ask("clock")[0], slot=0)
    seen = ahead.sees(here)
    assert seen["health"] == "SUSPECT"
    assert seen["age_s"] > 90_000
    report("time namespace, control without telling clocks apart", "the living look late")


# --- pids that come again


def test_a_reused_pid_is_nobody_known(name, count, report):
    """A process with the pid, and a beat thread with the tid, of a dead node: still dead."""
    rounds = count(3, 500)
    said = run(
        """
def node(label):
    segment = Segment.open(name)
    node = segment.join(label, group="GREEN", endpoint="e", interval_s=0.05)
    handles = [node.begin() for _ in range(2)]
    os.write(ready_in, b"x")
    time.sleep(600)

def tid(slot):
    with open(f"/dev/shm/{name}", "rb") as file:
        file.seek(4096 + 128 * slot + 40)
        return int.from_bytes(file.read(4), "little") & 0x3FFFFFFF

def slot_of(label):
    return [s.node for s in segment.snapshot()].index(label)

rounds = int(sys.argv[2])
segment = Segment.open(name, slots=8, leases=4)
same_pid = same_tid = fooled = 0
for round in range(rounds):
    ready_out, ready_in = os.pipe()
    pid = forked(lambda: node("first"))
    os.read(ready_out, 1)
    first = segment.backend("first")
    beat = tid(slot_of("first"))
    assert first.alive
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    for _ in range(50):
        with open("/proc/sys/kernel/ns_last_pid", "w") as file:
            file.write(str(pid - 1))
        heir = forked(lambda: node("second"))
        os.read(ready_out, 1)
        if heir == pid and tid(slot_of("second")) == beat:
            break
        os.kill(heir, signal.SIGKILL)
        os.waitpid(heir, 0)
        wait = segment.reap()
        if "first" not in [s.node for s in segment.snapshot()]:
            break
    same_pid += heir == pid
    same_tid += tid(slot_of("second")) == beat
    fooled += os.path.exists(f"/proc/{pid}")
    assert not first.alive
    assert segment.status("first").health == Health.DEAD
    second = segment.backend("second")
    assert second.alive
    assert segment.reap() == 3, "a slot and two leases of the dead"
    assert second.alive and second.queue == 2, "the heir of the pid keeps its own"
    os.kill(heir, signal.SIGKILL)
    os.waitpid(heir, 0)
    assert not second.alive
    assert segment.reap() == 3
    os.close(ready_in)
    os.close(ready_out)
say(same_pid, same_tid, fooled)
""",
        name,
        rounds,
        executable=unshare(*PID),
        timeout_s=600,
    )
    same_pid, same_tid, fooled = map(int, said.split())
    assert same_pid == rounds, "the kernel gave other pids"
    assert same_tid > rounds // 2
    assert fooled == rounds, "the control: by its pid, the dead node lives"
    report(
        "pid reuse",
        rounds=rounds,
        same_pid=same_pid,
        same_tid_of_the_beat_thread=same_tid,
        wrong_judgements=0,
        control_judged_by_pid_wrong=fooled,
    )


# --- clocks that jump

SHIM = r"""
#define _GNU_SOURCE
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
volatile long wall_shift_s, mono_shift_s;
int clock_gettime(clockid_t clock, struct timespec *t) {
    int result = syscall(SYS_clock_gettime, clock, t);
    if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)
        t->tv_sec += wall_shift_s;
    if (clock == CLOCK_MONOTONIC || clock == CLOCK_MONOTONIC_COARSE)
        t->tv_sec += mono_shift_s;
    return result;
}
int gettimeofday(struct timeval *t, void *zone) {
    struct timespec now;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    t->tv_sec = now.tv_sec;
    t->tv_usec = now.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out)
        *out = now.tv_sec;
    return now.tv_sec;
}
"""

JUMPER = """
import ctypes
wall = ctypes.c_long.in_dll(ctypes.CDLL(None), "wall_shift_s")
mono = ctypes.c_long.in_dll(ctypes.CDLL(None), "mono_shift_s")
segment = Segment.open(name)
node = segment.join("jumper", group="GREEN", endpoint="e", interval_s=0.02, capacity=1)
router = Router(segment)
true = time.time()
say("joined")
while command := hear():
    what, _, shift = command.partition(" ")
    if what == "wall":
        wall.value = int(shift)
        assert abs(time.time() - true - wall.value) < 600
        say("moved")
    elif what == "mono":
        mono.value = int(shift)
        health = segment.status("other").health.name
        mono.value = 0
        say(health)
    else:
        for _ in range(50):  # a busy machine may be late for a beat; a wrong clock stays wrong
            statuses = {s.node: s for s in segment.snapshot()}
            if all(status.health == Health.ALIVE for status in statuses.values()):
                break
            time.sleep(0.02)
        for status in statuses.values():
            assert status.health == Health.ALIVE, (status, wall.value)
            assert status.heartbeat_age_s < 1 and 0 <= status.uptime_s < 600, status
        assert set(statuses) == {"jumper", "other"}
        with router.acquire("GREEN"), router.acquire("GREEN"):
            began = time.monotonic()
            try:
                router.acquire("GREEN", timeout_s=0.02)
            except Saturated:
                assert 0.015 < time.monotonic() - began < 1
        assert segment.reap() == 0
        say("right")
"""


@pytest.fixture
def shim(tmp_path) -> tuple[str, ...]:
    """The words before a command whose clocks can be moved."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    (tmp_path / "clocks.c").write_text(SHIM)
    library = tmp_path / "clocks.so"
    subprocess.run(
        [compiler, "-O2", "-shared", "-fPIC", "-o", library, tmp_path / "clocks.c"], check=True
    )
    before = os.environ.get("LD_PRELOAD", "")
    return ("env", f"LD_PRELOAD={before} {library}".replace("= ", "="))


def test_wall_clocks_that_jump(name, spawn, shim, count, report):
    """Set back and forth under a node and a router: times are for people, nothing hangs on them."""
    jumps = count(20, 1000)
    years = 365 * 86400
    with Segment.open(name, slots=8, leases=8) as segment:
        other = segment.join("other", group="GREEN", endpoint="e", interval_s=0.02, capacity=1)
        child = spawn(JUMPER, name, executable=shim)
        assert child.hear() == "joined"
        for jump in range(jumps):
            child.say(f"wall {(-10 * years, 3600, -3600, 10 * years, -1, 0)[jump % 6]}")
            assert child.hear() == "moved"
            if jump % 4 == 0:
                time.sleep(0.07)  # more than three intervals under the new time
            child.say("look")
            assert child.hear() == "right"
            wait_until(functools.partial(is_alive, segment, "jumper"), 1)
            assert segment.status("jumper").heartbeat_age_s < 1
        # The control: were the judgement made by the clock that jumps, it would be seen here.
        child.say("mono 100")
        assert child.hear() == "SUSPECT"
        began = time.monotonic()
        child.kill()
        wait_until(functools.partial(dead, segment, "jumper"), 3)
        delay = time.monotonic() - began
        other.leave()
    report(
        "wall clock set back and forth",
        jumps=jumps,
        wrong_judgements=0,
        dead_seen_within_ms=f"{delay * 1e3:.0f}",
        control_by_the_clock_of_judgement="seen",
    )


def is_alive(segment, node):
    return segment.status(node).health.name == "ALIVE"


def dead(segment, node):
    return segment.status(node).health.name == "DEAD"


def test_no_decision_reads_the_wall_clock(report):
    """By reading the sources: the wall clock is stored for people, and compared with nothing."""
    import shmcoord

    package = Path(shmcoord.get_include())
    uses = [
        (path.name, line.strip())
        for path in sorted(package.glob("*.py*"))
        if path.suffix in (".py", ".pyx", ".pxd")
        for line in path.read_text().splitlines()
        if re.search(r"wall_ns\(\)|time\.time\(\)|CLOCK_REALTIME\)", line)
        and not line.lstrip().startswith(("cdef inline", "#"))
    ]
    stores = [use for use in uses if re.match(r"[\w.\[\]]+ = wall_ns\(\)|words\[", use[1])]
    clock = [use for use in uses if use[0] == "_posix.pxd"]
    assert len(uses) == len(stores) + len(clock), set(uses) - set(stores) - set(clock)
    report("wall clock in the sources", stored=len(stores), compared=0)
