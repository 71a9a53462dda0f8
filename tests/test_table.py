"""How a router judges nodes: ejection, slow start, other hosts, panic; and what explain says of it.

Times are small: the table is judged four times per heartbeat interval.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections import Counter

import pytest
from helpers import wait_until
from policy_helpers import chi_square, chi_square_limit

from shmcoord import NoBackend, Router, Saturated, Segment

JUDGED_S = 0.03  # more than a quarter of the interval and a tick of the coarse clock


@pytest.fixture
def group(segment):
    """`group(4)` joins A, B, C, D of GREEN; further options are for `join`."""
    kept = []

    def join(count, **options):
        options = {"group": "GREEN", "endpoint": "e", "interval_s": 0.04, **options}
        kept.extend(segment.join("ABCDEFGH"[i], **options) for i in range(count))
        return kept

    yield join
    assert kept, "a node that nobody holds leaves"


def serve(node, count, failed=False):
    for _ in range(count):
        node.end(node.begin(), failed=failed)


def judged(router):
    """Let it look at the nodes as they are now."""
    time.sleep(JUDGED_S)
    router.explain("GREEN")


def picked(router, count=60):
    return {router.pick("GREEN").node for _ in range(count)}


def passed_over(router):
    return {c.node: c.passed_over for c in router.explain("GREEN").candidates}


# --- ejection


def test_failing_in_a_row_ejects(segment, group):
    a, b, c = group(3)
    with Router(segment, seed=1) as router:
        assert picked(router) == {"A", "B", "C"}
        serve(a, 4, failed=True)
        judged(router)
        assert picked(router) == {"A", "B", "C"}, "four are not five"
        serve(a, 1)
        serve(a, 4, failed=True)
        judged(router)
        assert picked(router) == {"A", "B", "C"}, "not in a row"
        serve(a, 1, failed=True)
        judged(router)
        assert picked(router) == {"B", "C"}
        assert re.fullmatch(
            r"ejected for failing, for another [345]\.\d s", passed_over(router)["A"]
        )
        b.drain()
        c.drain()
        assert picked(router) == {"A"}, "rather him than nobody"


@pytest.mark.parametrize("eject_after", [1, 3, 12])
def test_eject_after_is_obeyed(segment, group, eject_after):
    a, _b, _c = group(3)
    with Router(segment, seed=1, eject_after=eject_after) as router:
        picked(router)
        serve(a, eject_after - 1, failed=True)
        judged(router)
        assert "A" in picked(router)
        serve(a, 1, failed=True)
        judged(router)
        assert "A" not in picked(router)


def test_eject_after_0_never_ejects(segment, group):
    a, _b, _c = group(3)
    with Router(segment, seed=1, eject_after=0) as router:
        picked(router)
        serve(a, 100, failed=True)
        judged(router)
        assert picked(router) == {"A", "B", "C"}


def out_for(router):
    """How long A has been out of routing when it comes back, seconds."""
    return wait_until(lambda: not passed_over(router)["A"].startswith("ejected"), 5)


def test_it_comes_back_and_stays_away_twice_as_long_each_time(segment, group):
    a, _b, _c = group(3)
    with Router(segment, seed=1, eject_s=0.15) as router:
        picked(router)
        for wanted in (0.15, 0.3, 0.6):
            serve(a, 5, failed=True)
            wait_until(lambda: passed_over(router)["A"].startswith("ejected"), 2)
            assert wanted - 0.02 < out_for(router) < wanted + 0.1
            assert "A" in picked(router), "what it failed before is forgiven"
        serve(a, 60)  # a good time: it begins anew
        judged(router)
        serve(a, 5, failed=True)
        wait_until(lambda: passed_over(router)["A"].startswith("ejected"), 2)
        assert out_for(router) < 0.25


def test_a_success_takes_forgiveness_back(segment, group):
    """Five new ones in a row are five, whatever was forgiven before."""
    a, _b, _c = group(3)
    with Router(segment, seed=1, eject_s=0.05) as router:
        picked(router)
        serve(a, 50, failed=True)
        wait_until(lambda: passed_over(router)["A"].startswith("ejected"), 2)
        out_for(router)
        judged(router)
        serve(a, 60)
        serve(a, 5, failed=True)
        wait_until(lambda: passed_over(router)["A"].startswith("ejected"), 2)


def mixed(node, count, every):
    """One of `every` requests fails."""
    for index in range(count):
        node.end(node.begin(), failed=index % every == 0)


@pytest.mark.parametrize(
    ("of_a", "of_others", "is_out"),
    [
        (2, 100, True),  # 50 % against 1 %
        (3, 100, True),  # 33 %
        (4, 100, False),  # 25 %
        (2, 4, False),  # 50 % against 25 %
        (2, 10, True),  # 50 % against 10 %
    ],
)
def test_a_rate_above_that_of_the_others_ejects(segment, group, of_a, of_others, is_out):
    a, b, c = group(3)
    with Router(segment, seed=1) as router:
        picked(router)
        mixed(a, 60, of_a)
        mixed(b, 100, of_others)
        mixed(c, 100, of_others)
        judged(router)
        assert ("A" not in picked(router)) == is_out


def test_a_rate_of_few_requests_says_nothing(segment, group):
    a, b, c = group(3)
    with Router(segment, seed=1) as router:
        picked(router)
        serve(b, 50)
        serve(c, 50)
        mixed(a, 18, 2)
        judged(router)
        assert "A" in picked(router)
        mixed(a, 12, 2)
        judged(router)
        assert "A" not in picked(router)


def test_where_all_fail_nobody_is_ejected(segment, group):
    """It is not their fault: perhaps what they all depend on is gone."""
    nodes = group(4)
    with Router(segment, seed=1) as router:
        picked(router)
        for node in nodes:
            serve(node, 40, failed=True)
        judged(router)
        assert picked(router) == {"A", "B", "C", "D"}
        assert not any(why.startswith("ejected") for why in passed_over(router).values())


@pytest.mark.parametrize(("count", "failing", "most"), [(1, 1, 0), (2, 1, 1), (4, 3, 2), (5, 4, 2)])
def test_at_most_half_of_a_group_is_ejected(segment, group, count, failing, most):
    nodes = group(count)
    with Router(segment, seed=1) as router:
        picked(router)
        for node in nodes[failing:]:
            serve(node, 200)
        for node in nodes[:failing]:
            serve(node, 20, failed=True)
        judged(router)
        out = [why for why in passed_over(router).values() if why.startswith("ejected")]
        assert len(out) == most
        assert len(picked(router)) == count - most


def test_acquire_does_not_wait_for_the_clock(segment, group):
    """A node that fails fast is always idle: it would draw all requests until it is judged next."""
    a, b = group(2, interval_s=3600)
    busy = [b.begin() for _ in range(3)]
    went = Counter()
    with Router(segment, seed=1) as router:
        serve(b, 5)
        for _ in range(40):
            with router.acquire("GREEN") as lease:
                went[lease.node] += 1
                if lease.node == "A":
                    a.end(a.adopt(lease.token), failed=True)
    assert went["A"] <= 7
    for handle in busy:
        handle.end()


def test_ejection_outlives_members_that_come_and_go(segment, group):
    a, _b, _c = group(3)
    with Router(segment, seed=1) as router:
        picked(router)
        serve(a, 5, failed=True)
        judged(router)
        assert "A" not in picked(router)
        with segment.join("H", group="GREEN", endpoint="e", interval_s=0.04):
            assert picked(router) == {"B", "C", "H"}
        assert picked(router) == {"B", "C"}
        a.leave()
        again = segment.join("A", group="GREEN", endpoint="e", interval_s=0.04)
        assert "A" in picked(router), "another process under that name has done nothing yet"
        again.leave()


# --- slow start


@pytest.mark.parametrize("policy", ["least-loaded", "random", "power-of-two", "affinity"])
def test_who_starts_slowly_gets_a_tenth_at_first(segment, group, policy):
    group(2)
    with (
        segment.join("new", group="GREEN", endpoint="e", interval_s=0.04, slow_start_s=3600),
        Router(segment, policy=policy, seed=1) as router,
    ):
        shares = {c.node: c.share for c in router.explain("GREEN").candidates}
        assert shares == pytest.approx({"A": 1, "B": 1, "new": 0.1}, abs=0.001)
        counts = Counter(router.pick("GREEN").node for _ in range(6000))
        # Of the third that would be its own it takes a tenth; the rest goes to the others.
        expected = {"new": 1 / 30, "A": 29 / 60, "B": 29 / 60}
        assert chi_square(counts, expected) < chi_square_limit(2)
        taken = Counter()
        for _ in range(3000):
            with router.acquire("GREEN") as lease:
                taken[lease.node] += 1
        assert chi_square(taken, expected) < chi_square_limit(2)


def test_the_share_rises_until_it_is_whole(segment, group):
    group(1)
    with (
        segment.join("new", group="GREEN", endpoint="e", interval_s=0.04, slow_start_s=0.5),
        Router(segment, policy="random", seed=1) as router,
    ):
        began = time.monotonic()

        def share():
            time.sleep(JUDGED_S)
            return {c.node: c.share for c in router.explain("GREEN").candidates}["new"]

        seen = []
        while time.monotonic() - began < 0.45:
            seen.append((time.monotonic() - began + JUDGED_S, share()))
        for at, found in seen:
            assert found == pytest.approx(min(max(at / 0.5, 0.1), 1), abs=0.2)
        assert [found for _, found in seen] == sorted(found for _, found in seen)
        wait_until(lambda: share() == 1, 2)
        counts = Counter(router.pick("GREEN").node for _ in range(2000))
        assert chi_square(counts, ["A", "new"]) < chi_square_limit(1)


def test_a_slow_start_costs_no_capacity(segment, group):
    """Where nobody else has room, those that start slowly are taken all the same."""
    group(1, capacity=2)
    options = {"group": "GREEN", "endpoint": "e", "interval_s": 0.04, "capacity": 3}
    with segment.join("new", slow_start_s=3600, **options), Router(segment, seed=1) as router:
        leases = [router.acquire("GREEN") for _ in range(5)]
        assert Counter(lease.node for lease in leases) == {"A": 2, "new": 3}
        for lease in leases:
            lease.release()
        segment.backend("A")
        with router.acquire("GREEN", exclude=(segment.backend("A"),)) as lease:
            assert lease.node == "new"


def test_explain_says_that_one_starts_slowly(segment, group):
    group(1)
    with (
        segment.join("new", group="GREEN", endpoint="e", interval_s=0.04, slow_start_s=3600),
        Router(segment, seed=1) as router,
    ):
        said = set()
        for _ in range(100):
            with router.acquire("GREEN", explain=True) as lease:
                assert lease.decision.chosen.node == lease.node
                said |= {c.passed_over for c in lease.decision.candidates}
        assert said == {"", "tie", "starting slowly: 10% of its share so far"}


# --- other hosts


@pytest.fixture
def hosts(new_name):
    """`hosts(**options)`: node L of a segment of this host, R of another's, and a router."""
    with contextlib.ExitStack() as stack:
        here, there = (
            stack.enter_context(Segment.open(new_name(), slots=4, leases=8)) for _ in range(2)
        )
        left = here.join("L", group="GREEN", endpoint="e", interval_s=0.04)
        right = there.join("R", group="GREEN", endpoint="e", interval_s=0.04)

        def router(**options):
            return stack.enter_context(Router(here, there, seed=1, **options))

        yield here, there, left, right, router


