"""Turns: who is told of a free cell, how many may wait, and what a caller is told who may not."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import threading
import time

import pytest
from helpers import Raw, wait_until
from policy_helpers import set_latency

import shmcoord.waiting
from shmcoord import Router, Saturated


@pytest.fixture
def node(segment):
    with segment.join("B", group="GREEN", endpoint="e", capacity=1, interval_s=3600) as node:
        yield node


def waiting(name):
    return Raw(name).number("sync", "waiters", 4)


def turns(name):
    """The tickets with which routers wait, of all slots."""
    raw = Raw(name)
    offsets = [raw.offset("hot", "turn", slot) for slot in range(raw.slots)]
    found = [int.from_bytes(raw.read(at + i * 16, 8), "little") for at in offsets for i in (0, 1)]
    return sorted(ticket for ticket in found if ticket)


class Waiter(threading.Thread):
    """A caller on a thread; `served_at` on the monotonic clock, or None."""

    def __init__(self, router, group="GREEN", timeout_s=10.0, hold_s=0.0):
        super().__init__()
        self.served_at = None
        self.error = None
        self._ask = (router, group, timeout_s, hold_s)
        self.start()

    def run(self):
        router, group, timeout_s, hold_s = self._ask
        try:
            with router.acquire(group, timeout_s=timeout_s):
                self.served_at = time.monotonic()
                time.sleep(hold_s)
        except Saturated as error:
            self.error = error


def test_each_router_shows_its_oldest_caller(name, segment, node):
    with Router(segment) as one, Router(segment) as two:
        lease = one.acquire("GREEN")
        threads = [Waiter(one)]
        wait_until(lambda: len(turns(name)) == 1)
        threads.append(Waiter(two))
        wait_until(lambda: len(turns(name)) == 2)
        shown = turns(name)
        threads += [Waiter(one), Waiter(two)]
        time.sleep(0.02)
        assert turns(name) == shown, "those behind do not change whose turn it is"
        assert waiting(name) == 2, "routers, not callers"
        lease.release()
        for thread in threads:
            thread.join(5)
        assert all(thread.served_at for thread in threads)
    assert turns(name) == []
    assert waiting(name) == 0


def test_the_router_that_waits_longest_is_served(segment, node):
    """Whichever it is, also where routers have several callers each."""
    routers = [Router(segment) for _ in range(4)]
    holder = Router(segment)
    for turn in range(4):
        order = routers[turn:] + routers[:turn]
        lease = holder.acquire("GREEN")
        threads = []
        for index, router in enumerate(order):
            threads.append(Waiter(router, hold_s=0.002))
            wait_until(lambda index=index: len(turns(segment.name)) == index + 1)
            time.sleep(0.005)
        lease.release()
        for thread in threads:
            thread.join(5)
        served = [thread.served_at for thread in threads]
        assert served == sorted(served)
    for router in (*routers, holder):
        router.close()


def test_only_routers_of_the_group_are_told(segment, node, monkeypatch):
    """With a net so wide that one that is needed shows."""
    monkeypatch.setattr(shmcoord.waiting, "LOST_WAKEUP_S", 3.0)
    with (
        segment.join("P", group="PINK", endpoint="e", capacity=1, interval_s=3600),
        Router(segment) as holder,
        Router(segment) as other,
        Router(segment) as router,
    ):
        pink, green = holder.acquire("PINK"), holder.acquire("GREEN")
        first = Waiter(other, "PINK")
        wait_until(lambda: len(turns(segment.name)) == 1)
        second = Waiter(router, "GREEN")
        wait_until(lambda: len(turns(segment.name)) == 2)
        time.sleep(0.01)
        began = time.monotonic()
        green.release()
        second.join(5)
        assert second.served_at - began < 1
        assert first.served_at is None
        began = time.monotonic()
        pink.release()
        first.join(5)
        assert first.served_at - began < 1


def test_more_groups_than_turns(segment, monkeypatch):
    """One router waits for more groups than it can show: none is forgotten."""
    monkeypatch.setattr(shmcoord.waiting, "LOST_WAKEUP_S", 3.0)
    groups = ["G0", "G1", "G2", "G3", "G4"]
    nodes = [
        segment.join(group, group=group, endpoint="e", capacity=1, interval_s=3600)
        for group in groups
    ]
    with Router(segment) as router, Router(segment) as holder:
        leases = {group: holder.acquire(group) for group in groups}
        threads = {group: Waiter(router, group) for group in groups}
        wait_until(lambda: len(turns(segment.name)) == 2)
        time.sleep(0.02)
        for group in reversed(groups):
            began = time.monotonic()
            leases[group].release()
            threads[group].join(5)
            assert threads[group].served_at - began < 1
    for node in nodes:
        node.leave()


# --- who leaves


@pytest.mark.parametrize("how", ["cancelled", "timed out"])
async def test_who_leaves_unserved_passes_on_what_he_was_told(segment, node, how, monkeypatch):
    """The first one's turn is called and he is gone: the second must not wait for the net."""
    monkeypatch.setattr(shmcoord.waiting, "LOST_WAKEUP_S", 3.0)
    with Router(segment) as holder, Router(segment) as first, Router(segment) as second:
        for _ in range(20):
            lease = holder.acquire("GREEN")
            timeout_s = 0.03 if how == "timed out" else 10
            gone = asyncio.create_task(first.acquire_async("GREEN", timeout_s))
            await asyncio.sleep(0.005)
            stays = asyncio.create_task(second.acquire_async("GREEN", 10))
            await asyncio.sleep(0.005)
            if how == "timed out":
                await asyncio.sleep(0.018)  # about when he gives up
            began = time.monotonic()
            lease.release()
            if how == "cancelled":
                gone.cancel()
            for result in await asyncio.gather(gone, return_exceptions=True):
                if not isinstance(result, BaseException):
                    result.release()
            (await stays).release()
            assert time.monotonic() - began < 1


