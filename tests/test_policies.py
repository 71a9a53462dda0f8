"""The policies beside least-loaded, against plain Python models, and what holds for all of them."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import random
from collections import Counter
from types import SimpleNamespace

import pytest
from helpers import wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_helpers import (
    chi_square,
    chi_square_limit,
    cluster,
    own_segment,
    set_latency,
    specs_of,
)

from shmcoord import POLICIES, NoBackend, Router, Saturated

MANY = settings(max_examples=50, deadline=None)
LOAD_AWARE = ["least-loaded", "power-of-two", "hot-cold", "affinity"]

nodes_of = st.fixed_dictionaries(
    {
        "group": st.sampled_from(["GREEN", "GREEN", "GREEN", "PINK"]),
        "weight": st.sampled_from([0.25, 0.5, 1.0, 1.0, 1.0, 2.0, 3.0, 10.0]),
        "waiting": st.sampled_from([0, 0, 0, 1, 2, 3, 1000]),
        "inflight": st.sampled_from([0, 0, 0, 1, 2, 5]),
        "busy": st.sampled_from([False, False, True]),
        "stored": st.sampled_from(["open"] * 5 + ["draining", "shutdown"]),
        "capacity": st.sampled_from([5, 5, 5, 6, 16]),
        "latency_us": st.sampled_from([0, 0, 100, 100, 5000, 2_000_000]),
    }
)


@pytest.fixture(scope="module")
def segment():
    """One for the whole module: every example leaves with all its nodes."""
    with own_segment("policies", leases=256) as segment:
        yield segment


def eligible(specs, group="GREEN"):
    """The open nodes of a group as a policy sees them: tier, score, inverse weight."""
    mine = [
        SimpleNamespace(**spec, name=f"n{index}")
        for index, spec in enumerate(specs)
        if spec["group"] == group
    ]
    capacities = [node.capacity for node in mine]
    for node in mine:
        # Relative to the capacity, since every node of the group states one.
        node.inverse = 1.0 / node.weight
        node.inverse *= sum(capacities) / len(mine) / node.capacity
        node.queue = node.waiting + node.inflight
        node.score = node.queue * node.inverse
        node.full = node.inflight >= node.capacity
        node.tier = 2 if node.full else int(node.queue > 0 or node.busy)
    return [node for node in mine if node.stored == "open"]


def best(nodes, key):
    """Names of those that are best by the key; what is equal but for rounding counts."""
    least = min((key(node) for node in nodes), default=None)
    return {
        node.name
        for node in nodes
        if all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(key(node), least, strict=True))
    }


# --- power-of-two


def model_power_of_two(specs):
    """Each node's chance: every pair is as likely, the better wins, a tie is even."""
    nodes = eligible(specs)
    if len(nodes) == 1:
        return {nodes[0].name: 1.0}
    chance = Counter()
    pairs = list(itertools.combinations(nodes, 2))
    for pair in pairs:
        winners = best(pair, lambda node: (node.tier, node.score))
        for name in winners:
            chance[name] += 1 / len(winners) / len(pairs)
    return dict(chance)


@settings(max_examples=25, deadline=None)
@given(specs=st.lists(nodes_of, max_size=14))
def test_power_of_two_is_the_rule(segment, specs):
    with cluster(segment, specs), Router(segment, policy="power-of-two", seed=1) as router:
        chance = model_power_of_two(specs)
        if not chance:
            with pytest.raises(NoBackend):
                router.pick("GREEN")
            return
        counts = Counter(router.pick("GREEN").node for _ in range(1500))
        assert set(counts) <= set(chance)
        assert chi_square(counts, chance) < chi_square_limit(max(len(chance) - 1, 1)) + 1e-9


def test_power_of_two_in_a_large_group_is_the_rule(segment):
    specs = [one for i in range(40) for one in specs_of(1, waiting=i % 4, capacity=16)]
    with cluster(segment, specs), Router(segment, policy="power-of-two", seed=2) as router:
        chance = model_power_of_two(specs)
        counts = Counter(router.pick("GREEN").node for _ in range(20_000))
    assert chi_square(counts, chance) < chi_square_limit(len(chance) - 1)


