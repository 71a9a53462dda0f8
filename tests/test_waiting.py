"""Waiting for capacity: first come first served, woken by a release, never by polling."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import Raw, run, wait_until

from shmcoord import NoBackend, Router, Saturated
from shmcoord.waiters import Waits
from shmcoord.waiting import LOST_WAKEUP_S, WaitQueue


@pytest.fixture
def node(segment):
    """Of capacity 1; its beat helps nobody (an hour)."""
    with segment.join("B", group="GREEN", endpoint="e", capacity=1, interval_s=3600) as node:
        yield node


@pytest.fixture
def router(segment):
    with Router(segment) as router:
        yield router


def waiters(name):
    """Routers that the segment's memory says to wake."""
    return Raw(name).number("sync", "waiters", 4)


def settled(name):
    wait_until(lambda: waiters(name) == 0, 3)
    assert Raw(name).taken() == 0


# --- time-outs


@pytest.mark.parametrize("timeout_s", [0.0, 0.001, 0.05, 0.3])
def test_the_time_out_is_kept(name, node, router, timeout_s):
    took = []
    with router.acquire("GREEN"):
        for _ in range(5):  # a busy machine may be late, but not each time
            began = time.monotonic()
            with pytest.raises(Saturated):
                router.acquire("GREEN", timeout_s=timeout_s)
            took.append(time.monotonic() - began)
    assert timeout_s <= min(took) < timeout_s + 0.1
    settled(name)


@pytest.mark.parametrize("timeout_s", [0.0, 0.001, 0.05, 0.3])
async def test_the_time_out_is_kept_on_a_loop(name, node, router, timeout_s):
    took = []
    with router.acquire("GREEN"):
        for _ in range(5):  # a busy machine may be late, but not each time
            began = time.monotonic()
            with pytest.raises(Saturated):
                await router.acquire_async("GREEN", timeout_s=timeout_s)
            took.append(time.monotonic() - began)
    assert timeout_s <= min(took) < timeout_s + 0.1
    settled(name)


def test_for_ever_may_be_waited(name, node, router):
    lease = router.acquire("GREEN")
    threading.Timer(0.03, lease.release).start()
    router.acquire("GREEN", timeout_s=float("inf")).release()
    settled(name)


def test_a_short_wait_ends_before_a_long_one_ahead_of_it(name, node, router):
    lease = router.acquire("GREEN")
    long = threading.Thread(target=lambda: router.acquire("GREEN", timeout_s=5).release())
    long.start()
    wait_until(lambda: waiters(name), 2)
    time.sleep(0.02)  # the waiting thread sleeps now, for longer than we want to wait
    began = time.monotonic()
    try:
        with pytest.raises(Saturated):
            router.acquire("GREEN", timeout_s=0.05)
        assert time.monotonic() - began < 0.15
    finally:
        lease.release()
        long.join()
    settled(name)


def test_nobody_eligible_is_told_at_once(node, router):
    node.drain()
    began = time.monotonic()
    with pytest.raises(NoBackend):
        router.acquire("GREEN", timeout_s=5)
    assert time.monotonic() - began < 1


def test_waiting_ends_when_the_last_node_goes(name, node, router):
    lease = router.acquire("GREEN")
    threading.Timer(0.03, node.leave).start()
    began = time.monotonic()
    with pytest.raises(NoBackend):
        router.acquire("GREEN", timeout_s=5)
    assert time.monotonic() - began < 1
    lease.release()
    settled(name)


def test_a_node_that_joins_or_resumes_is_capacity(name, segment, node, router, monkeypatch):
    monkeypatch.setattr("shmcoord.waiting.LOST_WAKEUP_S", 3.0)
    held = router.acquire("GREEN")
    second = []

    def join():
        second.append(segment.join("C", group="GREEN", endpoint="e", capacity=1, interval_s=3600))

    threading.Timer(0.03, join).start()
    began = time.monotonic()
    lease = router.acquire("GREEN", timeout_s=5)
    assert time.monotonic() - began < 1.5
    assert lease.node == "C"
    lease.release()
    wait_until(lambda: second, 2)  # it was capacity before `join` had returned
    second[0].drain()
    threading.Timer(0.03, second[0].resume).start()
    began = time.monotonic()
    router.acquire("GREEN", timeout_s=5).release()
    assert time.monotonic() - began < 1.5
    held.release()
    second[0].leave()
    settled(name)


