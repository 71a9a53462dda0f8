"""The rules of the policies, against plain Python models of them."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_helpers import chi_square, chi_square_limit, cluster, own_segment, specs_of

from shmcoord import POLICIES, NoBackend, Router, State

MANY = settings(max_examples=60, deadline=None)

nodes_of = st.fixed_dictionaries(
    {
        "group": st.sampled_from(["GREEN", "GREEN", "GREEN", "PINK"]),
        "weight": st.sampled_from([0.25, 0.5, 1.0, 1.0, 2.0, 3.0, 10.0])
        | st.floats(1e-6, 1e6, allow_nan=False),
        "waiting": st.sampled_from([0, 0, 0, 1, 2, 3, 1000]) | st.integers(0, 2**20 - 1),
        "inflight": st.sampled_from([0, 0, 0, 1, 2, 5]),
        "busy": st.booleans(),
        "stored": st.sampled_from(["open"] * 5 + ["draining", "shutdown"]),
    }
)


@pytest.fixture(scope="module")
def segment():
    """One for the whole module: every example leaves with all its nodes."""
    with own_segment("picker") as segment:
        yield segment


def model(specs, group):
    """Names that least-loaded may take: the rule of the documents, word by word."""
    eligible = {
        f"n{index}": SimpleNamespace(**spec)
        for index, spec in enumerate(specs)
        if spec["group"] == group and spec["stored"] == "open"
    }
    idle = {n for n, s in eligible.items() if s.waiting == s.inflight == 0 and not s.busy}
    if idle:
        return idle
    relative = {n: (s.waiting + s.inflight) / s.weight for n, s in eligible.items()}
    least = min(relative.values(), default=0)
    return {n for n, value in relative.items() if math.isclose(value, least, rel_tol=1e-9)}


@MANY
@given(specs=st.lists(nodes_of, max_size=14))
def test_least_loaded_is_the_rule(segment, specs):
    with cluster(segment, specs), Router(segment, seed=1) as router:
        for group in ("GREEN", "PINK", "nobody"):
            allowed = model(specs, group)
            if not allowed:
                with pytest.raises(NoBackend):
                    router.pick(group)
                assert router.explain(group).chosen is None
                continue
            picked = {router.pick(group).node for _ in range(60)}
            assert picked <= allowed
            decision = router.explain(group)
            assert decision.chosen.node in allowed
            with router.acquire(group) as lease:
                assert lease.node in allowed


@MANY
@given(specs=st.lists(nodes_of, min_size=1, max_size=14))
def test_explain_says_all_there_is(segment, specs):
    with cluster(segment, specs), Router(segment, seed=2) as router:
        decision = router.explain("GREEN")
        wanted = [f"n{i}" for i, spec in enumerate(specs) if spec["group"] == "GREEN"]
        assert sorted(c.node for c in decision.candidates) == sorted(wanted)
        allowed = model(specs, "GREEN")
        chosen = [c for c in decision.candidates if not c.passed_over]
        assert [c.node for c in chosen] == ([decision.chosen.node] if allowed else [])
        for candidate in decision.candidates:
            spec = SimpleNamespace(**specs[int(candidate.node[1:])])
            queue = spec.waiting + spec.inflight
            assert (candidate.queue, candidate.weight) == (queue, spec.weight)
            assert math.isclose(candidate.score, queue / spec.weight, rel_tol=1e-9)
            state = {
                "open": State.BUSY if queue or spec.busy else State.IDLE,
                "draining": State.DRAINING,
                "shutdown": State.SHUTDOWN,
            }[spec.stored]
            assert candidate.state == state
            if spec.stored != "open":
                assert candidate.passed_over == spec.stored
            elif candidate.node not in allowed:
                assert candidate.passed_over in ("higher score", "busy with work of its own")
            elif candidate.passed_over:
                assert candidate.passed_over in ("tie", "busy with work of its own")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"waiting": 0}, {"waiting": 1, "weight": 1e6}),  # IDLE before BUSY, whatever the weight
        ({"waiting": 0}, {"busy": True}),
        ({"waiting": 0, "weight": 0.001}, {"busy": True, "weight": 1000}),
        ({"waiting": 3, "weight": 2.0}, {"waiting": 2}),
        ({"waiting": 1, "weight": 65536}, {"waiting": 7, "weight": 65536}),
        ({"waiting": 2, "weight": 1e6}, {"waiting": 3, "weight": 1e6}),
        ({"inflight": 1}, {"waiting": 2}),
        ({"waiting": 2**20 - 2}, {"waiting": 2**20 - 1}),
        ({"busy": True}, {"waiting": 1, "busy": True}),
    ],
)
def test_the_first_before_the_second(segment, first, second):
    specs = specs_of(1, **first) + specs_of(1, **second)
    for turned in (specs, specs[::-1]):
        name = f"n{turned.index(specs[0])}"
        with cluster(segment, turned), Router(segment, seed=3) as router:
            assert {router.pick("GREEN").node for _ in range(50)} == {name}
            assert router.explain("GREEN").chosen.node == name


@pytest.mark.parametrize("weight", [1e300, 1e12, 1e-9, 1e-14, 1e-300, 5e-324])
def test_extreme_weights_are_refused_at_join_or_honoured(segment, weight):
    specs = specs_of(1, waiting=1, weight=weight) + specs_of(1, waiting=2, weight=weight)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(cluster(segment, specs))
        except ValueError:
            return
        router = stack.enter_context(Router(segment, seed=3))
        assert {router.pick("GREEN").node for _ in range(50)} == {"n0"}


# --- ties


@pytest.mark.parametrize("policy", ["least-loaded", "random"])
@pytest.mark.parametrize(
    ("idle", "busy"), [(2, 0), (6, 0), (3, 5), (8, 0), (9, 0), (40, 0), (20, 20), (3, 50)]
)
def test_ties_are_uniform(segment, policy, idle, busy):
    """Also in groups large enough to be drawn from, with some of them busy."""
    mixed = specs_of(idle) + specs_of(busy, waiting=1)
    mixed = mixed[::2] + mixed[1::2]
    names = [f"n{i}" for i, spec in enumerate(mixed) if policy == "random" or spec["waiting"] == 0]
    with cluster(segment, mixed), Router(segment, policy=policy, seed=2024) as router:
        counts = Counter(router.pick("GREEN").node for _ in range(400 * len(names)))
    assert chi_square(counts, names) < chi_square_limit(len(names) - 1)


def test_ties_of_busy_nodes_are_uniform(segment):
    specs = specs_of(12, waiting=2) + specs_of(3, waiting=4, weight=2.0) + specs_of(2, waiting=9)
    with cluster(segment, specs), Router(segment, seed=5) as router:
        counts = Counter(router.pick("GREEN").node for _ in range(6000))
    assert chi_square(counts, [f"n{i}" for i in range(15)]) < chi_square_limit(14)


def test_the_statistic_would_notice():
    """The negative control: a generator that is a little lopsided."""
    lopsided = Counter({"n0": 1300, "n1": 1000, "n2": 1000, "n3": 1000})
    assert chi_square(lopsided, list(lopsided)) > chi_square_limit(3)


def test_the_random_source_is_the_routers_own(segment):
    with cluster(segment, specs_of(20)), Router(segment, seed=7) as first:
        sequence = [first.pick("GREEN").node for _ in range(50)]
        with Router(segment, seed=7) as second:
            assert [second.pick("GREEN").node for _ in range(50)] == sequence
        with Router(segment, seed=8) as other, Router(segment) as free, Router(segment) as free2:
            picks = [[r.pick("GREEN").node for _ in range(50)] for r in (other, free, free2)]
    assert all(a != b for a, b in itertools.combinations([sequence, *picks], 2))


# --- the other policies


def test_round_robin_takes_turns(segment):
    specs = specs_of(3, waiting=5) + specs_of(2)
    specs[1]["stored"] = "draining"
    specs += specs_of(2, group="PINK")
    with cluster(segment, specs) as nodes, Router(segment, policy="round-robin") as router:
        picks = [router.pick("GREEN").node for _ in range(12)]
        assert picks[:4] == picks[4:8] == picks[8:]
        assert sorted(picks[:4]) == ["n0", "n2", "n3", "n4"]
        assert {router.pick("PINK").node for _ in range(2)} == {"n5", "n6"}
        nodes[1].resume()
        assert len({router.pick("GREEN").node for _ in range(5)}) == 5
        leases = [router.acquire("GREEN") for _ in range(10)]
        assert set(Counter(lease.node for lease in leases).values()) == {2}
        # Also when nodes come and go, nobody is served twice before another once.
        before = router.pick("GREEN").node
        nodes[6].leave()
        assert router.pick("GREEN").node != before
        for lease in leases:
            lease.release()


@pytest.mark.parametrize("count", [2, 5])
def test_explain_under_round_robin_is_what_pick_does_next(segment, count):
    """To ask is not to take: however often one asks, the turn stays where it was."""
    with (
        cluster(segment, specs_of(count)),
        Router(segment, policy="round-robin") as router,
    ):
        for _ in range(7):
            first, second = router.explain("GREEN"), router.explain("GREEN")
            assert first.chosen == second.chosen == router.pick("GREEN")
        with router.acquire("GREEN", explain=True) as one:
            assert one.decision.chosen.node == one.node
            with router.acquire("GREEN", explain=True) as two:
                assert two.node != one.node, "an explained acquire is a turn"


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"least-loaded"}))
@MANY
@given(specs=st.lists(nodes_of, min_size=1, max_size=10))
def test_other_policies_take_the_eligible_only(segment, policy, specs):
    with cluster(segment, specs), Router(segment, policy=policy, seed=1) as router:
        eligible = {
            f"n{i}"
            for i, spec in enumerate(specs)
            if spec["group"] == "GREEN" and spec["stored"] == "open"
        }
        if not eligible:
            with pytest.raises(NoBackend):
                router.pick("GREEN")
            return
        picks = {router.pick("GREEN", key=i).node for i in range(len(eligible) * 20)}
        assert picks <= eligible
        alike = len({spec["weight"] for spec in specs}) == 1
        if policy == "round-robin" and alike:
            assert picks == eligible
        assert router.explain("GREEN").chosen.node in eligible


def test_the_table_of_policies_is_what_routers_take(segment):
    assert set(POLICIES) == {
        *("least-loaded", "power-of-two", "hot-cold", "affinity", "round-robin", "random")
    }
    for name, policy in POLICIES.items():
        assert policy.name == name
        assert policy.rule
        assert policy.use
        with Router(segment, policy=name) as router:
            assert router.policy == name
    with Router(segment) as router:
        assert router.policy == "least-loaded"
    with pytest.raises(TypeError):
        POLICIES["new"] = POLICIES["random"]