def test_the_statistic_would_notice_one_choice(segment):
    """The negative control: `random` is not taken for two choices."""
    specs = [one for i in range(6) for one in specs_of(1, waiting=i % 3, capacity=16)]
    with cluster(segment, specs), Router(segment, policy="random", seed=2) as router:
        counts = Counter(router.pick("GREEN").node for _ in range(1500))
    chance = {**dict.fromkeys(counts, 1e-9), **model_power_of_two(specs)}
    assert chi_square(counts, chance) > chi_square_limit(len(counts) - 1)


# --- hot-cold


def model_hot_cold(specs, quantile):
    """Names that may be taken."""
    nodes = eligible(specs)
    if not nodes:
        return set()
    loads = sorted(node.score for node in nodes)
    limit = loads[int(quantile * (len(nodes) - 1))]
    cold = [node for node in nodes if node.score <= limit and not node.full]
    if cold:
        return best(
            cold, lambda node: (node.tier, node.latency_us * (node.score + 1.0), node.score)
        )
    return best(nodes, lambda node: (node.tier, node.score))


@MANY
@given(
    specs=st.lists(nodes_of, max_size=14),
    quantile=st.sampled_from([0.0, 0.3, 0.5, 0.84, 1.0]),
)
def test_hot_cold_is_the_rule(segment, specs, quantile):
    with (
        cluster(segment, specs),
        Router(segment, policy="hot-cold", seed=1, hot_quantile=quantile) as router,
    ):
        allowed = model_hot_cold(specs, quantile)
        if not allowed:
            with pytest.raises(NoBackend):
                router.pick("GREEN")
            return
        assert {router.pick("GREEN").node for _ in range(60)} <= allowed
        assert router.explain("GREEN").chosen.node in allowed


def test_hot_cold_takes_the_fast_one_until_it_is_hot(segment):
    specs = specs_of(5, waiting=2, capacity=16, latency_us=10_000)
    specs[3]["latency_us"] = 1_000
    with cluster(segment, specs) as nodes, Router(segment, policy="hot-cold", seed=1) as router:
        assert {router.pick("GREEN").node for _ in range(50)} == {"n3"}
        nodes[3].waiting = 4  # 5 ms expected of it against 30 ms, but above the quantile
        assert "n3" not in {router.pick("GREEN").node for _ in range(50)}
        assert {c.node: c.passed_over for c in router.explain("GREEN").candidates}["n3"] == "hot"
        with Router(segment, policy="hot-cold", seed=1, hot_quantile=1.0) as bold:
            assert {bold.pick("GREEN").node for _ in range(50)} == {"n3"}


# --- affinity


def shmc_mix(x):
    mask = 2**64 - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def shmc_hash(text):
    h = 0xCBF29CE484222325
    for byte in text.encode():
        h = ((h ^ byte) * 0x100000001B3) & (2**64 - 1)
    return shmc_mix(h) or 1


def model_affinity(specs, key, bound):
    """The node for a key."""
    nodes = eligible(specs)
    if not nodes:
        return None
    queued = sum(node.queue for node in nodes)
    weights = sum(1 / node.inverse for node in nodes)

    def rendezvous(node):
        unit = ((shmc_mix(shmc_hash(key) ^ shmc_hash(node.name)) >> 11) + 0.5) / 2**53
        return -1 / (node.inverse * math.log(unit))

    order = sorted(nodes, key=rendezvous, reverse=True)
    for node in order:
        share = bound * (queued + 1) / (weights * node.inverse)  # rounded as the picker rounds
        if not node.full and (node.queue == 0 or node.queue + 1 <= math.ceil(share)):
            return node.name
    return next((node.name for node in order if not node.full), order[0].name)


@MANY
@given(
    specs=st.lists(nodes_of, max_size=12),
    bound=st.sampled_from([1.0, 1.25, 3.0, 1e6]),
)
def test_affinity_is_the_rule(segment, specs, bound):
    with (
        cluster(segment, specs),
        Router(segment, policy="affinity", seed=1, affinity_bound=bound) as router,
    ):
        for key in ("", "a", "key 7", "öl"):
            wanted = model_affinity(specs, key, bound)
            if wanted is None:
                with pytest.raises(NoBackend):
                    router.pick("GREEN", key=key)
            else:
                assert router.pick("GREEN", key=key).node == wanted
                assert router.explain("GREEN", key=key).chosen.node == wanted


