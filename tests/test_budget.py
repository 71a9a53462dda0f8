"""The budget of retries that all routers of a segment share."""

from __future__ import annotations

import json
import random

import pytest
from helpers import Raw, run

from shmcoord import Router, Segment, SegmentForbidden
from shmcoord.budget import RetryBudget


@pytest.fixture
def router(segment):
    with Router(segment) as router:
        yield router


def debt(name):
    """Thousandths of a retry that are owed."""
    return Raw(name).number("sync", "retry_debt", 8)


def test_the_burst_is_there_at_once_and_then_it_is_spent(router):
    budget = router.retry_budget(ratio=0.2, burst=3)
    assert budget.left == 3
    assert [budget.spend() for _ in range(5)] == [True, True, True, False, False]
    assert budget.left == 0


@pytest.mark.parametrize(("ratio", "requests"), [(0.2, 5), (0.5, 2), (1.0, 1), (0.001, 1000)])
def test_requests_earn_it_back(router, ratio, requests):
    budget = router.retry_budget(ratio=ratio, burst=2)
    while budget.spend():
        pass
    for _ in range(requests - 1):
        budget.earn()
    assert not budget.spend()
    budget.earn()
    assert budget.spend()
    assert not budget.spend()


def test_nothing_is_saved_up_beyond_the_burst(router):
    budget = router.retry_budget(ratio=1.0, burst=2)
    for _ in range(100):
        budget.earn()
    assert budget.left == 2
    assert [budget.spend() for _ in range(3)] == [True, True, False]
    for _ in range(100):
        budget.earn()
    assert budget.left == 2


def test_without_a_ratio_nothing_is_earned_and_without_a_burst_nothing_spent(router):
    budget = router.retry_budget(ratio=0, burst=1)
    assert budget.spend()
    budget.earn()
    assert not budget.spend()
    assert not router.retry_budget(ratio=1, burst=0).spend()


def test_it_is_the_segments_not_the_routers(name, segment, router):
    mine = router.retry_budget(burst=3)
    with Router(segment) as second, Segment.open(name) as other:
        assert second.retry_budget(burst=3).spend()
        assert RetryBudget(other, burst=3).spend()
        assert mine.left == 1
        # Bounds are each one's own, the number is everybody's.
        assert not second.retry_budget(burst=2).spend()
        assert second.retry_budget(burst=10).left == 8
        said = run("say(Router(name).retry_budget(burst=3).spend())", name)
        assert said == "True\n"
    assert not mine.spend()


def test_a_router_that_dies_takes_nothing_with_it(name, router, spawn):
    child = spawn("say(Router(name).retry_budget(burst=2).spend()); hear()", name)
    assert child.hear() == "True"
    child.kill()
    budget = router.retry_budget(burst=2, ratio=1)
    assert budget.left == 1
    budget.earn()
    assert budget.left == 2


CONTEND = """
def work(index):
    budget = Router(name).retry_budget(ratio=0.25, burst=500)
    return sum(budget.spend() for _ in range(40_000))

results = swarm(4, work)
say(json.dumps(results))
"""


def test_contention_spends_the_burst_exactly(name, segment):
    """Four processes, 160,000 tries, nothing earned: 500 and not one more."""
    results = json.loads(run(CONTEND, name))
    assert sum(results) == 500
    assert debt(name) == 500_000


EARN = """
def work(index):
    budget = Router(name).retry_budget(ratio=0.25, burst=500)
    spent = earned = 0
    chance = random.Random(index)
    for _ in range(30_000):
        if chance.random() < 0.5:
            budget.earn()
            earned += 1
        else:
            spent += budget.spend()
    return [spent, earned]

say(json.dumps(swarm(4, work)))
"""


def test_contention_never_spends_more_than_was_earned(name, segment):
    results = json.loads(run(EARN, name))
    spent = sum(result[0] for result in results)
    earned = sum(result[1] for result in results)
    assert spent <= 500 + 0.25 * earned
    # The budget is nearly always spent out here, so nearly all that was earned was used.
    assert spent > 0.95 * (500 + 0.25 * earned) - 500
    # To the thousandth: what is owed is what was spent, less what was earned while it was owed.
    assert debt(name) >= max(spent * 1000 - earned * 250, 0)
    assert debt(name) <= 500_000


@pytest.mark.parametrize(
    "word", [1, 999, 100_001, 2**32, 2**63, 2**64 - 1, 2**64 - 999, 2**64 - 1000]
)
def test_garbage_in_the_word_is_harmless(name, router, word):
    """It refuses, or is earned off; never does it give more than the burst."""
    budget = router.retry_budget(ratio=10, burst=100)
    Raw(name).set("sync", "retry_debt", 8, word)
    assert 0 <= budget.left <= 100
    spent = 0
    while budget.spend():
        spent += 1
    assert spent <= 100
    assert spent == int((100_000 - word) / 1000 if word < 100_000 else 0)
    for _ in range(20):
        budget.earn()
    assert 0 <= budget.left <= 100
    if word < 2**32:
        assert budget.spend()


def test_garbage_at_random(name, router):
    budget = router.retry_budget(ratio=0.2, burst=1e9)
    chance = random.Random(6)
    for _ in range(500):
        Raw(name).set("sync", "retry_debt", 8, chance.getrandbits(chance.randrange(1, 65)))
        before = budget.left
        assert 0 <= before <= 1e9
        assert budget.spend() == (before >= 1)
        budget.earn()


@pytest.mark.parametrize(
    "options",
    [{"ratio": -0.1}, {"ratio": 11}, {"ratio": float("nan")}, {"burst": -1}, {"burst": 1e10}],
)
def test_wrong_bounds_are_refused(router, options):
    with pytest.raises(ValueError, match="must be between"):
        router.retry_budget(**options)


def test_it_needs_a_segment_to_write_to(name, segment, router):
    with Segment.attach(name) as observer, pytest.raises(SegmentForbidden):
        RetryBudget(observer)
    budget = router.retry_budget()
    router.close()
    with pytest.raises(ValueError, match="closed"):
        router.retry_budget()
    segment.close()
    for use in (budget.spend, budget.earn, lambda: budget.left):
        with pytest.raises(ValueError, match="closed"):
            use()