async def test_who_leaves_passes_on_also_where_others_of_his_router_wait(
    segment, node, monkeypatch
):
    """They wait for another group, so his router goes on waiting, and would keep the telling."""
    monkeypatch.setattr(shmcoord.waiting, "LOST_WAKEUP_S", 3.0)
    with (
        segment.join("P", group="PINK", endpoint="e", capacity=1, interval_s=3600),
        Router(segment) as holder,
        Router(segment) as first,
        Router(segment) as second,
        holder.acquire("PINK"),
    ):
        others = asyncio.create_task(first.acquire_async("PINK", 30))
        for _ in range(10):
            lease = holder.acquire("GREEN")
            gone = asyncio.create_task(first.acquire_async("GREEN", 10))
            await asyncio.sleep(0.005)
            stays = asyncio.create_task(second.acquire_async("GREEN", 10))
            await asyncio.sleep(0.005)
            began = time.monotonic()
            lease.release()
            gone.cancel()
            for result in await asyncio.gather(gone, return_exceptions=True):
                if not isinstance(result, BaseException):
                    result.release()
            (await stays).release()
            assert time.monotonic() - began < 1
        others.cancel()
        await asyncio.gather(others, return_exceptions=True)


# --- how many may wait


def test_too_many_are_refused_at_once(segment, node):
    set_latency(segment, node, 20_000)
    with Router(segment, max_waiters=3) as router, Router(segment) as other:
        other.acquire("GREEN").release()  # who takes part first makes all who wait look
        lease = router.acquire("GREEN")
        threads = [Waiter(router) for _ in range(3)]
        wait_until(lambda: waiting(segment.name) == 1)
        time.sleep(0.02)
        began = time.monotonic()
        with pytest.raises(Saturated, match="3 callers of this router wait") as refused:
            router.acquire("GREEN", timeout_s=10)
        assert time.monotonic() - began < 0.1
        # Three before him and himself, at one in 20 ms.
        assert refused.value.retry_after_s == pytest.approx(0.08)
        # Another router has its own limit, and counts those who wait here.
        with pytest.raises(Saturated) as refused:
            other.acquire("GREEN")
        assert refused.value.retry_after_s == pytest.approx(0.08)
        lease.release()
        for thread in threads:
            thread.join(5)
            assert thread.served_at
        router.acquire("GREEN", timeout_s=1).release()


async def test_too_many_are_refused_on_a_loop(segment, node):
    with Router(segment, max_waiters=1) as router:
        lease = router.acquire("GREEN")
        task = asyncio.create_task(router.acquire_async("GREEN", 10))
        await asyncio.sleep(0.01)
        with pytest.raises(Saturated, match="1 callers") as refused:
            await router.acquire_async("GREEN", 10)
        assert refused.value.retry_after_s is None, "no request has told how long one takes"
        lease.release()
        (await task).release()