def test_the_same_key_is_the_same_node_in_every_process(segment, spawn):
    keys = [f"key {i}" for i in range(60)]
    with cluster(segment, specs_of(7)):
        children = [
            spawn(
                """
router = Router(name, policy="affinity")
say(json.dumps([router.pick("GREEN", key=key).node for key in json.loads(hear())]))
""",
                segment.name,
            )
            for _ in range(3)
        ]
        for child in children:
            child.say(json.dumps(keys))
        answers = [json.loads(child.hear()) for child in children]
        with Router(segment, policy="affinity") as router:
            mine = [router.pick("GREEN", key=key).node for key in keys]
            same = [router.pick("GREEN", key=key.encode()).node for key in keys]
    assert answers == [mine] * 3
    assert same == mine
    assert len(set(mine)) == 7


def test_keys_move_only_when_they_must(segment):
    keys = range(2000)

    def homes(router):
        return {key: router.pick("GREEN", key=key).node for key in keys}

    with Router(segment, policy="affinity") as router, cluster(segment, specs_of(6)) as nodes:
        six = homes(router)
        assert chi_square(Counter(six.values()), [f"n{i}" for i in range(6)]) < (
            chi_square_limit(5)
        )
        nodes[2].leave()
        five = homes(router)
        assert {key for key in keys if five[key] != six[key]} == {
            key for key in keys if six[key] == "n2"
        }
        with segment.join("n9", group="GREEN", endpoint="e", interval_s=600) as joined:
            after = homes(router)
            moved = {key for key in keys if after[key] != five[key]}
            assert {after[key] for key in moved} == {"n9"}
            assert len(moved) == pytest.approx(len(keys) / 6, rel=0.25)
            joined.drain()  # as good as gone
            assert homes(router) == five


def test_weights_move_keys_in_proportion(segment):
    specs = specs_of(3)
    for spec, weight in zip(specs, (1.0, 2.0, 5.0), strict=True):
        spec["weight"] = weight
    with cluster(segment, specs), Router(segment, policy="affinity") as router:
        counts = Counter(router.pick("GREEN", key=key).node for key in range(4000))
    assert chi_square(counts, {"n0": 1, "n1": 2, "n2": 5}) < chi_square_limit(2)


def test_the_bound_of_affinity_holds(segment):
    """All requests have one key: its node gets at most 1.25 times its share, and the rest spill in
    the order of the key."""
    with cluster(segment, specs_of(5)), Router(segment, policy="affinity") as router:
        home = router.pick("GREEN", key="hot").node
        leases, counts = [], Counter()
        for total in range(100):
            lease = router.acquire("GREEN", key="hot")
            leases.append(lease)
            counts[lease.node] += 1
            assert max(counts.values()) <= math.ceil(1.25 * (total + 1) / 5)
        assert counts[home] == max(counts.values()) == 25
        # Full up to the bound in the order of the key: the last one has what is left.
        assert sorted(counts.values()) == [25, 25, 25, 25]
        passed = {c.node: c.passed_over for c in router.explain("GREEN", key="hot").candidates}
        assert passed[home] in ("above its bound", "")
        for lease in leases:
            lease.release()
        assert router.pick("GREEN", key="hot").node == home


def test_affinity_without_a_key_is_least_loaded(segment):
    specs = specs_of(4, waiting=3)
    specs[1]["waiting"] = 1
    with cluster(segment, specs), Router(segment, policy="affinity") as router:
        assert {router.pick("GREEN").node for _ in range(40)} == {"n1"}


# --- round-robin and random


