"""Leases on nodes of other hosts: each request counts once, and capacity holds on this host."""

from __future__ import annotations

import contextlib
import gc
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from helpers import Child, Raw, wait_until
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mirror_helpers import HERE, LEASES, SUSPECT_S, Pair, wait_for_a_lease

from shmcoord import (
    Health,
    LeaseLost,
    LeaseReleased,
    NoBackend,
    Node,
    Router,
    Saturated,
    Segment,
)
from shmcoord.dispatch import Dispatcher, NoneReachable
from shmcoord.mirror import Mirror
from shmcoord.origin import Origin, host_id
from shmcoord.transport import ConnectionLost

# --- shares


def test_our_part_is_ours_alone(pair: Pair) -> None:
    """Each request is counted once, before and after the news of it have come."""
    node = pair.join(capacity=4)
    with Router(pair.here) as router:
        lease = router.acquire("G")
        assert pair.queue() == 1
        request = node.adopt(lease.token)
        pair.tell()
        assert pair.queue() == 1
        theirs = node.request()
        pair.tell()
        assert pair.queue() == 2
        lease.release()
        assert pair.queue() == 1  # at once, though the news still have it
        pair.tell()
        assert pair.queue() == 1
        request.end()
        pair.tell()
        assert pair.queue() == 1
        theirs.end()
        pair.tell()
        assert pair.queue() == 0


def test_load_and_capacity_agree_with_a_model(new_name: Callable[[], str]) -> None:
    """Whatever happens in whatever order, the queue seen here is what was told without our part,
    plus what our routers hold; and no more cells are given than are free of both."""
    pair = Pair(new_name(), new_name())
    node = pair.join(capacity=4)
    router = Router(pair.here)
    elsewhere = host_id("h3")

    # Leases, others and tellings most: what matters is a row that is full.
    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.tuples(st.sampled_from("lllnnftttrabe"), st.integers(1, 3)), max_size=60))
    @example([("l", 1)] * 4 + [("n", 1)] * 2 + [("t", 1), ("r", 1), ("l", 1)])
    def run(steps: list[tuple[str, int]]) -> None:
        leases: list[Any] = []  # of our routers
        ours: list[Any] = []  # adopted ones, running there
        others: list[tuple[Any, int]] = []  # requests of that host, or of a third one
        told: list[int] = []  # their costs, as told last
        for step, cost in steps:
            if step == "l":
                free = 4 - len(leases) - len(told)
                if free > 0:
                    leases.append(router.acquire("G", cost=cost))
                else:
                    with pytest.raises(Saturated):
                        router.acquire("G", cost=cost)
            elif step == "r" and leases:
                assert leases.pop().release() is False
            elif step == "a" and len(ours) < len(leases):
                ours.append(node.adopt(leases[len(ours)].token))
            elif step == "b" and ours:
                ours.pop().end()
            elif step == "n" and len(ours) + len(others) < LEASES:
                others.append((node.request(), 1))
            elif step == "f" and len(ours) + len(others) < LEASES:
                info = pair.there.backend("B").info
                token = (
                    f"2-{pair.origin.incarnation:x}-{info.slot:x}-{info.generation:x}-"
                    f"{elsewhere:x}-{cost:x}"
                )
                others.append((node.adopt(token), cost))
            elif step == "e" and others:
                others.pop(0)[0].end()
            elif step == "t":
                pair.tell()
                told = [cost for _, cost in others]
            assert pair.queue() == sum(told) + sum(lease.cost for lease in leases)
        for lease in leases:
            lease.release()
        for request in (*ours, *(one for one, _ in others)):
            request.end()
        pair.tell()
        assert pair.queue() == 0

    run()
    router.close()
    pair.close()


def test_more_than_the_row_has_is_counted(pair: Pair) -> None:
    node = pair.join(capacity=2)
    with Router(pair.here) as router:
        lease = router.acquire("G")
        running = [node.request() for _ in range(LEASES + 3)]  # more than there are cells
        pair.tell()
        assert pair.queue() == LEASES + 3 + 1
        for request in running:
            request.end()
        pair.tell()
        assert pair.queue() == 1
        lease.release()
    assert pair.queue() == 0


def test_what_stands_above_the_capacity_comes_down(pair: Pair) -> None:
    """Two of ours have the two places; their third stands above, and takes a place that is free."""
    node = pair.join(capacity=2)
    with Router(pair.here) as router:
        ours = [router.acquire("G"), router.acquire("G")]
        theirs = node.request()
        pair.tell()
        assert pair.queue() == 3
        ours.pop().release()
        pair.tell()
        assert pair.queue() == 2
        with pytest.raises(Saturated):
            router.acquire("G")
        ours.pop().release()
        with router.acquire("G"):
            assert pair.queue() == 2
        theirs.end()