def test_closing_the_router_ends_the_waits(node, segment):
    router = Router(segment)
    lease = router.acquire("GREEN")
    outcome = []

    def wait():
        try:
            router.acquire("GREEN", timeout_s=10)
        except (ValueError, Saturated) as error:
            outcome.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    wait_until(lambda: waiters(segment.name), 2)
    router.close()
    thread.join(2)
    assert len(outcome) == 1
    assert lease.release() is False
    settled(segment.name)


# --- woken


@pytest.mark.parametrize("how", ["lease", "request", "adopted"])
def test_a_release_wakes_at_once(name, node, router, how):
    """Far sooner than the bounded wait (the net for lost wake-ups) would find it."""
    delays = []
    for _ in range(7):
        if how == "request":
            release = node.begin().end
        elif how == "adopted":
            reserved = router.acquire("GREEN")
            release = node.adopt(reserved.token).end
            reserved.release()
        else:
            release = router.acquire("GREEN").release
        released_at = []

        def later(release=release, released_at=released_at):
            released_at.append(time.monotonic())
            release()

        timer = threading.Timer(0.02, later)
        timer.start()
        lease = router.acquire("GREEN", timeout_s=5)
        delays.append(time.monotonic() - released_at[0])
        lease.release()
        timer.join()
    assert sorted(delays)[3] < 0.02
    settled(name)


def test_a_release_in_another_process_wakes(name, node, router, spawn):
    child = spawn(
        """
router = Router(name)
while True:
    lease = router.acquire("GREEN", timeout_s=10)
    say("held")
    if not hear():
        break
    say(time.monotonic())
    lease.release()
    time.sleep(0.05)
""",
        name,
    )
    delays = []
    for _ in range(6):
        child.hear()
        timer = threading.Timer(0.02, child.say, ["go"])
        timer.start()
        lease = router.acquire("GREEN", timeout_s=5)
        delays.append(time.monotonic() - float(child.hear()))
        timer.join()
        time.sleep(0.06)
        lease.release()
    assert sorted(delays)[2] < 0.03
    child.finish()
    settled(name)


def test_waiting_costs_no_cpu(name, node, spawn):
    """Six routers wait for a second, and none of them polls."""
    said = run(
        """
import resource
segment = Segment.open(name)
routers = [Router(name) for _ in range(6)]
held = routers[0].acquire("GREEN")
def wait(router):
    with contextlib.suppress(Saturated):
        router.acquire("GREEN", timeout_s=1.0)
threads = [threading.Thread(target=wait, args=(router,)) for router in routers]
for thread in threads:
    thread.start()
time.sleep(0.1)
before = resource.getrusage(resource.RUSAGE_SELF)
time.sleep(0.8)
after = resource.getrusage(resource.RUSAGE_SELF)
for thread in threads:
    thread.join()
say(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    after.ru_nvcsw - before.ru_nvcsw)
""",
        name,
    )
    cpu_s, switches = float(said.split()[0]), int(said.split()[1])
    assert cpu_s < 0.04
    assert switches < 6 * 0.8 * 40, "a look every 25 ms would be polling"


def test_a_lost_wake_up_is_found_by_the_bounded_wait(name, node, router, spawn):
    """The holder is killed: nobody releases, nobody wakes."""
    child = spawn(
        """
router = Router(name)
lease = router.acquire("GREEN")
say("held")
hear()
""",
        name,
    )
    child.hear()
    timer = threading.Timer(0.05, child.kill)
    timer.start()
    began = time.monotonic()
    with router.acquire("GREEN", timeout_s=5):
        assert time.monotonic() - began < 0.05 + 2 * LOST_WAKEUP_S
    timer.join()
    settled(name)


def test_a_waiter_that_is_killed_is_counted_off(name, segment, node, router, spawn):
    with router.acquire("GREEN"):
        child = spawn(
            """
router = Router(name)
with contextlib.suppress(Saturated):
    router.acquire("GREEN")
say("now")
router.acquire("GREEN", timeout_s=30)
""",
            name,
        )
        child.hear()
        wait_until(lambda: waiters(name) == 1, 2)
        child.kill()
    segment.reap()
    assert waiters(name) == 0
    router.acquire("GREEN").release()