@pytest.mark.parametrize("policy", ["least-loaded", "power-of-two", "hot-cold"])
@pytest.mark.parametrize(
    ("margin", "table"),
    [
        (1.0, {(0, 0): "L", (1, 0): "LR", (2, 0): "R", (2, 1): "LR", (3, 1): "R", (0, 2): "L"}),
        (3.0, {(0, 0): "L", (2, 0): "L", (3, 0): "LR", (4, 0): "R", (5, 1): "R"}),
        (0.0, {(0, 0): "LR", (1, 0): "R", (0, 1): "L", (1, 1): "LR"}),
    ],
)
def test_nodes_of_this_host_are_preferred_by_the_margin(hosts, policy, margin, table):
    here, _there, left, right, make = hosts
    router = make(policy=policy, local=here.name, remote_margin=margin)
    for (mine, theirs), wanted in table.items():
        left.waiting, right.waiting = mine, theirs
        assert picked(router) == set(wanted), (mine, theirs)


def test_other_hosts_are_there_when_ours_is_not(hosts):
    here, _there, left, _right, make = hosts
    router = make(local=[here.name], remote_margin=1e6)
    assert picked(router) == {"L"}
    assert passed_over(router) == {"L": "", "R": "of another host"}
    left.drain()
    assert picked(router) == {"R"}
    left.resume()
    leases = [router.acquire("GREEN") for _ in range(16)]
    assert Counter(lease.node for lease in leases) == {"L": 8, "R": 8}
    for lease in leases:
        lease.release()


