"""Many threads on one node and one router, and signal handlers inside of everything."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

import pytest
from helpers import Raw, run, wait_until

from shmcoord import LeaseLost, Router, Saturated, Segment, State

THREADS = 8


class CarelessNode:
    """The node, but what it has served is counted as anybody would who forgets the threads."""

    def __init__(self, node):
        self._node = node
        self.served = 0
        self.begin, self.publish = node.begin, node.publish

    def __getattr__(self, name):
        return getattr(self._node, name)

    def end(self, handle, failed=False):
        before = self.served
        self._node.end(handle, failed=failed)
        self.served = before + 1

    def adopt(self, token):
        return CarelessRequest(self, self._node.adopt(token))


class CarelessRequest:
    def __init__(self, node, request):
        self._node, self._request = node, request

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._node.end(self._request)


def test_8_threads_on_one_node_and_one_router(name, count, report):
    times = count(1000, 40_000)
    counts = use_by_threads(name, times, lambda node: node)
    report("8 threads on one node and one router", rounds=THREADS * times, deadlocks=0, **counts)


def test_a_careless_count_under_threads_is_found(name, report):
    """The control: the same threads, and a count that reads, works and stores."""
    found = None
    for _ in range(20):
        try:
            use_by_threads(name, 1000, CarelessNode)
        except Miscounted as error:
            found = error
            break
    report("8 threads on one node and one router, control by a plain count", found)
    assert found is not None


class Miscounted(AssertionError):
    """What was served is not what was counted."""


def use_by_threads(name, times, wrapped):
    """8 threads adopt, release, begin, end, publish, pick and look; what they have counted."""
    counts = {"adopted": 0, "released": 0, "begun": 0, "saturated": 0, "looks": 0}
    failures, lock = [], threading.Lock()
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with (
            Segment.open(name, slots=16, leases=8) as segment,
            segment.join(
                "B", group="G", endpoint="e", capacity=2, interval_s=0.02, gauges=("a", "b")
            ) as own,
            Router(segment) as router,
        ):
            node = wrapped(own)

            def work(index):
                mine = dict.fromkeys(counts, 0)
                for number in range(times):
                    try:
                        lease = router.acquire("G", 2.0 if number % 7 == 0 else 0)
                    except Saturated:
                        mine["saturated"] += 1
                    else:
                        if number & 1:
                            with node.adopt(lease.token):
                                assert lease.release() is False
                            mine["adopted"] += 1
                        else:
                            assert lease.release() is True
                            try:
                                node.adopt(lease.token)
                            except LeaseLost:
                                mine["released"] += 1
                    node.end(node.begin(), failed=bool(index & 1))
                    mine["begun"] += 1
                    node.publish(a=index * times + number, b=index * times + number)
                    seen = segment.status("B")
                    assert seen.gauges["a"] == seen.gauges["b"]
                    assert router.pick("G").node == "B"
                    mine["looks"] += 1
                with lock:
                    for what, value in mine.items():
                        counts[what] += value

            start = threading.Barrier(THREADS)

            def guarded(index):
                try:
                    start.wait()
                    work(index)
                except BaseException as error:  # noqa: BLE001 - it is shown below
                    failures.append(repr(error))

            threads = [threading.Thread(target=guarded, args=(i,)) for i in range(THREADS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(3000)
            assert not any(thread.is_alive() for thread in threads), "a deadlock"
            assert failures == []
            assert Raw(name).taken() == 0
            expected = counts["adopted"] + counts["begun"]
            if node.served != expected:
                raise Miscounted(f"served {node.served} of {expected}")
            assert node.failed == counts["begun"] // 2
            assert node.refused == counts["released"]
            wait_until(lambda: segment.status("B").inflight == 0, 1)
            assert segment.status("B").state == State.IDLE
            wait_until(lambda: Raw(name).number("sync", "waiters", 4) == 0, 2)
    finally:
        sys.setswitchinterval(before)
    return counts


def move_load(native, node, times, *, atomically):
    """What 8 threads without the GIL leave in the load word, having added and taken off."""
    threads = [
        threading.Thread(target=native.move_load, args=(node, times, atomically))
        for _ in range(THREADS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Raw(node.segment.name).number("hot", "load", 8) & 0xFFFFFFFFFF


def test_the_load_word_under_threads_without_the_gil(segment, native, count, report):
    times = count(100_000, 20_000_000)
    with segment.join("B", group="G", endpoint="e", interval_s=3600) as node:
        for _ in range(1000):  # so that nothing is clamped at 0
            native.move_load(node, 1, True)
        left = move_load(native, node, times, atomically=True)
        report("load word under 8 threads", moves=2 * times * THREADS, left=left)
        assert left == 0
        for _ in range(50):
            wrong = move_load(native, node, 100_000, atomically=False)
            if wrong:
                break
        report("load word under 8 threads, control without CAS", left=wrong)
        assert wrong != 0


#: A timer's handler publishes, and works, in whatever the main thread is doing; values whose
#: conversion raises a signal make it come inside of `publish` itself.
HANDLER = """
wanted, together = int(sys.argv[2]), sys.argv[3] == "together"
segment = Segment.open(name, slots=4, leases=8)
node = segment.join("B", group="G", endpoint="e", capacity=4, interval_s=0.01, gauges=("a", "b"))
router = Router(segment)
router.acquire("G").release()
inside = [0]
counts = {"handled": 0, "inside_a_publish": 0, "published": 0, "mixed": 0}

