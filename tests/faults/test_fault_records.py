"""The status record: no torn read, whatever the writer's pace, and none lost with its writer."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
from fault_helpers import stopped_node_is_kept
from helpers import wait_until

from shmcoord import Health, Segment

WRITER = """
import faultnative
node = Segment.open(name).join("B", group="GREEN", endpoint="e", interval_s=3600)
kind, seconds, burst, pause_us = int(sys.argv[2]), *map(float, sys.argv[3:])
faultnative.write(node, kind, 0, 1, 0)
say("writes")
threading.Thread(target=lambda: (hear(), os._exit(0)), daemon=True).start()
# Readers tell when it is enough; the GIL is given back between two rounds.
while True:
    faultnative.write(node, kind, 0.05, int(burst), int(pause_us))
"""

READER = """
import faultnative
kind, reads, seconds = int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
backend = Segment.attach(name).backend("B")
say("ready")
hear()
say(json.dumps(faultnative.read(backend, kind, reads, seconds)))
"""

#: Records written at a time, the pause behind them in microseconds, share of all reads.
PACES = {
    "idle": (1, 1000, 0.2),
    "in bursts": (200, 50, 0.3),
    "flat out": (1000, 0, 0.5),
}
READERS = 2


def hunt(new_name, spawn, kind, pace, reads, seconds):
    """One writer at a pace and several readers, each a process; the sums of what they saw."""
    name = new_name()
    burst, pause_us, _ = PACES[pace]
    with Segment.open(name, slots=4, leases=2):
        writer = spawn(WRITER, name, kind, 0, burst, pause_us)
        assert writer.hear() == "writes"
        readers = [spawn(READER, name, kind, reads // READERS + 1, seconds) for _ in range(READERS)]
        for reader in readers:
            reader.hear()
        for reader in readers:
            reader.say()
        sums = {}
        for reader in readers:
            for what, value in json.loads(reader.hear(seconds + 20)).items():
                joined = max(sums.get(what, 0), value) if what == "in_a_row" else 0
                sums[what] = joined or sums.get(what, 0) + value
        writer.kill()
    return sums


@pytest.mark.parametrize("pace", PACES)
def test_torn_reads(new_name, spawn_native, native, count, report, pace):
    wanted = int(count(20_000_000, 1_000_000_000) * PACES[pace][2])
    seen = hunt(new_name, spawn_native, native.LATCH, pace, wanted, count(60, 3000))
    report(f"torn reads, writer {pace}", readers=READERS, **seen)
    assert seen["reads"] >= wanted
    assert seen["torn"] == seen["backwards"] == 0
    assert seen["commits"] > 10, "the writer did not write meanwhile"
    assert seen["refused"] < 0.05 * seen["reads"], "reads rarely succeed within their tries"


@pytest.mark.parametrize(
    "variant", ["NO_RECHECK", "ONE_COPY"], ids=["no second look", "one copy, no sequence"]
)
def test_torn_reads_are_found_without_the_protection(
    new_name, spawn_native, native, report, variant
):
    for _ in range(20):  # a busy machine may not run writer and readers at the same time
        seen = hunt(new_name, spawn_native, getattr(native, variant), "flat out", 3_000_000, 30)
        if seen["torn"]:
            break
    report(f"torn reads, control {variant}", **seen)
    assert seen["torn"] > 0


KILLED = """
import psutil  # once, not in each child
import faultnative
kind, kills = int(sys.argv[2]), int(sys.argv[3])
segment = Segment.open(name, slots=4, leases=2)

def write():
    node = Segment.open(name).join("B", group="GREEN", endpoint="e", interval_s=3600)
    faultnative.write(node, kind, 0, 1, 0)
    os.write(ready, b"r")
    while True:
        faultnative.write(node, kind, 1.0, 1000, 0)

seen = {"kills": 0, "inside": 0, "whole": 0, "torn": 0, "unreadable": 0, "last_commit": 0}
listen, ready = os.pipe()
while seen["kills"] < kills:
    pid = forked(write)
    os.read(listen, 1)
    backend = segment.backend("B")
    end = time.perf_counter() + random.random() * 200e-6
    while time.perf_counter() < end:
        pass
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    outcome, number, inside = faultnative.look(backend, kind)
    seen["kills"] += 1
    seen["inside"] += inside
    seen[outcome] += 1
    seen["last_commit"] += outcome == "whole" and number == faultnative.seq(backend)
    assert segment.reap() == 1
