"""The Python side of the heartbeat: metrics once per interval, whatever goes wrong."""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref

import psutil
import pytest
from helpers import run, wait_until

from shmcoord import Health, update


class Fake:
    """What the update thread needs of a node."""

    def __init__(self, name="fake", interval_s=0.02, error=None):
        self.name = name
        self.interval_s = interval_s
        self.error = error
        self.left = False
        self.refreshed = []

    def refresh(self):
        self.refreshed.append(time.monotonic())
        if self.error is not None:
            raise type(self.error)(*self.error.args)


@pytest.fixture
def updates():
    """An update thread of the test's own; its nodes go with the test."""
    return update._UpdateThread()


def test_each_node_at_its_own_interval(updates):
    fast, slow = Fake("fast", 0.02), Fake("slow", 0.1)
    updates.add(slow)
    updates.add(fast)  # earlier due than what the thread waits for
    time.sleep(0.55)
    assert 15 <= len(fast.refreshed) <= 28
    assert 3 <= len(slow.refreshed) <= 6


def test_a_node_is_not_kept_alive(updates):
    node = Fake()
    seen = weakref.ref(node)
    updates.add(node)
    wait_until(lambda: seen().refreshed, 2)
    del node
    gc.collect()
    wait_until(lambda: seen() is None, 2)


def test_a_node_that_left_is_forgotten(updates):
    leaving, staying = Fake("leaving", error=ValueError("has left")), Fake("staying")
    updates.add(leaving)
    updates.add(staying)
    wait_until(lambda: leaving.refreshed, 2)
    leaving.left = True
    time.sleep(0.05)
    before = len(leaving.refreshed)
    time.sleep(0.1)
    assert len(leaving.refreshed) == before
    assert len(staying.refreshed) > 3


def test_one_bad_sample_ends_no_heartbeat(updates, caplog):
    bad, good = Fake("bad", error=OSError("no /proc")), Fake("good")
    with caplog.at_level(logging.ERROR, "shmcoord.update"):
        updates.add(bad)
        updates.add(good)
        wait_until(lambda: len(bad.refreshed) > 3 and len(good.refreshed) > 3, 2)
    assert "node bad" in caplog.text
    assert "no /proc" in caplog.text


@pytest.mark.parametrize("error", [OSError, ValueError, RuntimeError, KeyError])
def test_a_bad_sample_costs_one_beat(segment, monkeypatch, caplog, error):
    """Whatever the sampler raises, the node is there again as soon as it works again."""
    with segment.join("B", group="GREEN", endpoint="e", interval_s=0.02):
        really, raised = update.sample, []

        def sample():
            if len(raised) < 3:
                raised.append(error("of the sampler"))
                raise raised[-1]
            return really()

        monkeypatch.setattr(update, "sample", sample)
        wait_until(lambda: len(raised) == 3, 2)
        time.sleep(0.15)
        assert segment.status("B").health == Health.ALIVE


def test_a_node_that_left_is_not_sampled_for_any_more(segment, monkeypatch):
    calls = []
    really = update.sample
    monkeypatch.setattr(update, "sample", lambda: (calls.append(1), really())[1])
    node = segment.join("B", group="GREEN", endpoint="e", interval_s=0.01)
    wait_until(lambda: len(calls) > 3, 2)
    node.leave()
    time.sleep(0.05)
    before = len(calls)
    time.sleep(0.1)
    assert len(calls) == before


def test_samples_are_shared_for_a_moment(monkeypatch):
    calls = []
    really = psutil.Process.cpu_percent

    def cpu_percent(process):
        calls.append(1)
        return really(process)

    monkeypatch.setattr(psutil.Process, "cpu_percent", cpu_percent)
    sampler = update._Sampler()
    calls.clear()
    first = [sampler.sample() for _ in range(50)]
    assert len(calls) == 1
    assert len(set(first)) == 1
    assert first[0][0] > 1_000_000
    time.sleep(0.06)
    sampler.sample()
    assert len(calls) == 2


def test_sampling_from_many_threads():
    sampler = update._Sampler()
    failures = []

    def work():
        try:
            for _ in range(50):
                memory_bytes, cpu_percent = sampler.sample()
                assert memory_bytes > 0
                assert cpu_percent >= 0
                time.sleep(0.001)
        except Exception as error:  # noqa: BLE001 - told below
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_the_start_is_logged_once_and_the_thread_holds_up_nobody(name):
    said = run(
        """
import logging
logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(name)s %(message)s")
segment = Segment.open(name)
nodes = [segment.join(f"n{i}", group="GREEN", endpoint="e") for i in range(3)]
threads = [thread for thread in threading.enumerate() if thread.name == "shmcoord-update"]
assert len(threads) == 1 and threads[0].daemon
""",
        name,
    )
    assert said.count("update thread started") == 1
    assert said.count("joined segment") == 3


def test_signals_are_for_the_application(name):
    """The native thread takes none: Python's main thread is interrupted in its sleep."""
    said = run(
        """
segment = Segment.open(name)
node = segment.join("B", group="GREEN", endpoint="e", interval_s=0.005)
main = threading.get_native_id()
threading.Timer(0.05, os.kill, [os.getpid(), signal.SIGUSR1]).start()
seen = []
signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
began = time.monotonic()
signal.sigtimedwait([], 0.0)
while not seen and time.monotonic() - began < 2:
    time.sleep(0.5)
masks = {}
for task in os.listdir("/proc/self/task"):
    with open(f"/proc/self/task/{task}/status") as file:
        mask = next(line.split()[1] for line in file if line.startswith("SigBlk"))
    masks[int(task)] = int(mask, 16)
blocked = [task for task, mask in masks.items() if mask >> (signal.SIGUSR1 - 1) & 1]
say(len(seen), len(blocked), main in blocked)
""",
        name,
    )
    assert said.split() == ["1", "1", "False"]