def test_without_local_all_are_alike(hosts):
    *_, make = hosts
    assert picked(make()) == {"L", "R"}


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"local": ["nowhere"]}, ValueError),
        ({"local": [1]}, TypeError),
        ({"remote_margin": -1}, ValueError),
        ({"remote_margin": float("nan")}, ValueError),
        ({"panic_threshold": 1.1}, ValueError),
        ({"eject_after": -1}, ValueError),
        ({"eject_after": 1.5}, TypeError),
        ({"eject_after": True}, TypeError),
        ({"eject_s": 0}, ValueError),
        ({"eject_s": 301}, ValueError),
        ({"hot_quantile": 1.5}, ValueError),
        ({"affinity_bound": 0.9}, ValueError),
        ({"unknown": 1}, TypeError),
        ({"max_waiters": -1}, ValueError),
        ({"max_waiters": 1.0}, TypeError),
    ],
)
def test_wrong_options_are_refused(segment, options, error):
    with pytest.raises(error):
        Router(segment, **options)


# --- panic, suspects, the unreachable


def test_too_few_healthy_ones_are_not_used_alone(segment, group):
    group(6)
    with Router(segment, seed=1) as router:
        for node in "ABCD":
            router.mark_unreachable(segment.backend(node))
        assert picked(router) == {"E", "F"}, "a third is healthy"
        router.mark_unreachable(segment.backend("E"))  # a sixth is below 0.2
        assert picked(router, 200) == set("ABCDEF")
        decision = router.explain("GREEN")
        assert decision.panic
        assert "too few are healthy" in str(decision)
        router.mark_reachable(segment.backend("D"))
        assert picked(router) == {"D", "F"}
        assert not router.explain("GREEN").panic