@MANY
@given(weights=st.lists(st.sampled_from([0.5, 1.0, 1.0, 2.0, 3.0, 7.0]), min_size=1, max_size=9))
def test_round_robin_keeps_everybody_close_to_his_share(segment, weights):
    """At every moment, not only in the end: bursts to one node are what it is there to avoid."""
    specs = specs_of(len(weights))
    for spec, weight in zip(specs, weights, strict=True):
        spec["weight"] = weight
    with cluster(segment, specs), Router(segment, policy="round-robin", seed=1) as router:
        counts = Counter()
        for picks in range(1, 201):
            counts[router.pick("GREEN").node] += 1
            for index, weight in enumerate(weights):
                assert abs(counts[f"n{index}"] - picks * weight / sum(weights)) < 3


def test_random_is_weighted(segment):
    specs = specs_of(4)
    chance = {"n0": 1.0, "n1": 0.5, "n2": 4.0, "n3": 2.5}
    for spec, weight in zip(specs, chance.values(), strict=True):
        spec["weight"] = weight
    with cluster(segment, specs), Router(segment, policy="random", seed=3) as router:
        counts = Counter(router.pick("GREEN").node for _ in range(4000))
    assert chi_square(counts, chance) < chi_square_limit(3)


# --- what holds for all


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("count", [2, 6, 12, 40])
def test_nobody_is_favoured_for_name_or_slot(segment, policy, count):
    """All alike and idle: each is as likely, whatever it is called and wherever it stands."""
    specs = specs_of(count)
    names = [f"{'abcdefgh'[i % 8]}{i}" for i in range(count)]
    random.Random(4).shuffle(names)
    for spec, name in zip(specs, names, strict=True):
        spec["name"] = name
    with cluster(segment, specs):
        if policy == "round-robin":  # its first pick; then it takes turns
            counts = Counter()
            for seed in range(40 * count):
                with Router(segment, policy=policy, seed=seed) as router:
                    counts[router.pick("GREEN").node] += 1
        else:
            with Router(segment, policy=policy, seed=7) as router:
                counts = Counter(router.pick("GREEN").node for _ in range(200 * count))
    assert chi_square(counts, names) < chi_square_limit(count - 1)


@pytest.mark.parametrize("policy", LOAD_AWARE)
def test_ties_of_busy_nodes_are_uniform(segment, policy):
    specs = specs_of(10, waiting=2, latency_us=700) + specs_of(3, waiting=9, latency_us=700)
    with cluster(segment, specs), Router(segment, policy=policy, seed=5) as router:
        counts = Counter(router.pick("GREEN").node for _ in range(4000))
    if policy == "power-of-two":
        for name in ("n10", "n11", "n12"):
            counts.pop(name, None)
    assert chi_square(counts, [f"n{i}" for i in range(10)]) < chi_square_limit(9)


@pytest.mark.parametrize(
    ("policy", "tolerance"),
    [
        *(("least-loaded", 1), ("hot-cold", 1), ("round-robin", 2), ("power-of-two", 6)),
        *(("affinity", 25), ("random", 28)),
    ],
)
def test_weights_are_honoured(segment, policy, tolerance):
    """180 requests that stay: equal weights would give 60 to each."""
    specs = specs_of(3)
    for spec, weight in zip(specs, (1.0, 2.0, 3.0), strict=True):
        spec["weight"] = weight
    with cluster(segment, specs), Router(segment, policy=policy, seed=1) as router:
        leases = [router.acquire("GREEN", key=i) for i in range(180)]
        counts = Counter(lease.node for lease in leases)
        for lease in leases:
            lease.release()
    for name, wanted in (("n0", 30), ("n1", 60), ("n2", 90)):
        assert abs(counts[name] - wanted) <= tolerance, counts


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_capacity_is_filled_to_the_last_and_no_further(segment, policy):
    specs = specs_of(3)
    for spec, capacity in zip(specs, (1, 2, 4), strict=True):
        spec["capacity"] = capacity
    with cluster(segment, specs), Router(segment, policy=policy, seed=1) as router:
        for _ in range(20):
            leases = [router.acquire("GREEN", key="k") for _ in range(7)]
            assert Counter(lease.node for lease in leases) == {"n0": 1, "n1": 2, "n2": 4}
            with pytest.raises(Saturated):
                router.acquire("GREEN", key="k")
            for lease in leases:
                lease.release()