def test_many_processes_share_one_unit_without_starving(name):
    said = run(
        """
import psutil
segment = Segment.open(name, slots=16, leases=4)
node = segment.join("B", group="GREEN", endpoint="e", capacity=1, interval_s=0.05)

def work(index):
    router = Router(name)
    end = time.monotonic() + 1.2
    got, longest = 0, 0.0
    while time.monotonic() < end:
        began = time.monotonic()
        try:
            with router.acquire("GREEN", timeout_s=2):
                longest = max(longest, time.monotonic() - began)
                time.sleep(0.001)
        except Saturated:
            return [-1, 0]
        got += 1
        time.sleep(0.001)
    return [got, longest]

results = swarm(5, work)
assert None not in results
say(json.dumps(results))
""",
        name,
    )
    results = json.loads(said)
    assert all(got > 5 for got, _ in results)
    assert sum(got for got, _ in results) > 250
    settled(name)


# --- first come, first served


def test_waiters_are_served_in_order(name, node, router):
    lease = router.acquire("GREEN")
    order = []

    def wait(index):
        with router.acquire("GREEN", timeout_s=10):
            order.append(index)

    threads = []
    for index in range(12):
        threads.append(threading.Thread(target=wait, args=(index,)))
        threads[-1].start()
        wait_until(lambda index=index: len(router_waiters(router)) == index + 1, 2)
    lease.release()
    for thread in threads:
        thread.join()
    assert order == list(range(12))
    settled(name)


def router_waiters(router):
    """The queue of a router, found among what the collector knows (it has no public name)."""
    return max(
        (
            [waiter for waiters in list(thing._queues.values()) for waiter in waiters]
            for thing in gc.get_objects()
            if isinstance(thing, WaitQueue) and not thing._closed
        ),
        key=len,
        default=[],
    )


def test_the_waits_of_one_user_can_be_ended(name, node, router):
    lease = router.acquire("GREEN")
    ours, others = Waits(), Waits()
    with ThreadPoolExecutor(3) as threads:

        def wait(waits):
            return threads.submit(router.acquire, "GREEN", 10, waits=waits)

        waiting = [wait(ours), wait(ours), wait(others)]
        wait_until(lambda: len(router_waiters(router)) == 3, 2)
        ours.end()
        for future in waiting[:2]:
            with pytest.raises(Saturated, match="until the wait was ended"):
                future.result(1)
        assert len(router_waiters(router)) == 1
        began = time.monotonic()
        with pytest.raises(Saturated, match="until the wait was ended"):
            router.acquire("GREEN", 10, waits=ours)  # it need not have begun
        assert time.monotonic() - began < 1
        assert not waiting[2].done()
        lease.release()
        waiting[2].result(5).release()
        router.acquire("GREEN", 10, waits=ours).release()  # what is free is not waited for
    settled(name)


async def test_a_newcomer_does_not_overtake(name, node, router):
    """A unit that comes free belongs to who waits, also when a fresh call is just there."""
    lease = router.acquire("GREEN")
    waiting = asyncio.create_task(router.acquire_async("GREEN", timeout_s=5))
    await asyncio.sleep(0.02)
    lease.release()
    with pytest.raises(Saturated):
        router.acquire("GREEN")
    (await waiting).release()
    settled(name)


async def test_who_does_not_want_to_wait_here_overtakes_nobody(name, node, router):
    with router.try_acquire("GREEN") as lease:
        assert lease.node == node.name
        assert router.try_acquire("GREEN") is None, "it is full"
    with pytest.raises(NoBackend):
        router.try_acquire("PINK")
    lease = router.acquire("GREEN")
    waiting = asyncio.create_task(router.acquire_async("GREEN", timeout_s=5))
    await asyncio.sleep(0.02)
    lease.release()
    # It is free now, and he who waits for it has not been woken yet.
    assert router.try_acquire("GREEN") is None
    (await waiting).release()
    router.try_acquire("GREEN").release()
    settled(name)


def test_another_group_does_not_wait_behind(name, segment, node, router):
    with segment.join("P", group="PINK", endpoint="e", capacity=1, interval_s=3600):
        lease = router.acquire("GREEN")
        thread = threading.Thread(target=lambda: router.acquire("GREEN", timeout_s=5).release())
        thread.start()
        wait_until(lambda: waiters(name), 2)
        began = time.monotonic()
        router.acquire("PINK", timeout_s=1).release()
        pink = router.acquire("PINK")
        threading.Timer(0.03, pink.release).start()
        router.acquire("PINK", timeout_s=1).release()
        assert time.monotonic() - began < 0.2
        lease.release()
        thread.join()
    settled(name)


