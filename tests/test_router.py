"""Routers as their users hold them: groups, segments, reasons, penalties, threads."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter

import pytest
from helpers import Raw, run, wait_until

from shmcoord import (
    Candidate,
    Decision,
    Health,
    NoBackend,
    Router,
    Saturated,
    Segment,
    SegmentForbidden,
    State,
)


@pytest.fixture
def join(segment):
    def call(name, **options):
        return segment.join(name, **{"group": "GREEN", "endpoint": f"host:{name}", **options})

    return call


@pytest.fixture
def router(segment):
    with Router(segment) as router:
        yield router


# --- made and closed


def test_a_router_may_start_before_the_first_node(name):
    with Router(name) as router:
        with pytest.raises(NoBackend, match=f"no node of group 'GREEN' is in {name}"):
            router.pick("GREEN")
        with (
            Segment.open(name) as segment,
            segment.join("B", group="GREEN", endpoint="e") as node,
        ):
            assert router.pick("GREEN").node == "B"
            assert node.state == State.IDLE
        with pytest.raises(NoBackend):
            router.pick("GREEN")


@pytest.mark.parametrize(
    ("arguments", "options", "error"),
    [
        ((), {}, ValueError),
        (("a/b",), {}, ValueError),
        ((3,), {}, TypeError),
        (("NAME", None), {}, TypeError),
        (("NAME", "NAME"), {}, ValueError),
        (("NAME",), {"policy": "fastest"}, ValueError),
        (("NAME",), {"policy": None}, TypeError),
        (("NAME",), {"policy": 3}, TypeError),
        (("NAME",), {"seed": "x"}, TypeError),
        (("NAME",), {"nonsense": 1}, TypeError),
    ],
)
def test_wrong_arguments(name, segment, arguments, options, error):
    arguments = tuple(name if argument == "NAME" else argument for argument in arguments)
    with pytest.raises(error):
        Router(*arguments, **options)


def test_a_segment_that_is_not_ours_is_refused(name, segment):
    os.chmod(f"/dev/shm/{name}", 0o666)
    with pytest.raises(SegmentForbidden):
        Router(name)


@pytest.mark.parametrize("group", [None, 3, b"GREEN", ["GREEN"]])
def test_groups_are_str(router, group):
    for use in (router.pick, router.explain):
        with pytest.raises(TypeError):
            use(group)


def test_a_closed_router_refuses(segment, join):
    node = join("B")
    router = Router(segment)
    lease = router.acquire("GREEN")
    assert not router.closed
    router.close()
    router.close()
    assert router.closed
    assert "closed" in repr(router)
    assert node.inflight == 0
    for use in (
        lambda: router.pick("GREEN"),
        lambda: router.explain("GREEN"),
        lambda: router.acquire("GREEN"),
        lambda: router.acquire("GREEN", timeout_s=1),
        lambda: router.mark_unreachable(lease.backend),
        lambda: router.mark_reachable(lease.backend),
    ):
        with pytest.raises(ValueError, match="closed"):
            use()


def test_a_slot_only_at_the_first_acquire(name, segment, join):
    raw = Raw(name)

    def kinds():
        live = int.from_bytes(raw.read(384, 8), "little")
        return [raw.number("hot", "kind", 4, i) for i in range(8) if live >> i & 1]

    node = join("B")
    with Router(segment) as router:
        router.pick("GREEN")
        router.explain("GREEN")
        assert kinds() == [1]
        router.acquire("GREEN").release()
        router.acquire("GREEN").release()
        assert kinds() == [1, 2]
        assert [status.node for status in segment.snapshot()] == ["B"]
    assert kinds() == [1]
    node.leave()


def test_routers_that_come_and_go_take_no_slots_with_them(segment, join):
    node = join("B")
    for _ in range(40):  # 8 slots
        with Router(segment) as router:
            router.acquire("GREEN").release()
    for _ in range(40):
        Router(segment.name).acquire("GREEN").release()
    assert segment.reap() == 0
    assert node.inflight == 0


# --- who is eligible


def test_the_group_is_honoured(segment, join, router):
    nodes = [join("G1"), join("G2"), join("P1", group="PINK"), join("g", group="green")]
    nodes[0].waiting = nodes[1].waiting = 1000
    assert {router.pick("GREEN").node for _ in range(100)} == {"G1", "G2"}
    assert {router.pick("PINK").node for _ in range(20)} == {"P1"}
    for group in ("GREE", "GREEN ", "", "GREENX"):
        with pytest.raises(NoBackend):
            router.pick(group)
    for _ in range(50):
        with router.acquire("PINK") as lease:
            assert (lease.node, lease.group) == ("P1", "PINK")


def test_members_that_come_and_go_are_seen_at_once(join, router):
    first = join("n0")
    for round_ in range(1, 12):
        second = join(f"n{round_}")
        second.waiting, first.waiting = 0, 1
        assert router.pick("GREEN").node == second.name
        first.leave()
        assert router.pick("GREEN").node == second.name
        first = second
    first.leave()
    with pytest.raises(NoBackend, match="has one joined"):
        router.pick("GREEN")


def test_no_backend_says_why_for_each_node(segment, join, spawn_node, router):
    nodes = [join("draining"), join("shutdown")]
    nodes[0].drain()
    nodes[1].shutdown()
    spawn_node(segment.name, "dead").kill()
    for use in (router.pick, router.acquire):
        with pytest.raises(NoBackend) as caught:
            use("GREEN")
        for why in ("draining: draining", "shutdown: shutdown", "dead: dead"):
            assert why in str(caught.value)
    segment.reap()


def test_weights_share_the_load(join, router):
    nodes = [join("one"), join("three", weight=3.0)]
    leases = [router.acquire("GREEN") for _ in range(16)]
    counts = Counter(lease.node for lease in leases)
    assert 10 <= counts["three"] <= 13
    for lease in leases:
        lease.release()
    assert all(node.inflight == 0 for node in nodes)


def test_reserving_spreads_what_picking_cannot(segment, join, router):
    """Two routers never mistake the same idle process for theirs."""
    nodes = [join(f"n{i}") for i in range(4)]
    with Router(segment) as other:
        for _ in range(30):
            leases = [(router, other)[i % 2].acquire("GREEN") for i in range(4)]
            assert {lease.node for lease in leases} == {"n0", "n1", "n2", "n3"}
            for lease in leases:
                lease.release()
    assert all(node.inflight == 0 for node in nodes)


def test_a_full_node_is_passed_over(segment, join, router):
    small, large = join("small", capacity=1, weight=1000), join("large", capacity=8)
    leases = [router.acquire("GREEN") for _ in range(9)]
    assert Counter(lease.node for lease in leases) == {"small": 1, "large": 8}
    with pytest.raises(Saturated, match=r"small 1/1.*large 8/8"):
        router.acquire("GREEN")
    for lease in leases:
        lease.release()
    assert (small.inflight, large.inflight) == (0, 0)


# --- decisions


def test_the_decision_reads_as_documented(join, router):
    nodes = {name: join(name) for name in "BD"}
    nodes["D"].waiting = 3
    decision = router.explain("GREEN")
    assert str(decision) == (
        "Load-aware routing selected: B for team GREEN\n"
        "  B - State: IDLE, Queue: 0, Score: 0.00\n"
        "  D - State: BUSY, Queue: 3, Score: 3.00 (higher score)"
    )
    assert isinstance(decision, Decision)
    assert (decision.group, decision.policy) == ("GREEN", "least-loaded")
    assert decision.chosen.node == "B"
    first = decision.candidates[0]
    assert isinstance(first, Candidate)
    assert (first.endpoint, first.group, first.capacity) == ("host:B", "GREEN", 16)
    assert first.segment == nodes["B"].segment.name
    assert (first.state, first.health) == (State.IDLE, Health.ALIVE)
    with pytest.raises(AttributeError):
        decision.group = "PINK"


def test_nobody_is_a_decision_too(join, router):
    assert router.explain("GREEN").chosen is None
    assert router.explain("GREEN").candidates == ()
    node = join("B")
    node.drain()
    decision = router.explain("GREEN")
    assert decision.chosen is None
    assert [c.passed_over for c in decision.candidates] == ["draining"]
    assert str(decision).startswith("Load-aware routing selected: nobody for team GREEN")


def test_a_lease_carries_the_decision_that_was_acted_on(segment, join, router):
    nodes = [join("A", capacity=1), join("B", capacity=2)]
    nodes[1].waiting = 5
    for wanted, reasons in [
        ("A", {"A": "", "B": "higher score"}),
        ("B", {"A": "at capacity", "B": ""}),
    ]:
        lease = router.acquire("GREEN", explain=True)
        assert lease.node == wanted
        decision = lease.decision
        assert decision.chosen == lease.backend
        assert {c.node: c.passed_over for c in decision.candidates} == reasons
        # As it was before the reservation, and so it stays.
        assert decision.candidates[0].queue == (0 if wanted == "A" else 1)
        nodes.append(lease)
    nodes[2].release()
    nodes[3].release()


def test_deciding_reserves_nothing(name, segment, join, router):
    join_ = join("B")
    for _ in range(50):
        router.explain("GREEN")
        router.pick("GREEN")
    assert Raw(name).taken() == 0
    assert join_.inflight == 0


# --- penalties


def test_an_unreachable_node_is_passed_over_for_a_time(segment, join, router):
    near, far = join("near"), join("far")
    near.waiting = 100
    backend = router.pick("GREEN")
    assert backend.node == "far"
    began = time.monotonic()
    router.mark_unreachable(backend, for_s=0.2)
    assert {router.pick("GREEN").node for _ in range(50)} == {"near"}
    reasons = {c.node: c.passed_over for c in router.explain("GREEN").candidates}
    assert "reached" in reasons["far"]
    with Router(segment) as other:
        assert other.pick("GREEN").node == "far", "this router only"
    near.drain()
    assert router.pick("GREEN").node == "far", "nobody else is there"
    near.resume()
    wait_until(lambda: router.pick("GREEN").node == "far", 2)
    assert 0.19 <= time.monotonic() - began < 0.6
    router.mark_unreachable(backend, for_s=60)
    assert router.pick("GREEN").node == "near"
    router.mark_reachable(backend)
    assert router.pick("GREEN").node == "far"
    router.mark_reachable(backend)
    far.leave()


def test_an_unreachable_mark_outlives_new_members(join, router):
    near, far = join("near"), join("far")
    near.waiting = 3
    router.mark_unreachable(router.pick("GREEN"), for_s=30)
    newcomer = join("new", group="PINK")  # the epoch moves: tables are built anew
    assert {router.pick("GREEN").node for _ in range(20)} == {"near"}
    newcomer.leave()
    far.leave()
    far = join("far")  # another process of that name has not failed yet
    assert router.pick("GREEN").node == "far"


def test_a_healthy_full_node_is_not_exchanged_for_a_doubtful_one(join, router):
    node, doubtful = join("node", capacity=1), join("doubtful")
    backend = next(c for c in iter(lambda: router.pick("GREEN"), None) if c.node == "doubtful")
    router.mark_unreachable(backend, for_s=30)
    with router.acquire("GREEN") as lease:
        assert lease.node == "node"
        with pytest.raises(Saturated):
            router.acquire("GREEN")
    node.drain()
    with router.acquire("GREEN") as lease:
        assert lease.node == "doubtful"
    assert doubtful.inflight == 0


@pytest.mark.parametrize("policy", ["least-loaded", "round-robin", "random"])
def test_every_policy_heeds_penalties(name, policy):
    with (
        Segment.open(name, slots=16, leases=2) as segment,
        Router(segment, policy=policy) as router,
    ):
        nodes = [segment.join(f"n{i}", group="GREEN", endpoint="e") for i in range(12)]
        bad = {"n0", "n5", "n11"}
        for name in bad:
            router.mark_unreachable(segment.backend(name), for_s=30)
        assert {router.pick("GREEN").node for _ in range(600)} == {n.name for n in nodes} - bad
        for node in nodes:
            if node.name not in bad:
                node.drain()
        assert {router.pick("GREEN").node for _ in range(300)} == bad


def test_a_mark_made_with_another_handles_backend_counts(name, segment, join):
    near, far = join("near"), join("far")
    near.waiting = 100
    with Router(name) as router, Segment.attach(name) as observer:
        for handle in (segment, observer):
            assert handle.backend("far") == router.pick("GREEN")
            router.mark_unreachable(handle.backend("far"), for_s=30)
            assert router.pick("GREEN").node == "near"
            router.mark_reachable(handle.backend("far"))
            assert router.pick("GREEN").node == "far"
    far.leave()


@pytest.mark.parametrize(
    ("backend", "for_s", "error"),
    [
        (None, 1.0, TypeError),
        ("B", 1.0, TypeError),
        ("ours", "x", (TypeError, ValueError)),
        ("ours", None, TypeError),
        ("ours", -1.0, ValueError),
        ("ours", float("nan"), ValueError),
    ],
)
def test_wrong_marks(segment, join, router, backend, for_s, error):
    node = join("B")
    if backend == "ours":
        backend = router.pick("GREEN")
    with pytest.raises(error):
        router.mark_unreachable(backend, for_s=for_s)
    assert router.explain("GREEN").candidates[0].passed_over == ""
    node.leave()


def test_for_ever_is_a_time_too(join, router):
    near, far = join("near"), join("far")
    near.waiting = 1
    backend = router.pick("GREEN")
    for long in (1e9, 1e30, float("inf")):
        try:
            router.mark_unreachable(backend, for_s=long)
        except ValueError:
            continue
        assert router.pick("GREEN").node == "near", long
        router.mark_reachable(backend)
        assert router.pick("GREEN").node == "far"
    far.leave()


# --- several segments, and segments made anew


def test_one_router_over_several_segments(new_name):
    names = [new_name() for _ in range(3)]
    segments = [Segment.open(name, slots=4, leases=4) for name in names]
    nodes = [
        segment.join(f"n{i}", group="GREEN", endpoint=f"e{i}", capacity=2)
        for i, segment in enumerate(segments)
    ]
    with Router(*names) as router:
        assert {router.pick("GREEN").node for _ in range(100)} == {"n0", "n1", "n2"}
        assert {c.segment for c in router.explain("GREEN").candidates} == set(names)
        leases = [router.acquire("GREEN") for _ in range(6)]
        assert Counter(lease.backend.segment for lease in leases) == dict.fromkeys(names, 2)
        with pytest.raises(Saturated):
            router.acquire("GREEN")
        with nodes[1].adopt(next(lease.token for lease in leases if lease.node == "n1")):
            pass
        nodes[0].leave()
        with router.acquire("GREEN") as lease:
            assert lease.node == "n1"
        # One name in two segments: two nodes.
        twin = segments[2].join("n1", group="GREEN", endpoint="twin")
        twin.waiting = nodes[1].waiting = 50
        assert len([c for c in router.explain("GREEN").candidates if c.node == "n1"]) == 2
    for name in names:
        assert Raw(name).taken() == 0
    for segment in segments:
        segment.close()


def test_a_waiter_is_woken_by_a_release_in_any_segment(new_name):
    names = [new_name() for _ in range(2)]
    segments = [Segment.open(name, slots=4, leases=4) for name in names]
    for i, segment in enumerate(segments):
        segment.keep = segment.join(
            f"n{i}", group="GREEN", endpoint="e", capacity=1, interval_s=3600
        )
    with Router(*names) as router, Router(*names) as other:
        leases = {lease.node: lease for lease in (other.acquire("GREEN") for _ in range(2))}
        for node in ("n1", "n0"):
            timer = threading.Timer(0.03, leases[node].release)
            timer.start()
            began = time.monotonic()
            with router.acquire("GREEN", timeout_s=5) as lease:
                assert time.monotonic() - began < 0.2, "woken, not found by the bounded wait"
                assert lease.node == node
            timer.join()
            leases[node] = other.acquire("GREEN")
    for segment in segments:
        segment.close()


@pytest.mark.parametrize("mode", [0o600, 0o660])
def test_a_segment_that_was_made_anew_is_found(name, mode):
    old = Segment.open(name, slots=4, leases=4, mode=mode)
    first = old.join("old", group="GREEN", endpoint="e")
    with Router(old) as router:
        lease = router.acquire("GREEN")
        Segment.unlink(name)
        # Nobody has made it anew: the old one is what there is.
        time.sleep(0.3)
        assert router.pick("GREEN").node == "old"
        with (
            Segment.open(name, slots=4, leases=4, mode=mode) as new,
            new.join("new", group="GREEN", endpoint="e") as second,
        ):
            first.leave()
            wait_until(
                lambda: "new" in [c.node for c in router.explain("GREEN").candidates], 4, 0.02
            )
            with router.acquire("GREEN") as fresh:
                assert fresh.node == "new"
                assert second.inflight == 1
                with second.adopt(fresh.token):
                    pass
            assert lease.release() is False
            assert second.inflight == 0
            with pytest.raises(NoBackend):
                router.pick("old")
            assert Raw(name).taken() == 0
    old.close()


# --- threads


def test_eight_threads_on_one_router(name, segment, join):
    nodes = [join(f"n{i}", capacity=3, interval_s=0.02) for i in range(3)]
    by_name = {node.name: node for node in nodes}
    failures, counts, counting = [], Counter(), threading.Lock()
    with Router(segment) as router:

        def count(what):
            with counting:
                counts[what] += 1

        def work(index):
            try:
                for turn in range(400):
                    timeout_s = 5.0 if turn % 2 else 0.0
                    try:
                        lease = router.acquire("GREEN", timeout_s=timeout_s, explain=turn % 7 == 0)
                    except Saturated:
                        count("full")
                        continue
                    if turn % 3 == 0:
                        with by_name[lease.node].adopt(lease.token):
                            count("adopted")
                        assert lease.release() is False
                    else:
                        assert lease.release() is True
                    count("leases")
                    router.pick("GREEN")
            except BaseException as error:  # noqa: BLE001 - told below
                failures.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for _ in range(30):  # members change under them
            join("passing", group="PINK").leave()
            time.sleep(0.002)
        for thread in threads:
            thread.join()
        assert failures == []
        assert counts["leases"] > 1600
        assert sum(node.served for node in nodes) == counts["adopted"]
        assert Raw(name).taken() == 0
        time.sleep(0.06)
        assert [node.inflight for node in nodes] == [0, 0, 0]
        assert Raw(name).number("sync", "waiters", 4) == 0 or wait_until(
            lambda: Raw(name).number("sync", "waiters", 4) == 0, 2
        )


def test_threads_claim_one_slot_for_their_router(name, segment, join):
    node = join("B")
    for _ in range(10):
        with Router(segment) as router:
            barrier = threading.Barrier(8)

            def work(router=router, barrier=barrier):
                barrier.wait()
                router.acquire("GREEN").release()

            threads = [threading.Thread(target=work) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            live = int.from_bytes(Raw(name).read(384, 8), "little")
            assert bin(live).count("1") == 2
    node.leave()


def test_importing_is_cheap_and_routing_needs_nothing_else(name):
    said = run(
        """