@pytest.mark.parametrize("policy", LOAD_AWARE)
def test_full_nodes_come_last(segment, policy):
    """Their score may be as good as it will."""
    specs = specs_of(2, weight=100.0, capacity=1, inflight=1) + specs_of(2, waiting=9, capacity=4)
    with cluster(segment, specs) as nodes, Router(segment, policy=policy, seed=1) as router:
        picks = {router.pick("GREEN", key=i).node for i in range(60)}
        # Two choices know only two nodes: both may be full.
        assert picks <= ({"n0", "n1", "n2", "n3"} if policy == "power-of-two" else {"n2", "n3"})
        nodes[2].drain()
        nodes[3].drain()
        assert router.pick("GREEN", key=1).node in ("n0", "n1")


@pytest.mark.parametrize("policy", LOAD_AWARE)
def test_load_is_relative_to_capacity_where_all_state_one(segment, policy):
    """5 of 10 is less than 3 of 4; where one states none, 3 is less than 5."""
    specs = specs_of(1, inflight=5, capacity=10) + specs_of(1, inflight=3, capacity=4)
    with cluster(segment, specs), Router(segment, policy=policy, seed=1) as router:
        scores = {c.node: c.score for c in router.explain("GREEN").candidates}
        assert scores == pytest.approx({"n0": 5 * 7 / 10, "n1": 3 * 7 / 4})
        assert {router.pick("GREEN").node for _ in range(30)} == {"n0"}
        with segment.join("n2", group="GREEN", endpoint="e", interval_s=600) as third:
            third.drain()
            assert {router.pick("GREEN").node for _ in range(30)} == {"n1"}


@pytest.mark.parametrize("policy", LOAD_AWARE)
def test_a_dear_request_counts_for_what_it_costs(segment, policy):
    with (
        cluster(segment, specs_of(2)),
        Router(segment, policy=policy, seed=1) as router,
        router.acquire("GREEN", cost=50) as dear,
    ):
        leases = [router.acquire("GREEN") for _ in range(20)]
        assert dear.node not in {lease.node for lease in leases}
        for lease in leases:
            lease.release()


# --- policies in Python


def test_a_python_policy_sees_the_view(segment):
    views = []

    def longest(view):
        views.append(view)
        return max(view.candidates, key=lambda one: one.queue)

    specs = specs_of(3)
    specs[1].update(waiting=4, latency_us=1500)
    specs += specs_of(1, waiting=9, stored="draining") + specs_of(1, group="PINK")
    with cluster(segment, specs), Router(segment, policy=longest) as router:
        assert router.policy == "longest"
        assert router.pick("GREEN").node == "n1"
        assert router.pick("GREEN", key="k").node == "n1"
        with router.acquire("GREEN", cost=7) as lease:
            assert lease.node == "n1"
        decision = router.explain("GREEN")
        assert decision.policy == "longest"
        assert decision.chosen.node == "n1"
        assert {c.node: c.passed_over for c in decision.candidates}["n3"] == "draining"
    assert [(one.key, one.cost) for one in views] == [
        *((0, 1), (shmc_hash("k"), 1), (0, 7), (0, 1)),
    ]
    for view in views:
        assert {one.node for one in view.candidates} == {"n0", "n1", "n2"}
        busy = next(one for one in view.candidates if one.node == "n1")
        assert (busy.queue, busy.latency_s, busy.weight) == (4, 0.0015, 1.0)


def test_a_python_policy_is_not_offered_the_full_one_again(segment):
    offered = []

    def first(view):
        offered.append([one.node for one in view.candidates])
        return view.candidates[0]

    specs = specs_of(2, capacity=1)
    with cluster(segment, specs) as nodes, Router(segment, policy=first) as router:
        one = router.acquire("GREEN")
        other = router.acquire("GREEN")
        assert {one.node, other.node} == {"n0", "n1"}
        assert [len(names) for names in offered] == [2, 2, 1]
        with pytest.raises(Saturated):
            router.acquire("GREEN")
        one.release()
        backend = router.pick("GREEN")
        offered.clear()
        other.release()
        with router.acquire("GREEN", exclude=(backend,)) as lease:
            assert lease.node != backend.node
        assert offered == [[lease.node]]
        router.mark_unreachable(backend)
        offered.clear()
        router.pick("GREEN")
        assert offered == [[lease.node]], "the penalised are offered only where nobody else is"
        for node in nodes:
            node.drain()
        offered.clear()
        with pytest.raises(NoBackend):
            router.pick("GREEN")
        assert offered == [], "never asked with nobody to take"


