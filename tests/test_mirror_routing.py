"""Which node of another host is picked, and what is said of the others."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from helpers import Raw, wait_until
from mirror_helpers import HERE, SUSPECT_S, Pair, wait_for_a_lease
from policy_helpers import chi_square, chi_square_limit

from shmcoord import (
    NoBackend,
    Node,
    Router,
    Saturated,
    Segment,
)
from shmcoord.mirror import Mirror
from shmcoord.origin import Origin


def joined(pair: Pair, count: int, **options: Any) -> list[Node]:
    return [pair.join(f"N{i}", **options) for i in range(count)]


def passed_over(router: Router) -> dict[str, str]:
    return {one.node: one.passed_over for one in router.explain("G").candidates}


def test_two_are_drawn_among_nodes_of_other_hosts(pair: Pair) -> None:
    """The least loaded of six gets what chance gives to one of two: 1 in 3, not everything."""
    nodes = joined(pair, 6)
    for i, node in enumerate(nodes):
        node.waiting = i
    pair.tell()
    with Router(pair.here, seed=7) as router:
        count = Counter(router.pick("G").node for _ in range(6000))
    # Of 15 pairs the least loaded is in 5, the next in 4 more, ..., the last is never the better.
    for i, node in enumerate(nodes):
        assert abs(count[node.name] - 6000 * (5 - i) / 15) < 200


def test_two_of_them_are_compared_as_ours_are(pair: Pair) -> None:
    nodes = joined(pair, 2)
    nodes[0].waiting = 1
    pair.tell()
    with Router(pair.here) as router:
        assert {router.pick("G").node for _ in range(100)} == {"N1"}


def test_ours_come_first_by_the_margin(pair: Pair, name: str) -> None:
    nodes = joined(pair, 4)
    with (
        Segment.open(name) as own,
        own.join("mine", group="G", endpoint="e") as mine,
        Router(own, pair.here, remote_margin=2.0) as router,
    ):
        assert {router.pick("G").node for _ in range(100)} == {"mine"}
        mine.waiting = 1
        assert {router.pick("G").node for _ in range(100)} == {"mine"}
        mine.waiting = 3
        assert {router.pick("G").node for _ in range(400)} == {"N0", "N1", "N2", "N3"}
    assert not any(node.left for node in nodes)


def test_every_place_is_found_though_only_two_are_looked_at(pair: Pair) -> None:
    joined_nodes = joined(pair, 6, capacity=2)
    with Router(pair.here) as router:
        leases = [router.acquire("G") for _ in range(12)]
        assert Counter(lease.node for lease in leases) == {f"N{i}": 2 for i in range(6)}
        with pytest.raises(Saturated):
            router.acquire("G")
        for lease in leases:
            lease.release()
    assert len(joined_nodes) == 6


def test_suspects_of_other_hosts_are_no_reason_for_panic(
    new_name: Callable[[], str], name: str
) -> None:
    """One healthy node of ours, five silent ones: with nodes of ours that would be panic."""
    pair = Pair(new_name(), new_name())
    nodes = joined(pair, 5)
    pair.mirror.suspect()
    with (
        Segment.open(name) as own,
        own.join("mine", group="G", endpoint="e") as mine,
        Router(own, pair.here) as router,
    ):
        mine.waiting = 10
        decision = router.explain("G")
        assert not decision.panic
        assert {router.pick("G").node for _ in range(100)} == {"mine"}
        mine.drain()
        assert router.pick("G").node in {node.name for node in nodes}  # rather them than nobody
    pair.close()


def test_explain_tells_of_other_hosts(pair: Pair, name: str) -> None:
    """Each remark is true of the very draw: explain decides as pick does."""
    nodes = joined(pair, 4, capacity=4)
    nodes[3].waiting = 9
    pair.tell()
    with (
        Segment.open(name) as own,
        own.join("mine", group="G", endpoint="e") as mine,
        Router(own, pair.here, remote_margin=2.0, seed=3) as router,
    ):
        assert passed_over(router) == {
            "mine": "",
            **{f"N{i}": "of another host" for i in range(3)},
            "N3": "higher score",
        }
        mine.waiting = 7
        seen = {tuple(sorted(passed_over(router).items())) for _ in range(300)}
        not_drawn = "of another host, and not one of the two that were drawn"
        for reasons in map(dict, seen):
            [chosen] = [node for node, reason in reasons.items() if not reason]
            assert chosen != "N3", "of two that were drawn it is the worse"
            assert reasons["N3"] == "higher score"
            if chosen == "mine":
                raise AssertionError("two idle ones of another host, or one and N3, are better")
            assert reasons["mine"] == "higher score"
            assert {reasons[node] for node in ("N0", "N1", "N2") if node != chosen} == {"tie"}
        nodes[0].waiting = nodes[1].waiting = 3
        pair.tell()
        seen = {tuple(sorted(passed_over(router).items())) for _ in range(300)}
        assert {dict(one)["N2"] for one in seen} == {"", not_drawn}
        for reasons in map(dict, seen):
            if reasons["N2"] == "":
                assert reasons["N0"] == reasons["N1"] == "higher score"


def test_explain_tells_why_a_remote_node_is_suspect(pair: Pair) -> None:
    nodes = joined(pair, 2)
    with Router(pair.here, seed=3) as router:
        pair.mirror.suspect()
        wait_until(lambda: all("suspect" in w for w in passed_over(router).values() if w))
        [why] = [why for why in passed_over(router).values() if why]
        assert re.fullmatch(
            r"suspect: no news of it for 5\.\d s, or its own host finds it late", why
        )
        nodes[0].drain()
        pair.tell()
        pair.mirror.suspect()
        assert passed_over(router)["N0"] == "draining"


def test_with_no_margin_an_idle_node_is_one_wherever_it_is(pair: Pair, name: str) -> None:
    nodes = joined(pair, 5)
    with (
        Segment.open(name) as own,
        own.join("mine", group="G", endpoint="e") as mine,
        Router(own, pair.here, remote_margin=0.0, seed=11) as router,
    ):
        count = Counter(router.pick("G").node for _ in range(6000))
        # Of the idle ones ours and the two that are drawn tie.
        assert abs(count["mine"] - 2000) < 200
        assert all(abs(count[node.name] - 800) < 150 for node in nodes)
        mine.waiting = 1
        count = Counter(router.pick("G").node for _ in range(6000))
        assert count["mine"] == 0


def test_the_two_are_drawn_among_those_that_can_be_taken(pair: Pair) -> None:
    """Of six two are out of reach and one drains: each of the others is as likely."""
    nodes = joined(pair, 6)
    nodes[2].drain()
    pair.tell()
    with Router(pair.here, seed=5, panic_threshold=0.3) as router:
        for node in ("N0", "N1"):
            router.mark_unreachable(pair.here.backend(node), 60.0)
        count = Counter(router.pick("G").node for _ in range(6000))
        assert chi_square(count, ["N3", "N4", "N5"]) < chi_square_limit(2)
        for node in ("N3", "N4"):
            router.mark_unreachable(pair.here.backend(node), 60.0)
        # One of five that take work: panic, so that all but the draining one are used.
        count = Counter(router.pick("G").node for _ in range(6000))
        assert set(count) == {"N0", "N1", "N3", "N4", "N5"}
        nodes[5].drain()
        pair.tell()
        assert router.pick("G").node in {"N0", "N1", "N3", "N4"}


@pytest.mark.parametrize("count", [1, 2, 3, 9, 40])
def test_a_draw_finds_the_only_one_that_is_open(new_name: Callable[[], str], count: int) -> None:
    with (
        Segment.open(new_name(), slots=64, leases=2) as there,
        Segment.open(new_name(), slots=64, leases=2) as here,
    ):
        nodes = [there.join(f"N{i}", group="G", endpoint="e") for i in range(count)]
        for node in nodes[:-1]:
            node.drain()
        origin, mirror = Origin(there), Mirror(here, HERE, SUSPECT_S)
        mirror.set_members(origin.incarnation, origin.members())
        mirror.apply(origin.entries(full=True), 0)
        with Router(here, seed=1) as router:
            assert {router.pick("G").node for _ in range(50)} == {f"N{count - 1}"}
            leases = [router.acquire("G") for _ in range(2)]
            with pytest.raises(Saturated):
                router.acquire("G")
            for lease in leases:
                lease.release()
            nodes[-1].drain()
            mirror.apply(origin.entries(full=True), 0)
            with pytest.raises(NoBackend, match="draining"):
                router.acquire("G")
        mirror.leave()


def test_saturated_groups_of_two_hosts_wait_for_either(pair: Pair, name: str) -> None:
    """All places of ours and theirs are taken; whoever frees one wakes who waits."""
    theirs = pair.join("theirs", capacity=1)
    with (
        Segment.open(name) as own,
        own.join("mine", group="G", endpoint="e", capacity=1) as mine,
        Router(own, pair.here) as router,
    ):
        held = {lease.node: lease for lease in (router.acquire("G"), router.acquire("G"))}
        assert set(held) == {"mine", "theirs"}
        with pytest.raises(Saturated):
            router.acquire("G")
        for node in ("theirs", "mine"):
            served: list[str] = []
            thread = wait_for_a_lease(router, served)
            segment = pair.here if node == "theirs" else own
            wait_until(lambda at=segment: Raw(at.name).number("sync", "waiters", 4) == 1)
            held.pop(node).release()
            thread.join(10.0)
            assert served == [node]
            held[node] = router.acquire("G")
        for lease in held.values():
            lease.release()
    assert not theirs.left
    assert mine.left


def test_a_node_that_fails_there_is_ejected_here(new_name: Callable[[], str]) -> None:
    """Served and failed are published, so that each host judges by itself."""
    pair = Pair(new_name(), new_name())
    pair.mirror = Mirror(pair.here, HERE, 0.3)
    nodes = joined(pair, 3)
    with Router(pair.here, seed=1, eject_s=60.0) as router:
        assert {router.pick("G").node for _ in range(60)} == {"N0", "N1", "N2"}
        for _ in range(5):
            nodes[0].end(nodes[0].begin(), failed=True)
        pair.tell()

        def ejected() -> bool:
            pair.tell()
            return passed_over(router)["N0"].startswith("ejected for failing")

        wait_until(ejected)
        assert {router.pick("G").node for _ in range(60)} == {"N1", "N2"}
    pair.close()


def test_a_newcomer_there_starts_slowly_here(pair: Pair) -> None:
    """Since it joined there, not since we heard of it."""
    old = pair.join("old", slow_start_s=0.2)
    time.sleep(0.25)
    new = pair.join("new", slow_start_s=3600.0)
    again = Mirror(pair.here, HERE, SUSPECT_S)  # as of a bridge that was started again
    pair.mirror.leave()
    pair.mirror = again
    pair.members()
    pair.tell()
    with Router(pair.here, seed=1) as router:
        shares = {one.node: one.share for one in router.explain("G").candidates}
        assert shares == {"old": 1.0, "new": 0.1}
        count = Counter(router.pick("G").node for _ in range(2000))
        assert count["new"] < 200
    assert not old.left
    assert not new.left