@pytest.mark.parametrize(
    ("threshold", "marked", "used"),
    [(0.0, 3, "D"), (0.0, 4, "ABCD"), (0.5, 2, "CD"), (0.5, 3, "ABCD"), (1.0, 1, "ABCD")],
)
def test_the_threshold_of_panic(segment, group, threshold, marked, used):
    group(4)
    with Router(segment, seed=1, panic_threshold=threshold) as router:
        for node in "ABCD"[:marked]:
            router.mark_unreachable(segment.backend(node))
        assert picked(router, 200) == set(used)


def test_panic_never_uses_the_dead_and_the_draining(segment, group, spawn_node):
    nodes = group(3)
    dead = spawn_node(segment.name, "X")
    dead.kill()
    nodes[2].drain()
    with Router(segment, seed=1, panic_threshold=1.0) as router:
        router.mark_unreachable(segment.backend("A"))
        assert picked(router, 100) == {"A", "B"}
        assert router.explain("GREEN").panic
        assert passed_over(router)["X"] == "dead"
        assert passed_over(router)["C"] == "draining"


def test_the_unreachable_are_passed_over_for_a_while(segment, group):
    group(2)
    with Router(segment, seed=1) as router:
        picked(router)
        router.mark_unreachable(segment.backend("A"), 0.15)
        assert picked(router) == {"B"}
        assert passed_over(router)["A"] == "could not be reached a moment ago"
        took = wait_until(lambda: "A" in picked(router, 20), 2)
        assert 0.1 < took < 0.3