# --- event loops


async def test_a_loop_goes_on_while_it_waits(name, node, router):
    lease = router.acquire("GREEN")
    ticks = 0

    async def tick():
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.005)

    ticking = asyncio.create_task(tick())
    waiting = asyncio.create_task(router.acquire_async("GREEN", timeout_s=5))
    await asyncio.sleep(0.15)
    assert not waiting.done()
    assert ticks > 10
    lease.release()
    second = await asyncio.wait_for(waiting, 0.2)
    second.release()
    ticking.cancel()
    settled(name)


async def test_cancelled_waits_leak_nothing(name, node, router):
    lease = router.acquire("GREEN")
    tasks = [asyncio.create_task(router.acquire_async("GREEN", timeout_s=30)) for _ in range(20)]
    await asyncio.sleep(0.03)
    for task in tasks[:15]:
        task.cancel()
    await asyncio.sleep(0)
    lease.release()
    served = 0
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError):
            (await asyncio.wait_for(task, 2)).release()
            served += 1
    assert served == 5
    settled(name)


async def test_cancelled_at_the_moment_of_the_hand_over(name, node, router):
    """The lease has been given and the task has not woken yet."""
    cancelled = served = 0
    for round_ in range(120):
        lease = router.acquire("GREEN")
        task = asyncio.create_task(router.acquire_async("GREEN", timeout_s=30))
        await asyncio.sleep(0.0005)
        lease.release()
        end = time.perf_counter() + (round_ % 12) * 20e-6
        while time.perf_counter() < end:  # the loop stands still; the waiting thread does not
            time.sleep(0)
        task.cancel()
        try:
            (await task).release()
            served += 1
        except asyncio.CancelledError:
            cancelled += 1
        wait_until(lambda: Raw(name).taken() == 0, 1)
    assert cancelled > 50
    settled(name)


async def test_wait_for_around_it_leaks_nothing(name, node, router):
    with router.acquire("GREEN"):
        for _ in range(5):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(router.acquire_async("GREEN", timeout_s=30), 0.01)
    with router.acquire("GREEN"):
        pass
    settled(name)


def test_a_loop_that_ends_with_waiters_leaks_nothing(name, node, router):
    lease = router.acquire("GREEN")

    async def main():
        task = asyncio.create_task(router.acquire_async("GREEN", timeout_s=30))
        await asyncio.sleep(0.02)
        return task

    asyncio.run(main())
    lease.release()
    router.acquire("GREEN", timeout_s=1).release()
    settled(name)


async def test_sync_and_async_waiters_share_the_queue(name, node, router):
    lease = router.acquire("GREEN")
    order = []

    def wait():
        with router.acquire("GREEN", timeout_s=10):
            order.append("thread")

    async def wait_async():
        with await router.acquire_async("GREEN", timeout_s=10):
            order.append("task")

    first = asyncio.create_task(wait_async())
    await asyncio.sleep(0.03)
    thread = threading.Thread(target=wait)
    thread.start()
    await asyncio.sleep(0.03)
    last = asyncio.create_task(wait_async())
    await asyncio.sleep(0.03)
    lease.release()
    await asyncio.wait_for(asyncio.gather(first, last), 2)
    thread.join()
    assert order == ["task", "thread", "task"]
    settled(name)


def test_an_interrupted_wait_leaks_nothing(name, node, router, spawn):
    """Ctrl-C in a thread that waits."""
    with router.acquire("GREEN"):
        child = spawn(
            """
router = Router(name)
say("now")
try:
    router.acquire("GREEN", timeout_s=30)
except KeyboardInterrupt:
    say("interrupted")
hear()
say(router.acquire("GREEN", timeout_s=1).release())
""",
            name,
        )
        child.hear()
        wait_until(lambda: waiters(name) == 1, 2)
        child.process.send_signal(signal.SIGINT)
        assert child.hear() == "interrupted"
    time.sleep(0.02)
    assert Raw(name).taken() == 0
    child.say("go")
    assert child.hear() == "True"
    settled(name)


# --- the queue by itself