def test_nobody_may_wait(segment, node):
    with Router(segment, max_waiters=0) as router, router.acquire("GREEN"):
        began = time.monotonic()
        with pytest.raises(Saturated):
            router.acquire("GREEN", timeout_s=5)
        assert time.monotonic() - began < 0.5


def test_what_is_said_about_the_wait_is_about_right(segment):
    """Against the time that it really takes, with requests of 20 ms on two nodes."""
    nodes = [
        segment.join(name, group="GREEN", endpoint="e", capacity=1, interval_s=3600)
        for name in "AB"
    ]
    for node in nodes:
        set_latency(segment, node, 20_000)
    with Router(segment) as router, Router(segment) as other:
        threads = [Waiter(each, hold_s=0.02) for _ in range(6) for each in (router, other)]
        wait_until(lambda: waiting(segment.name) == 2)
        with pytest.raises(Saturated) as refused:
            router.acquire("GREEN")
        began = time.monotonic()
        router.acquire("GREEN", timeout_s=10).release()
        took = time.monotonic() - began
        assert 0.5 < refused.value.retry_after_s / took < 2
        for thread in threads:
            thread.join(5)
    for node in nodes:
        node.leave()


# --- threads and event loops


def test_threads_and_loops_mixed(segment, node):
    """Callers of both kinds on the same two routers: all are served, nothing is left."""
    served = []

    async def tasks(router):
        async def one():
            lease = await router.acquire_async("GREEN", 20)
            await asyncio.sleep(0.0005)
            lease.release()
            served.append("task")

        await asyncio.gather(*(one() for _ in range(40)))

    with Router(segment) as one, Router(segment) as two:
        threads = [Waiter(router, timeout_s=20) for _ in range(20) for router in (one, two)]
        loops = [
            threading.Thread(target=lambda router=router: asyncio.run(tasks(router)))
            for router in (one, two, one)
        ]
        for thread in loops:
            thread.start()
        for thread in (*threads, *loops):
            thread.join(20)
        assert all(thread.served_at for thread in threads)
        assert len(served) == 120
        wait_until(lambda: waiting(segment.name) == 0)
        assert Raw(segment.name).taken() == 0
        assert turns(segment.name) == []


# --- bells


def bells(name):
    raw = Raw(name)
    return [raw.number("hot", "bell", 4, slot) for slot in range(raw.slots)]


def listening(incarnation):
    """Slots whose bell somebody listens to, by what the kernel says of abstract sockets."""
    wanted = f"@shmcoord-{incarnation:016x}-"
    with open("/proc/net/unix") as file:
        return [line.split()[-1] for line in file if wanted in line]


@pytest.fixture
def patient(monkeypatch):
    """Whoever is not woken waits for long."""
    monkeypatch.setattr("shmcoord.waiting.LOST_WAKEUP_S", 5.0)


async def served_soon(router, lease, other=None):
    waiting = asyncio.create_task(router.acquire_async("GREEN", timeout_s=10))
    await asyncio.sleep(0.05)
    if other is not None:
        other()
    lease.release()
    (await asyncio.wait_for(waiting, 1)).release()


async def test_a_loop_is_woken_by_its_bell(name, segment, node, patient):
    incarnation = Raw(name).number("header", "incarnation", 8)
    with Router(segment) as router:
        lease = router.acquire("GREEN")
        shown = []
        await served_soon(
            router, lease, lambda: shown.append((bells(name), listening(incarnation)))
        )
        [(words, sockets)] = shown
        assert sorted(words)[-2:] == [0, 1]
        assert len(sockets) == 1
    await asyncio.sleep(0.01)
    assert listening(incarnation) == []


async def test_a_loop_that_no_datagram_reaches_is_woken_by_the_futex(
    name, segment, node, patient, spawn
):
    """Who frees is in another network namespace, where nobody listens."""
    child = spawn(
        """
import ctypes
if ctypes.CDLL(None, use_errno=True).unshare(0x40000000) != 0:  # CLONE_NEWNET
    say("refused")
    sys.exit()
router = Router(name)
lease = router.acquire("GREEN")
say("held")
hear()
lease.release()
hear()
""",
        name,
    )
    if child.hear() == "refused":
        pytest.skip("this machine refuses a network namespace")
    with Router(segment) as router:
        waiting = asyncio.create_task(router.acquire_async("GREEN", timeout_s=10))
        await asyncio.sleep(0.1)
        assert 1 in bells(name)
        child.say("go")
        (await asyncio.wait_for(waiting, 1)).release()
    child.say("end")