def test_suspects_are_passed_over_until_they_go_on(segment, group, spawn_node):
    group(1)
    child = spawn_node(segment.name, "S", interval_s=0.03)
    with Router(segment, seed=1) as router:
        assert picked(router) == {"A", "S"}
        child.stop()
        try:
            wait_until(lambda: picked(router, 20) == {"A"}, 2)
            why = passed_over(router)["S"]
            assert why.startswith("suspect: no sign of progress, heartbeat 0.")
            with segment.join("B", group="GREEN", endpoint="e", interval_s=0.04):
                assert picked(router) == {"A", "B"}
        finally:
            child.go_on()
        wait_until(lambda: "S" in picked(router, 20), 2)
        child.kill()
        assert picked(router) == {"A"}
        assert passed_over(router)["S"] == "dead"


def test_reasons_of_the_healthy(segment, group):
    a, b, c = group(3, capacity=2)
    with Router(segment, seed=1) as router:
        b.busy = True
        c.waiting = 2
        assert passed_over(router) == {
            "A": "",
            "B": "busy with work of its own",
            "C": "higher score",
        }
        held = [a.begin() for _ in range(2)]
        b.drain()
        c.waiting = 5
        assert passed_over(router) == {"A": "at capacity", "B": "draining", "C": ""}
        for handle in held:
            handle.end()
        with router.acquire("GREEN", explain=True, exclude=(segment.backend("A"),)) as lease:
            reasons = {one.node: one.passed_over for one in lease.decision.candidates}
            assert reasons == {"A": "excluded", "B": "draining", "C": ""}
        with pytest.raises(NoBackend, match=r"A: excluded.*B: draining.*C: excluded"):
            router.acquire("GREEN", exclude=(segment.backend("A"), segment.backend("C")))


def test_at_most_half_is_ejected_in_whatever_order_they_fail(segment):
    """The ejected of before count, also those that come later in the table."""
    names = "ABCDE"
    nodes = {n: segment.join(n, group="G", endpoint=n, interval_s=0.02) for n in names}
    with Router(segment, eject_s=60) as router:
        for name in reversed(names[1:]):
            for _ in range(6):
                nodes[name].end(nodes[name].begin(), failed=True)
            time.sleep(0.03)
            router.explain("G")
        ejected = [c.node for c in router.explain("G").candidates if "ejected" in c.passed_over]
        assert sorted(ejected) == ["D", "E"]


def test_a_hedge_does_not_go_to_an_ejected_node(segment):
    """It is idle, which is no wonder."""
    nodes = {n: segment.join(n, group="G", endpoint=n, interval_s=0.02) for n in "ABC"}
    with Router(segment, eject_s=60) as router:
        for _ in range(6):
            nodes["C"].end(nodes["C"].begin(), failed=True)
        time.sleep(0.03)
        held = [nodes[n].begin() for n in "AB"]
        with pytest.raises(Saturated, match="is idle"):
            router.acquire("G", idle_only=True)
        held.pop().end()
        with router.acquire("G", idle_only=True) as lease:
            assert lease.node == "B"
        held.pop().end()