def test_who_waits_here_is_woken_by_news(pair: Pair) -> None:
    """By a request of others that has ended, and by a node that takes work again."""
    node = pair.join(capacity=1)
    theirs = node.request()
    pair.tell()
    served: list[str] = []
    with Router(pair.here) as router:
        thread = wait_for_a_lease(router, served)
        wait_until(lambda: Raw(pair.here.name).number("sync", "waiters", 4) == 1)
        theirs.end()
        pair.tell()
        thread.join(10.0)
        assert served == ["B"]

        theirs = node.request()
        pair.tell()
        thread = wait_for_a_lease(router, served)
        wait_until(lambda: Raw(pair.here.name).number("sync", "waiters", 4) == 1)
        node.drain()
        theirs.end()
        pair.tell()
        node.resume()
        pair.tell()
        thread.join(10.0)
        assert served == ["B", "B"]


def test_leases_of_dead_routers_come_back(pair: Pair, spawn: Callable[..., Child]) -> None:
    node = pair.join(capacity=2)
    child = spawn(
        "router = Router(name)\n"
        "leases = [router.acquire('G') for _ in range(2)]\n"
        "say('held')\n"
        "hear()",
        pair.here.name,
    )
    assert child.hear() == "held"
    assert pair.queue() == 2
    child.kill()
    with Router(pair.here) as router, router.acquire("G", timeout_s=5.0):
        pass
    wait_until(lambda: pair.queue() == 0)
    assert not node.left


# --- places owed


@pytest.mark.parametrize("leases", [2, LEASES], ids=["full row", "room above"])
def test_a_place_that_two_hosts_took_is_not_taken_again(
    new_name: Callable[[], str], leases: int
) -> None:
    """Both of ours and both of theirs are in two places. Who frees one must not have it again,
    whether theirs stand above the capacity or find no cell in the row at all."""
    with (
        Segment.open(new_name(), slots=4, leases=leases) as there,
        Segment.open(new_name(), slots=4, leases=leases) as here,
        there.join("B", group="G", endpoint="e", capacity=2) as node,
        Router(here) as router,
    ):
        origin, mirror = Origin(there), Mirror(here, HERE, SUSPECT_S)

        def tell() -> None:
            mirror.apply(origin.entries(full=True), 0)

        mirror.set_members(origin.incarnation, origin.members())
        ours = [router.acquire("G") for _ in range(2)]
        theirs = [node.request() for _ in range(2)]
        tell()
        for _ in range(2):  # before the news and after it
            ours.pop().release()
            for _ in range(2):
                with pytest.raises(Saturated):
                    router.acquire("G")
                tell()
        theirs.pop().end()
        tell()
        with router.acquire("G"), pytest.raises(Saturated):
            router.acquire("G")
        theirs.pop().end()
        tell()
        with router.acquire("G"), router.acquire("G"):
            pass
        assert Raw(here.name).taken() == 0
        mirror.leave()


def test_without_news_a_place_comes_back_all_the_same(pair: Pair) -> None:
    """What is owed is owed to requests that were told of: the rest of the capacity stays ours."""
    node = pair.join(capacity=3)
    with Router(pair.here) as router, node.request():
        ours = [router.acquire("G") for _ in range(3)]
        pair.tell()  # 3 of ours, 1 of theirs; and then nothing is heard any more
        ours.pop().release()
        with pytest.raises(Saturated):
            router.acquire("G")
        ours.pop().release()
        ours.append(router.acquire("G"))  # 2 of ours, 1 of theirs
        with pytest.raises(Saturated):
            router.acquire("G")
        for lease in ours:
            lease.release()