def publish(value):
    if together:
        node.publish(a=value, b=value)
    else:  # the control: one gauge after the other
        node.publish(a=value)
        node.publish(b=value)

def look():
    seen = segment.status("B").gauges
    counts["mixed"] += seen["a"] != seen["b"]

def handle(number, frame):
    counts["handled"] += 1
    counts["inside_a_publish"] += inside[0]
    look()
    publish(-float(counts["handled"]))
    look()
    with contextlib.suppress(Saturated):
        with router.acquire("G") as lease, node.adopt(lease.token):
            node.waiting = counts["handled"] & 7
    node.begin().end()
    node.refresh()

class Value:
    "Converting it takes long enough for a signal, or raises one."
    def __init__(self, value):
        self.value = value
    def __float__(self):
        inside[0] = 1
        if self.value % 3 == 0:
            signal.raise_signal(signal.SIGUSR1)
        inside[0] = 0
        return float(self.value)

signal.signal(signal.SIGALRM, handle)
signal.signal(signal.SIGUSR1, handle)
signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
while counts["handled"] < wanted:
    counts["published"] += 1
    publish(Value(counts["published"]))
    with contextlib.suppress(Saturated):
        with router.acquire("G") as lease, node.adopt(lease.token):
            look()
    node.begin().end()
    node.refresh()
signal.setitimer(signal.ITIMER_REAL, 0)
time.sleep(0.05)
node.waiting = 0
status = segment.status("B")
say(json.dumps({**counts, "inflight": status.inflight, "cells": node.inflight}))
"""


def test_a_signal_handler_that_publishes_inside_a_publish(name, count, report):
    said = json.loads(run(HANDLER, name, count(2_000, 200_000), "together", timeout_s=900))
    report("signal handler inside a publish", **said)
    assert said["inside_a_publish"] > 0
    assert (said["mixed"], said["inflight"], said["cells"]) == (0, 0, 0)


def test_publishing_one_after_the_other_is_found(name, report):
    said = json.loads(run(HANDLER, name, 500, "apart"))
    report("signal handler inside a publish, control", **said)
    assert said["mixed"] > 0


JOINS = """
wanted, locked = int(sys.argv[2]), sys.argv[3:] == ["locked"]
segment = Segment.open(name, slots=8, leases=4)
counts = {"handled": 0, "joined": 0}
handling = False
#: The control: as if a lock of the process were held while the join runs.
lock = threading.Lock() if locked else contextlib.nullcontext()

def handle(number, frame):
    global handling
    if not handling:
        handling = True
        counts["handled"] += 1
        with lock:
            segment.join("H", group="G", endpoint="e", interval_s=3600).leave()
        with Router(segment) as router, router.acquire("G"):
            pass
        handling = False

stays = segment.join("S", group="G", endpoint="e", interval_s=3600)
signal.signal(signal.SIGALRM, handle)
signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)
while counts["handled"] < wanted:
    with lock:
        segment.join("B", group="G", endpoint="e", interval_s=3600).leave()
    counts["joined"] += 1
signal.setitimer(signal.ITIMER_REAL, 0)
say(json.dumps({**counts, "left": len(segment.snapshot())}))
"""


def test_a_signal_handler_that_joins_inside_a_join(name, count, report):
    """A lock that is held while Python code runs would be waited for by the handler, for ever."""
    said = json.loads(run(JOINS, name, count(500, 20_000), timeout_s=600))
    report("signal handler that joins inside a join", deadlocks=0, **said)
    assert said["left"] == 1


def test_a_lock_that_is_held_over_a_join_is_found(name, report):
    """The control: the handler waits for what only the code below it can give back."""
    with pytest.raises(subprocess.TimeoutExpired):
        run(JOINS, name, 500, "locked", timeout_s=2)
    report("signal handler that joins inside a join, control by a lock", "hangs")