with Segment.open(name) as segment, Router(segment) as router:
    with contextlib.suppress(NoBackend):
        router.pick("GREEN")
    say(*[m for m in ("psutil", "numpy", "grpc", "asyncio", "click", "rich") if m in sys.modules])
""",
        name,
    )
    assert said.strip() == ""


def test_an_excluded_node_is_not_taken_even_when_nobody_else_is_there(segment, name):
    with (
        segment.join("A", group="GREEN", endpoint="a", capacity=1, interval_s=3600),
        segment.join("B", group="GREEN", endpoint="b", capacity=1, interval_s=3600) as b,
        Router(name) as router,
    ):
        b.waiting = 7
        a = segment.backend("A")
        with router.acquire("GREEN", exclude=(a,), explain=True) as lease:
            assert lease.node == "B"
            reasons = {c.node: c.passed_over for c in lease.decision.candidates}
            assert reasons == {"A": "excluded", "B": ""}
            with pytest.raises(Saturated):  # A is free, and no answer
                router.acquire("GREEN", exclude=(a,))
        with pytest.raises(NoBackend, match="A: excluded; B: excluded"):
            router.acquire("GREEN", exclude=(a, segment.backend("B")))
        with router.acquire("GREEN") as lease:  # another call is free to go there
            assert lease.node == "A"


def test_threads_that_acquire_first_at_once_claim_one_slot(name):
    """In a segment with one slot for the router: a second claim would be refused."""
    said = run(
        """
for round_ in range(60):
    with Segment.open(name, slots=2, leases=16) as segment:
        node = segment.join("A", group="G", endpoint="a", interval_s=3600)
        router = Router(name)
        gate = threading.Barrier(6)
        failed = []
        def work():
            gate.wait()
            try:
                router.acquire("G").release()
            except SegmentFull as error:
                failed.append(error)
        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        router.close()
        assert not failed, (round_, failed)
say("fine")
""",
        name,
    )
    assert said.strip() == "fine"