def test_a_python_policy_may_refuse(segment):
    with cluster(segment, specs_of(2)), Router(segment, policy=lambda view: None) as router:
        with pytest.raises(NoBackend):
            router.pick("GREEN")
        with pytest.raises(NoBackend):
            router.acquire("GREEN", timeout_s=1)
        assert router.explain("GREEN").chosen is None


@pytest.mark.parametrize("foreign", ["n0", 0, object()])
def test_a_python_policy_must_return_what_it_was_given(segment, foreign):
    with cluster(segment, specs_of(2)), Router(segment, policy=lambda view: foreign) as router:
        for ask in (router.pick, router.acquire, router.explain):
            with pytest.raises(ValueError, match=r"one of view\.candidates"):
                ask("GREEN")


def test_a_python_policy_that_raises_leaks_nothing(segment):
    fail = True

    def broken(view):
        if fail:
            raise ZeroDivisionError("mine")
        return view.candidates[0]

    with cluster(segment, specs_of(2, capacity=1)), Router(segment, policy=broken) as router:
        for ask in (router.pick, router.acquire, router.explain):
            with pytest.raises(ZeroDivisionError, match="mine"):
                ask("GREEN")
        fail = False
        leases = [router.acquire("GREEN") for _ in range(2)]
        fail = True
        with pytest.raises(ZeroDivisionError, match="mine"):
            router.acquire("GREEN", timeout_s=1)
        for lease in leases:
            lease.release()
        fail = False
        leases = [router.acquire("GREEN") for _ in range(2)]
        for lease in leases:
            lease.release()


def test_a_python_policys_chance_is_the_routers(segment):
    def any_one(view):
        return view.candidates[int(view.random() * len(view.candidates))]

    def picks(seed):
        with Router(segment, policy=any_one, seed=seed) as router:
            return [router.pick("GREEN").node for _ in range(400)]

    with cluster(segment, specs_of(5)):
        assert picks(7) == picks(7)
        assert picks(7) != picks(8)
        assert chi_square(Counter(picks(9)), [f"n{i}" for i in range(5)]) < chi_square_limit(4)


def test_what_is_no_policy_is_refused(segment):
    with pytest.raises(ValueError, match="no policy 'best'"):
        Router(segment, policy="best")
    for wrong in (None, 7, object()):
        with pytest.raises(TypeError):
            Router(segment, policy=wrong)
    with (
        cluster(segment, specs_of(1)),
        Router(segment, policy="affinity") as router,
        contextlib.suppress(NoBackend),
    ):
        for key in (1.5, True, object(), ("a",)):
            with pytest.raises(TypeError, match="key"):
                router.pick("GREEN", key=key)


def test_latency_that_nobody_renews_is_forgotten(segment):
    """A node that was slow once is tried again: what policies see of it halves with each beat."""
    node = segment.join("n0", group="GREEN", endpoint="e", interval_s=0.02)
    with node, Router(segment) as router:
        set_latency(segment, node, 1_000_000)

        def latency():
            return router.explain("GREEN").candidates[0].latency_s

        wait_until(lambda: latency() < 0.001, 5)


def test_latency_stands_while_a_request_is_in_flight(segment):
    """Who works is not idle for being avoided: how long new callers would wait is told by it."""
    node = segment.join("n0", group="GREEN", endpoint="e", interval_s=3600)
    with node, Router(segment) as router:
        set_latency(segment, node, 1_000_000)
        request = node.begin()
        for _ in range(5):
            node.refresh()
        assert router.explain("GREEN").candidates[0].latency_s == 1.0
        request.end()
        set_latency(segment, node, 1_000_000)
        for _ in range(5):
            node.refresh()
        assert router.explain("GREEN").candidates[0].latency_s < 0.2