say(json.dumps(seen))
"""


def kill_writers(name, spawn, kind, kills):
    child = spawn(KILLED, name, kind, kills)
    return json.loads(child.hear(20 + kills * 0.2))


def test_writers_killed_inside_a_write(name, spawn_native, native, count, report):
    kills = count(200, 10_000)
    seen = kill_writers(name, spawn_native, native.LATCH, kills)
    report("SIGKILL inside a record write", **seen)
    assert seen["whole"] == seen["last_commit"] == seen["kills"] == kills
    assert seen["torn"] == seen["unreadable"] == 0
    assert seen["inside"] > kills / 10, "hardly any kill met a write"


def test_writers_killed_leave_an_odd_even_record_unreadable(name, spawn_native, native, report):
    seen = kill_writers(name, spawn_native, native.ODD_EVEN, 60)
    report("SIGKILL inside a record write, control ODD_EVEN", **seen)
    assert seen["unreadable"] > 0


STEP = """
node = Segment.open(name).join("B", group="GREEN", endpoint="e", interval_s=3600, gauges=("a", "b"))
for number in range(1, 1 + int(sys.argv[3])):
    node.publish(a=number, b=number)
os.environ[sys.argv[4]] = sys.argv[2]
say("armed")
node.publish(a=-1.0, b=-1.0)
say("behind")
hear()
"""


@pytest.mark.parametrize("step", ["write.begin", "write.word", "write.commit"])
def test_a_writer_killed_at_each_step(new_name, spawn_step, count, report, step):
    """Behind each step, with both copies as the current one; who comes next goes on."""
    kills = count(2, 40)
    for published in range(kills):
        name = new_name()
        with Segment.open(name, slots=2, leases=2) as segment:
            child = spawn_step(STEP, name, step, published + 1, "SHMCOORD_KILL_AT")
            assert child.hear() == "armed"
            assert child.process.wait(20) == -9
            status = segment.status("B")
            last = -1.0 if step == "write.commit" else float(published + 1)
            assert status.gauges == {"a": last, "b": last}
            assert status.health == Health.DEAD
            with segment.join("B", group="GREEN", endpoint="e", gauges=("a", "b")) as node:
                node.publish(a=7, b=7)
                assert segment.status("B").gauges == {"a": 7.0, "b": 7.0}
            child.close()
    report(f"SIGKILL at step {step}", kills=kills, last_commit=kills)


@pytest.mark.parametrize("step", ["write.begin", "write.word", "write.commit"])
def test_a_writer_stopped_inside_a_write(new_name, spawn_step, spawn_node, count, report, step):
    """SUSPECT, not routed to, slot kept; healthy when it goes on, and its write is whole."""
    stops, took = count(1, 40), 0.0
    for _ in range(stops):
        name = new_name()
        with Segment.open(name, slots=3, leases=4) as segment:
            # Many beats at first, so that it becomes SUSPECT soon.
            code = STEP.replace("interval_s=3600", "interval_s=0.05")
            child = spawn_step(code, name, step, 1, "SHMCOORD_STOP_AT")
            assert child.hear() == "armed"
            wait_until(functools.partial(has_health, segment, Health.SUSPECT), 10)
            last = -1.0 if step == "write.commit" else 1.0
            stopped_node_is_kept(segment, spawn_node)
            for _ in range(1000):
                assert segment.status("B").gauges == {"a": last, "b": last}
            child.go_on()
            assert child.hear() == "behind"
            back = functools.partial(has_health, segment, Health.ALIVE)
            took = max(took, wait_until(back, 5))
            assert segment.status("B").gauges == {"a": -1.0, "b": -1.0}
            child.close()
    report(f"SIGSTOP at step {step}", stops=stops, slots_kept=stops, healthy_again_s=f"{took:.3f}")


def has_health(segment, health):
    return segment.status("B").health == health


def test_a_takeover_on_a_late_heartbeat_is_found_torn(name, spawn_step, native, report):
    """The control: what a stopped writer does to one who took its slot for a late heartbeat."""
    with Segment.open(name, slots=2, leases=2) as segment:
        child = spawn_step(STEP, name, "write.word", 1, "SHMCOORD_STOP_AT")
        assert child.hear() == "armed"
        backend = segment.backend("B")
        wait_until(lambda: "(stopped)" in Path(f"/proc/{child.pid}/status").read_text())
        native.usurp(backend)
        outcome, number, _ = native.look(backend, native.LATCH)
        assert (outcome, number) == ("whole", native.seq(backend))
        child.go_on()
        assert child.hear() == "behind"
        outcome, _, _ = native.look(backend, native.LATCH)
        report("SIGSTOP inside a write, control takeover", outcome)
        assert outcome == "torn"