def test_two_hosts_come_down_to_the_capacity(new_name: Callable[[], str]) -> None:
    """Both take all four places at once, unheard of each other, and go on as fast as they can:
    as requests end, no more than four are left."""
    with (
        Segment.open(new_name(), slots=4, leases=16) as there,
        Segment.open(new_name(), slots=4, leases=16) as first,
        Segment.open(new_name(), slots=4, leases=16) as second,
        there.join("B", group="G", endpoint="e", capacity=4) as node,
    ):
        origin = Origin(there)
        hosts = [
            (Mirror(seen, host_id(f"h{i}"), SUSPECT_S), Router(seen), [])
            for i, seen in enumerate((first, second))
        ]
        for mirror, _, _ in hosts:
            mirror.set_members(origin.incarnation, origin.members())
        most = []
        for turn in range(40):
            for mirror, _, _ in hosts:
                if turn:
                    mirror.apply(origin.entries(full=True), 0)
            for _, router, running in hosts:
                if running:
                    lease, request = running.pop(0)
                    request.end()
                    lease.release()
                with contextlib.suppress(Saturated):  # at once, before the next news
                    while True:
                        lease = router.acquire("G")
                        running.append((lease, node.adopt(lease.token)))
            most.append(node.inflight)
        assert most[0] == 8, "they did not know"
        assert max(most[8:]) == 4
        assert min(most) == 4, "no place stays free"
        for mirror, router, running in hosts:
            for lease, request in running:
                request.end()
                lease.release()
            router.close()
            mirror.leave()
        assert node.inflight == 0


def test_who_waits_is_told_when_nothing_is_owed_any_more(pair: Pair) -> None:
    """The freed cell alone is not for him: it was given to others meanwhile. Then they end."""
    node = pair.join(capacity=1)
    served: list[str] = []
    with Router(pair.here) as router, Router(pair.here) as other:
        lease = other.acquire("G")
        theirs = node.request()
        pair.tell()
        thread = wait_for_a_lease(router, served)
        wait_until(lambda: Raw(pair.here.name).number("sync", "waiters", 4) == 1)
        lease.release()
        for _ in range(2):
            time.sleep(0.1)
            assert served == []
            pair.tell()
        theirs.end()
        pair.tell()
        began = time.monotonic()
        thread.join(10.0)
        assert served == ["B"]
        assert time.monotonic() - began < 0.5, "he was not told, and looked by himself"


def test_costs_count_in_the_queue_and_cells_in_the_capacity(pair: Pair) -> None:
    node = pair.join(capacity=4)
    [member] = pair.origin.members()
    theirs = [
        node.adopt(
            f"2-{pair.origin.incarnation:x}-{member.slot:x}-{member.generation:x}-9-{cost:x}"
        )
        for cost in (3, 5, 65535)
    ]
    pair.tell()
    raw, slot = Raw(pair.here.name), pair.here.backend("B").info.slot
    assert pair.queue() == 3 + 5 + 65535
    assert raw.taken() == 3
    assert sum(cell >> 24 & 0xFFFF for cell in raw.cells(slot)) == pair.queue()
    with Router(pair.here) as router, router.acquire("G", cost=7):
        assert pair.queue() == 3 + 5 + 65535 + 7
        with pytest.raises(Saturated):
            router.acquire("G")
        theirs.pop().end()
        pair.tell()
        assert pair.queue() == 3 + 5 + 7
    for request in theirs:
        request.end()
    pair.tell()
    assert (pair.queue(), raw.taken()) == (0, 0)


def test_routers_and_the_bridge_at_once(pair: Pair, spawn: Callable[..., Child]) -> None:
    """Routers of three processes work as fast as they can while the news change all the time."""
    node = pair.join(capacity=3)
    children = [
        spawn(
            "router = Router(name)\n"
            "say('there')\n"
            "while hear() == 'go':\n"
            "    for _ in range(3000):\n"
            "        try:\n"
            "            leases = [router.acquire('G', cost=random.randint(1, 3))]\n"
            "            with contextlib.suppress(Saturated): leases.append(router.acquire('G'))\n"
            "            for lease in leases: lease.release()\n"
            "        except Saturated:\n"
            "            pass\n"
            "    say('done')\n",
            pair.here.name,
        )
        for _ in range(3)
    ]
    for child in children:
        assert child.hear() == "there"
        child.say("go")
    raw, slot = Raw(pair.here.name), pair.here.backend("B").info.slot
    theirs: list[Any] = []
    draw = random.Random(5)
    ended = 0
    until = time.monotonic() + 20.0
    finished = threading.Event()

    def listen() -> None:
        for child in children:
            child.hear()
        finished.set()

    listener = threading.Thread(target=listen)
    listener.start()
    while not finished.is_set():
        assert time.monotonic() < until
        if theirs and draw.random() < 0.5:
            theirs.pop(draw.randrange(len(theirs))).end()
            ended += 1
        elif len(theirs) < 5:
            theirs.append(node.request())
        pair.tell()
        cells = raw.cells(slot)
        reserved = [cell for cell in cells if cell >> 62 == 1]
        assert len(reserved) <= 3
        assert all(cell >> 62 != 1 for cell in cells[3:]), "routers keep below the capacity"
        held = sum(cell >> 62 == 2 for cell in cells)
        assert held <= len(theirs)
    listener.join()
    assert ended > 10
    pair.tell()
    # The word is a hint, which the beat thread's count may once have met in between.
    wait_until(lambda: pair.queue() == len(theirs))
    assert [cell >> 62 for cell in raw.cells(slot) if cell] == [2] * len(theirs)
    for request in theirs:
        request.end()
    pair.tell()
    wait_until(lambda: pair.queue() == 0)
    assert raw.taken() == 0