@pytest.mark.parametrize("value", [1, 2, 0xFFFFFFFF])
def test_a_thread_is_woken_whatever_stands_in_its_bell(name, segment, node, patient, value):
    with Router(segment) as router:
        lease = router.acquire("GREEN")
        waiter = Waiter(router)
        wait_until(lambda: turns(name))
        time.sleep(0.02)
        raw = Raw(name)
        for slot in range(raw.slots):
            raw.set("hot", "bell", 4, value, slot)
        lease.release()
        waiter.join(1)
        assert waiter.served_at is not None


async def test_where_a_thread_waits_too_the_futex_is_used(name, segment, node, patient):
    with Router(segment) as router:
        lease = router.acquire("GREEN")
        task = asyncio.create_task(router.acquire_async("GREEN", timeout_s=10))
        await asyncio.sleep(0.03)
        assert 1 in bells(name)
        waiter = Waiter(router)
        await asyncio.sleep(0.03)
        assert 1 not in bells(name)
        lease.release()
        (await asyncio.wait_for(task, 1)).release()
        await asyncio.to_thread(waiter.join, 1)
        assert waiter.served_at is not None


# --- what went wrong once


def test_a_forked_child_leaves_the_parents_queue_alone(name):
    """It cancels what was waiting at the fork: the memory is not there, the lock may be held."""
    from helpers import run

    said = run(
        """
import asyncio, os
segment = Segment.open(name)
node = segment.join("B", group="GREEN", endpoint="e", capacity=1, interval_s=3600)
router = Router(name)

async def main():
    lease = router.acquire("GREEN")
    tasks = [asyncio.create_task(router.acquire_async("GREEN", timeout_s=9)) for _ in range(2)]
    await asyncio.sleep(0.05)
    pid = os.fork()
    if pid == 0:
        try:
            tasks[0].get_coro().throw(asyncio.CancelledError())
        except asyncio.CancelledError:
            os._exit(0)
        os._exit(3)
    say(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    lease.release()
    for task in tasks:
        (await asyncio.wait_for(task, 2)).release()

asyncio.run(main())
router.close()
say("fine")
""",
        name,
    )
    assert said.split() == ["0", "fine"]


@pytest.mark.parametrize("what", ["no descriptor", "no doorbell"])
async def test_a_loop_without_a_doorbell_still_waits(name, segment, node, monkeypatch, what):
    with Router(segment) as router:
        lease = router.acquire("GREEN")
        if what == "no doorbell":
            monkeypatch.setattr("shmcoord.waiters.LoopSide._hook", lambda self: None)
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        if what == "no descriptor":
            lowest = os.open("/dev/null", os.O_RDONLY)
            os.close(lowest)
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limit[1]))
        try:
            task = asyncio.create_task(router.acquire_async("GREEN", timeout_s=5))
            await asyncio.sleep(0.02)
            lease.release()
            (await asyncio.wait_for(task, 1)).release()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        router.acquire("GREEN").release()


def test_a_loop_that_was_closed_leaves_nobody_in_the_queue(name, segment, node):
    router = Router(segment)
    lease = router.acquire("GREEN")
    loop = asyncio.new_event_loop()
    task = loop.create_task(router.acquire_async("GREEN", timeout_s=60))
    loop.run_until_complete(asyncio.sleep(0.02))
    loop.close()
    lease.release()
    router.acquire("GREEN").release()  # nobody is ahead
    router.close()
    assert waiting(name) == 0
    with contextlib.suppress(RuntimeError):
        task.get_coro().close()


def test_a_caller_that_waits_at_the_exit_is_counted_out(name):
    from helpers import run

    with_segment = """
segment = Segment.open(name)
node = segment.join("B", group="GREEN", endpoint="e", capacity=1, interval_s=3600)
router = Router(name)
lease = router.acquire("GREEN")
threading.Thread(target=router.acquire, args=("GREEN", 30), daemon=True).start()
time.sleep(0.1)
say("leaving")
"""
    assert run(with_segment, name).strip() == "leaving"
    assert waiting(name) == 0