class Units:
    """Something to wait for, by a condition instead of a futex."""

    def __init__(self, free):
        self.free = free
        self.changed = threading.Condition()
        self.told = False
        self.waiting = 0
        self.shown = 0
        self.undone = 0
        self.passed_on = []
        self.ticket = 0

    def begin(self):
        self.waiting += 1

    def end(self):
        self.waiting -= 1
        self.shown = 0

    def tickets(self):
        self.ticket += 1
        return [self.ticket]

    def publish(self, heads, waiting, by_loop=False):
        assert heads == sorted(heads, key=lambda head: head[1][0])
        self.shown = waiting

    def consume(self):
        with self.changed:
            told, self.told = self.told, False
            return told

    def wake(self):
        with self.changed:
            self.told = True
            self.changed.notify_all()

    def sleep(self, timeout_s):
        with self.changed:
            self.changed.wait_for(lambda: self.told, timeout_s)

    def take(self):
        with self.changed:
            if self.free:
                self.free -= 1
                return "unit"
            return None

    def give(self, _unit=None):
        with self.changed:
            self.free += 1
            self.told = True
            self.changed.notify_all()

    def undo(self, unit):
        self.undone += 1
        self.give(unit)


@pytest.fixture
def units():
    return Units(0)


@pytest.fixture
def queue(units):
    return WaitQueue(units, units.undo, units.passed_on.append)


def put(queue, group, attempt, timeout_s):
    """The future of a caller who waits."""
    return queue.put(group, hash(group), attempt, timeout_s).future


def test_queue_serves_in_order_and_ends_its_thread(queue, units):
    futures = [put(queue, "g", units.take, 5) for _ in range(5)]
    for index, future in enumerate(futures):
        assert queue.ahead("g")
        units.give()
        assert future.result(2) == "unit"
        assert not any(later.done() for later in futures[index + 1 :])
    wait_until(lambda: units.waiting == 0, 2)
    assert not queue.ahead("g")
    again = put(queue, "g", units.take, 5)
    units.give()
    assert again.result(2) == "unit"
    assert units.free == 0
    wait_until(lambda: units.waiting == 0, 2)


def test_queue_fails_who_asked_and_goes_on(queue, units):
    def fail():
        raise KeyError("mine")

    first = put(queue, "g", units.take, 5)
    failing = put(queue, "other", fail, 5)
    with pytest.raises(KeyError, match="mine"):
        failing.result(2)
    units.give()
    assert first.result(2) == "unit"


def test_queue_survives_nothing_silently(units, caplog):
    """If the native side fails, nobody is left waiting for ever."""

    def broken(timeout_s):
        raise OSError("no futex")

    units.sleep = broken
    queue = WaitQueue(units, units.undo, units.passed_on.append)
    with pytest.raises(OSError, match="no futex"):
        put(queue, "g", units.take, 5).result(2)
    wait_until(lambda: units.waiting == 0, 2)


def test_queue_survives_a_begin_that_fails(units):
    def broken():
        raise OSError("no begin")

    units.begin = broken
    queue = WaitQueue(units, units.undo, units.passed_on.append)
    for _ in range(2):
        with pytest.raises(OSError, match="no begin"):
            put(queue, "g", units.take, 5)
        assert queue.ahead("g") == 0


def test_queue_passes_over_the_cancelled(queue, units):
    futures = [put(queue, "g", units.take, 5) for _ in range(4)]
    futures[0].cancel()
    futures[2].cancel()
    units.give()
    assert futures[1].result(2) == "unit"
    units.give()
    assert futures[3].result(2) == "unit"
    assert units.free == 0


def test_queue_closed_ends_all(queue, units):
    futures = [put(queue, "g", units.take, 5) for _ in range(3)]
    queue.close()
    assert [future.result(2) for future in futures] == [None] * 3
    with pytest.raises(ValueError, match="closed"):
        put(queue, "g", units.take, 5)


def test_queue_never_loses_a_unit(queue, units):
    """Takers who cancel, time out and succeed at random; in the end all units are there again."""
    chance = random.Random(5)
    for _ in range(3):
        units.give()
    got = []

    def work(seed):
        own = random.Random(seed)
        for _ in range(120):
            future = put(queue, own.choice("gh"), units.take, own.random() * 0.01)
            if own.random() < 0.3:
                time.sleep(own.random() * 0.001)
                if not future.cancel() and future.result(2) is not None:
                    units.give()
                continue
            if future.result(2) is not None:
                got.append(1)
                time.sleep(own.random() * 0.0005)
                units.give()

    threads = [threading.Thread(target=work, args=(chance.random(),)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_until(lambda: units.waiting == 0, 2)
    assert units.free == 3
    assert len(got) > 100