# --- leases that go away


def test_tokens_name_the_node_there(pair: Pair) -> None:
    node = pair.join(capacity=4)
    with Router(pair.here) as router, router.acquire("G", cost=3) as lease:
        kind, incarnation, slot, generation, host, cost = lease.token.split("-")
        assert kind == "2"
        assert int(incarnation, 16) == pair.origin.incarnation
        info = pair.there.backend("B").info
        assert (int(slot, 16), int(generation, 16)) == (info.slot, info.generation)
        assert (int(host, 16), int(cost, 16)) == (HERE, 3)
        with node.adopt(lease.token):
            assert node.inflight == 3
        with pytest.raises(LeaseLost):
            node.adopt(f"1-{incarnation}-{slot}-{generation}-0-0")


@pytest.mark.parametrize(
    ("part", "value", "why"),
    [
        (1, "1", "another segment"),
        (2, "7", "another node"),
        (3, "ffff", "another node"),
        (4, "0", "no host"),
        (4, "1000000", "no host"),
        (5, "0", "no cost"),
        (5, "10000", "no cost"),
        (5, "", "not a lease token"),
        (0, "3", "not a lease token"),
    ],
)
def test_other_tokens_are_refused(pair: Pair, part: int, value: str, why: str) -> None:
    node = pair.join()
    with Router(pair.here) as router, router.acquire("G") as lease:
        parts = lease.token.split("-")
        parts[part] = value
        with pytest.raises(LeaseLost, match=why):
            node.adopt("-".join(parts))
        assert node.inflight == 0
        assert node.refused == 1


@pytest.mark.parametrize("change", [Node.drain, Node.shutdown], ids=["drain", "shutdown"])
def test_who_takes_no_more_refuses_before_it_begins(
    pair: Pair, change: Callable[[Node], None]
) -> None:
    node = pair.join()
    with Router(pair.here) as router, router.acquire("G") as lease:
        change(node)
        with pytest.raises(LeaseLost, match="no more requests from other hosts"):
            node.adopt(lease.token)
        assert node.inflight == 0


def test_a_release_proves_nothing_across_hosts(pair: Pair) -> None:
    node = pair.join()
    with Router(pair.here) as router:
        lease = router.acquire("G")
        assert lease.release() is False
        with node.adopt(lease.token):  # it is on its way, and nobody can call it back
            assert node.inflight == 1


def test_the_bridge_dies_and_another_takes_over(pair: Pair, spawn: Callable[..., Child]) -> None:
    node = pair.there.join("B", group="G", endpoint="e", capacity=2)
    child = spawn(
        "from shmcoord.mirror import Mirror\nfrom shmcoord.origin import Origin\n"
        "origin = Origin(Segment.attach(sys.argv[2]))\n"
        "mirror = Mirror(Segment.open(name), 5, 5.0)\n"
        "mirror.set_members(origin.incarnation, origin.members())\n"
        "mirror.apply(origin.entries(True), 0)\nsay('shown')\nhear()",
        pair.here.name,
        pair.there.name,
    )
    assert child.hear() == "shown"
    with Router(pair.here) as router:
        lease = router.acquire("G")
        child.kill()
        wait_until(lambda: pair.here.status("B").health is Health.DEAD)
        with pytest.raises(NoBackend):
            router.acquire("G")
        assert pair.members() == []
        pair.tell()
        assert pair.here.status("B").health is Health.ALIVE
        assert pair.queue() == 0
        with router.acquire("G"):
            assert lease.release() is False  # of a time that is over: it frees nothing
            assert pair.queue() == 1
    assert not node.left


