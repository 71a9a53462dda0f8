"""Hedges and the retry budget: only where safe, only onto the idle, only while retries are left."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time

import pytest
from dispatch_fakes import FakeBudget, FakeRouter, endpoint
from helpers import wait_until

from shmcoord import Router, Segment
from shmcoord.dispatch import AsyncDispatcher, Dispatcher, NoneReachable
from shmcoord.transport import ConnectionLost, Unreachable

SLOW_S = 0.25


class Threads:
    """Answers after a delay per node; counts what began and what ended."""

    def __init__(self, router, delays):
        self.router = router
        self.delays = {endpoint(node): delay for node, delay in delays.items()}
        self.sent = []
        self.ended = []

    def send(self, endpoint, method, request, *, lease, timeout_s):
        self.sent.append(endpoint)
        delay = self.delays[endpoint]
        if isinstance(delay, Exception):
            raise delay
        time.sleep(delay)
        self.ended.append(endpoint)
        return endpoint

    def close(self):
        pass


class Loop(Threads):
    async def send(self, endpoint, method, request, *, lease, timeout_s):
        self.sent.append(endpoint)
        delay = self.delays[endpoint]
        if isinstance(delay, Exception):
            raise delay
        await asyncio.sleep(delay)
        self.ended.append(endpoint)
        return endpoint

    async def stream(self, endpoint, method, request, *, lease, timeout_s):
        yield await self.send(endpoint, method, request, lease=lease, timeout_s=timeout_s)

    async def close(self):
        pass


@pytest.fixture(params=["thread", "loop"])
def side(request):
    def make(delays, router=None, **options):
        router = router or FakeRouter(list(delays))
        options = {"idempotent": ["read"], "hedge_after_s": 0.03, **options}
        if request.param == "thread":
            transport = Threads(router, delays)
            dispatcher = Dispatcher(router, transport, **options)
            return router, transport, lambda method: dispatcher.call("G", method, None, 5)
        transport = Loop(router, delays)
        dispatcher = AsyncDispatcher(router, transport, **options)
        return router, transport, lambda method: asyncio.run(dispatcher.call("G", method, None, 5))

    make.kind = request.param
    return make


def test_a_slow_node_is_hedged_and_the_first_answer_counts(side):
    router, transport, call = side({"A": SLOW_S, "B": 0.0})
    began = time.monotonic()
    assert call("read") == endpoint("B")
    assert time.monotonic() - began < SLOW_S
    assert transport.sent == [endpoint("A"), endpoint("B")]
    assert router.budget.left == 999
    wait_until(lambda: not router.held, 2)
    if side.kind == "loop":  # what is not needed any more is cancelled
        assert transport.ended == [endpoint("B")]


def test_the_slow_node_may_still_win(side):
    router, transport, call = side({"A": 0.1, "B": SLOW_S * 2})
    assert call("read") == endpoint("A")
    assert len(transport.sent) == 2
    wait_until(lambda: not router.held, 2)


def test_a_fast_node_is_not_hedged(side):
    router, transport, call = side({"A": 0.0, "B": 0.0})
    assert call("read") == endpoint("A")
    assert transport.sent == [endpoint("A")]
    assert (router.budget.left, router.budget.earned, router.held) == (1000, 1, [])


@pytest.mark.parametrize("why", ["not idempotent", "nobody idle", "no budget"])
def test_no_hedge_where_it_must_not_be(side, why):
    router, transport, call = side({"A": 0.1, "B": 0.0})
    router.idle = why != "nobody idle"
    router.budget.left = 0 if why == "no budget" else 1000
    assert call("write" if why == "not idempotent" else "read") == endpoint("A")
    assert transport.sent == [endpoint("A")]
    assert not router.held


def test_one_that_fails_leaves_the_other(side):
    router, _, call = side({"A": 0.1, "B": ValueError("B")})
    assert call("read") == endpoint("A")
    wait_until(lambda: not router.held, 2)


def test_when_both_fail_the_first_error_is_told(side):
    class Late(Exception):
        pass

    router, transport, call = side({"A": 0.0, "B": ValueError("B")})
    first = transport.send

    def fail_late(*args, **kwargs):
        if args[0] == endpoint("A"):
            time.sleep(0.1)
            raise Late
        return first(*args, **kwargs)

    async def fail_late_async(*args, **kwargs):
        if args[0] == endpoint("A"):
            await asyncio.sleep(0.1)
            raise Late
        return await first(*args, **kwargs)

    transport.send = fail_late if side.kind == "thread" else fail_late_async
    with pytest.raises(Late):
        call("read")
    wait_until(lambda: not router.held, 2)


async def test_a_cancelled_hedge_gives_back_both():
    router = FakeRouter(["A", "B"])
    dispatcher = AsyncDispatcher(
        router, Loop(router, {"A": 9, "B": 9}), idempotent=["read"], hedge_after_s=0.01
    )
    task = asyncio.create_task(dispatcher.call("G", "read", None))
    await asyncio.sleep(0.05)
    assert len(router.held) == 2
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert router.held == []


# --- the retry budget


def test_retries_spend_and_requests_earn(side):
    router, transport, call = side({"A": Unreachable("A"), "B": 0.0})
    assert call("write") == endpoint("B")
    assert transport.sent == [endpoint("A"), endpoint("B")]
    assert (router.budget.left, router.budget.earned) == (999, 1)


def test_a_spent_budget_ends_the_retries(side):
    router, transport, call = side({"A": Unreachable("A"), "B": 0.0})
    router.budget = FakeBudget(left=0)
    router, transport, call = side({"A": Unreachable("A"), "B": 0.0}, router=router)
    with pytest.raises(NoneReachable, match=r"budget .* is spent; tried: A") as caught:
        call("write")
    assert [attempt.node for attempt in caught.value.tried] == ["A"]
    assert transport.sent == [endpoint("A")]
    assert router.held == []


def test_only_an_idempotent_method_is_repeated_after_a_broken_connection(side):
    _, transport, call = side({"A": ConnectionLost("reset"), "B": 0.0})
    with pytest.raises(ConnectionLost):
        call("write")
    assert transport.sent == [endpoint("A")]
    call = side({"A": ConnectionLost("reset"), "B": 0.0})[2]
    assert call("read") == endpoint("B")


def test_wrong_arguments():
    router = FakeRouter(["A"])
    with pytest.raises(TypeError, match="several methods"):
        Dispatcher(router, Threads(router, {}), idempotent="read")
    for wrong in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="hedge_after_s"):
            Dispatcher(router, Threads(router, {}), hedge_after_s=wrong)


def test_with_the_real_router(name):
    """Six threads hedge over four nodes, one of which is slow; all is given back."""
    with Segment.open(name, slots=16, leases=8) as segment, Router(name) as router:
        nodes = [segment.join(n, group="G", endpoint=endpoint(n), capacity=4) for n in "ABCD"]
        transport = Threads(router, {"A": 0.08, "B": 0.001, "C": 0.001, "D": 0.001})
        budget = router.retry_budget(ratio=0)
        dispatcher = Dispatcher(
            router, transport, idempotent=["read"], hedge_after_s=0.01, budget=budget
        )
        worst = []

        def work():
            for _ in range(15):
                began = time.monotonic()
                dispatcher.call("G", "read", None, 5)
                worst.append(time.monotonic() - began)

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        slow = transport.sent.count(endpoint("A"))
        assert slow, "nobody met the slow node: nothing was tested"
        assert sum(took > 0.07 for took in worst) < slow
        wait_until(lambda: not any(node.inflight for node in nodes), 2)
        assert budget.left == 100 - len(transport.sent) + len(worst) < 100