def test_a_bridge_killed_at_any_moment_leaves_no_cells(
    pair: Pair, spawn: Callable[..., Child]
) -> None:
    """It dies while it takes, moves and frees cells; routers go on, and the next one takes over."""
    node = pair.there.join("B", group="G", endpoint="e", capacity=3)
    raw, draw = Raw(pair.here.name), random.Random(7)
    with Router(pair.here) as router:
        for _ in range(8):
            child = spawn(
                "from shmcoord.mirror import Mirror\nfrom shmcoord.origin import Origin\n"
                "origin = Origin(Segment.attach(sys.argv[2]))\n"
                "mirror = Mirror(Segment.open(name), 5, 5.0)\n"
                "mirror.set_members(origin.incarnation, origin.members())\n"
                "say('shown')\n"
                "while True: mirror.apply(origin.entries(True), 0)",
                pair.here.name,
                pair.there.name,
            )
            assert child.hear() == "shown"
            ours: list[Any] = []
            theirs: list[Any] = []
            until = time.monotonic() + draw.uniform(0.01, 0.04)
            while time.monotonic() < until:
                with contextlib.suppress(Saturated):
                    ours.append(router.acquire("G"))
                if len(theirs) < 5:
                    theirs.append(node.request())
                if ours and draw.random() < 0.7:
                    ours.pop().release()
                if theirs and draw.random() < 0.4:
                    theirs.pop(draw.randrange(len(theirs))).end()
            child.kill()
            for lease in ours:
                lease.release()
            pair.mirror = Mirror(pair.here, HERE, SUSPECT_S)
            assert pair.members() == []
            pair.tell()
            assert raw.taken() == len(theirs) == pair.queue()
            for request in theirs:
                request.end()
            pair.tell()
            assert raw.taken() == pair.queue() == 0
            with contextlib.ExitStack() as held:
                for _ in range(3):
                    held.enter_context(router.acquire("G"))
                with pytest.raises(Saturated):
                    router.acquire("G")
            pair.mirror.leave()


class _Broken:
    """A transport whose connection breaks once the node has begun."""

    def __init__(self, nodes: dict[str, Node]) -> None:
        self.nodes = nodes
        self.begun: list[str] = []

    def send(self, endpoint: str, method: str, request: Any, *, lease: str, timeout_s: Any) -> Any:
        self.nodes[endpoint].adopt(lease).end()
        self.begun.append(endpoint)
        raise ConnectionLost(endpoint)

    def close(self) -> None:
        pass


@pytest.mark.parametrize(("idempotent", "times"), [((), 1), (("say",), 2)])
def test_what_may_have_begun_elsewhere_is_not_sent_again(
    pair: Pair, idempotent: tuple[str, ...], times: int
) -> None:
    """On one host the lease that is still ours proves that nobody began. Here nothing does."""
    nodes = {f"e{name}": pair.join(name) for name in "BC"}
    with Router(pair.here) as router:
        transport = _Broken(nodes)
        dispatcher = Dispatcher(router, transport, adopts=True, idempotent=idempotent)
        with pytest.raises((ConnectionLost, NoneReachable)):
            dispatcher.call("G", "say", b"x", timeout_s=5.0)
        assert len(transport.begun) == times
    assert Raw(pair.here.name).taken() == 0


def test_a_lease_of_a_router_that_left_is_given_back_once(pair: Pair) -> None:
    node = pair.join(capacity=2)
    with Router(pair.here) as router:
        kept, dropped = router.acquire("G"), router.acquire("G")
        assert pair.queue() == 2
        del dropped
        gc.collect()
        assert pair.queue() == 1
        with kept:
            pass
        assert kept.released
        with pytest.raises(LeaseReleased):
            kept.release()
        kept = router.acquire("G")
    assert pair.queue() == 0
    assert kept.release() is False
    assert node.inflight == 0


def test_the_same_name_again_is_another_node(pair: Pair) -> None:
    """A lease on the former one frees nothing of the new one, and its token is refused."""
    before = pair.join(capacity=2)
    with Router(pair.here) as router:
        lease = router.acquire("G")
        before.leave()
        after = pair.join(capacity=2)
        assert pair.queue() == 0
        with pytest.raises(LeaseLost, match="an earlier process"):
            after.adopt(lease.token)
        with router.acquire("G") as again:
            assert lease.release() is False
            assert pair.queue() == 1
            with after.adopt(again.token):
                pass
    assert Raw(pair.here.name).taken() == 0


def test_a_segment_made_anew_there_is_another(pair: Pair, new_name: Callable[[], str]) -> None:
    former = pair.join()
    with Router(pair.here) as router, Segment.open(new_name(), slots=8, leases=LEASES) as there:
        lease = router.acquire("G")
        node = there.join("B", group="G", endpoint="e")
        origin = Origin(there)
        assert pair.mirror.set_members(origin.incarnation, origin.members()) == []
        pair.mirror.apply(origin.entries(full=True), 0)
        assert pair.queue() == 0
        with pytest.raises(LeaseLost, match="another segment"):
            node.adopt(lease.token)
        assert lease.release() is False
        with node.adopt(router.acquire("G").token):
            pass
    assert not former.left
