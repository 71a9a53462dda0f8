"""Bridges of several hosts, within one process."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import pytest

pytest.importorskip("msgspec", reason="the extra `bridge` is not installed")

import msgspec
from bridge_helpers import SUSPECT_S, World, until, world
from helpers import Child

import shmcoord
from shmcoord import LeaseLost, Router, Segment, State
from shmcoord.bridge.frame import decode, encode


def test_a_node_is_seen_on_the_other_host_and_its_load(name: str) -> None:
    with world(name, "h1", "h2") as hosts:
        with hosts.segments["h2"].join(
            "C", group="GREEN", endpoint="10.0.0.2:1", capacity=4, gauges=("kv",), weight=2.0
        ) as node:
            took = until(lambda: hosts.alive("h1", "h2") == {"C"}, "C is shown")
            assert took < 1.0  # a new node is told of at once, not with the next full frame
            node.publish(kv=0.5)
            with node.request():
                until(lambda: hosts.seen("h1", "h2")["C"][1] == 1, "its request is seen")
            until(lambda: hosts.seen("h1", "h2")["C"][1] == 0, "its end is seen")
            with Segment.attach(hosts.mirror("h1", "h2")) as mirror:
                status = mirror.status("C")
                assert status.gauges == {"kv": 0.5}
                assert (status.group, status.endpoint) == ("GREEN", "10.0.0.2:1")
                assert (status.capacity, status.weight, status.served) == (4, 2.0, 1)
                assert status.heartbeat_age_s < SUSPECT_S
            node.drain()
            took = until(lambda: _state(hosts, "C") is State.DRAINING, "it drains")
            assert took < 0.5
        until(lambda: not hosts.seen("h1", "h2"), "it is gone")
        assert hosts.seen("h2", "h1") == {}


def _state(hosts: World, node: str) -> State:
    with Segment.attach(hosts.mirror("h1", "h2")) as mirror:
        return mirror.status(node).state


def test_a_request_is_reserved_here_and_counted_there(name: str) -> None:
    """Both hosts see each request once: the own ones by the lease, the others' by the news."""
    with (
        world(name, "h1", "h2") as hosts,
        hosts.segments["h2"].join("C", group="G", endpoint="e", capacity=4) as node,
    ):
        until(lambda: hosts.alive("h1", "h2") == {"C"}, "C is shown")
        with Router(hosts.mirror("h1", "h2")) as router:
            lease = router.acquire("G")
            assert hosts.seen("h1", "h2")["C"][1] == 1
            with node.adopt(lease.token), node.request():
                assert hosts.segments["h2"].status("C").queue == 2
                until(lambda: hosts.seen("h1", "h2")["C"][1] == 2, "the other's request is seen")
                time.sleep(0.15)  # some frames
                assert hosts.seen("h1", "h2")["C"][1] == 2
                assert lease.release() is False  # nobody here can tell what it has begun
                assert hosts.seen("h1", "h2")["C"][1] == 1
            until(lambda: hosts.seen("h1", "h2")["C"][1] == 0, "all have ended")
            lease = router.acquire("G")
            node.drain()
            with pytest.raises(LeaseLost, match="no more"):
                node.adopt(lease.token)


def test_the_capacity_of_a_node_is_shared(name: str) -> None:
    with (
        world(name, "h1", "h2") as hosts,
        hosts.segments["h2"].join("C", group="G", endpoint="e", capacity=2) as node,
        Router(hosts.mirror("h1", "h2")) as router,
    ):
        until(lambda: hosts.alive("h1", "h2") == {"C"}, "C is shown")
        theirs = node.request()
        until(lambda: hosts.seen("h1", "h2")["C"][1] == 1, "it is seen")
        with router.acquire("G"):
            with pytest.raises(shmcoord.Saturated):
                router.acquire("G")
            theirs.end()
            with router.acquire("G", timeout_s=5.0):  # woken by the news, not by a local release
                pass


def test_a_killed_node_is_gone_at_once(name: str, spawn: Callable[..., Child]) -> None:
    with world(name, "h1", "h2") as hosts:
        process = spawn(
            "segment = Segment.open(name)\n"
            "node = segment.join('C', group='G', endpoint='e')\n"
            "say('joined'); hear()",
            hosts.segment("h2"),
        )
        assert process.hear() == "joined"
        until(lambda: hosts.alive("h1", "h2") == {"C"}, "C is shown")
        process.kill()
        assert until(lambda: not hosts.alive("h1", "h2"), "it is gone") < 0.5


def test_a_cut_makes_everything_suspect_and_removes_nobody(name: str) -> None:
    with (
        world(name, "h1", "h2", remove_after_s=0.4) as hosts,
        hosts.segments["h2"].join("C", group="G", endpoint="e"),
        Router(hosts.mirror("h1", "h2")) as router,
    ):
        until(lambda: hosts.alive("h1", "h2") == {"C"}, "C is shown")
        hosts.net.cut("h1", "h2")
        until(lambda: hosts.health("h1", "h2") == {"SUSPECT"}, "C is suspect")
        time.sleep(1.6)  # the housekeeping has had its turn
        assert hosts.health("h1", "h2") == {"SUSPECT"}
        assert router.pick("G").node == "C"  # nobody else is there
        hosts.net.heal("h1", "h2")
        until(lambda: hosts.alive("h1", "h2") == {"C"}, "C is back")


def test_silence_without_any_hint_is_noticed_by_age(name: str) -> None:
    with world(name, "h1", "h2") as hosts, hosts.segments["h2"].join("C", group="G", endpoint="e"):
        until(lambda: hosts.alive("h1", "h2") == {"C"}, "C is shown")
        hosts.net.freeze("h2")
        took = until(lambda: hosts.health("h1", "h2") == {"SUSPECT"}, "C is suspect")
        assert SUSPECT_S - 0.06 < took < SUSPECT_S + 0.3
        hosts.net.thaw("h2")
        until(lambda: hosts.alive("h1", "h2") == {"C"}, "C is back")


def test_of_three_a_silent_one_is_removed_and_comes_back(name: str) -> None:
    with (
        world(name, "h1", "h2", "h3", remove_after_s=0.5) as hosts,
        hosts.segments["h2"].join("C", group="G", endpoint="e"),
        hosts.segments["h3"].join("D", group="G", endpoint="e"),
    ):
        until(lambda: hosts.alive("h1", "h2") | hosts.alive("h1", "h3") == {"C", "D"}, "all shown")
        hosts.net.freeze("h2")
        until(lambda: hosts.seen("h1", "h2") == {}, "C is removed")
        assert hosts.alive("h1", "h3") == {"D"}
        hosts.net.thaw("h2")
        until(lambda: hosts.alive("h1", "h2") == {"C"}, "C is back")


def test_our_own_thaw_takes_no_old_news(name: str) -> None:
    with (
        world(name, "h1", "h2") as hosts,
        hosts.segments["h2"].join("C", group="G", endpoint="e") as node,
    ):
        until(lambda: hosts.alive("h1", "h2") == {"C"}, "C is shown")
        hosts.net.freeze("h1")
        running = [node.request() for _ in range(3)]
        until(lambda: hosts.health("h1", "h2") == {"SUSPECT"}, "C is suspect")
        time.sleep(0.3)
        for request in running:
            request.end()
        time.sleep(SUSPECT_S)  # what is not too old tells of their end
        peer = hosts.services["h1"]._receiver.peers["h2"]
        late = peer.arrivals.dropped["late"]
        hosts.net.thaw("h1")
        until(lambda: hosts.alive("h1", "h2") == {"C"}, "C is back")
        assert hosts.seen("h1", "h2")["C"][1] == 0
        assert peer.arrivals.dropped["late"] > late


def test_a_bridge_restarts(name: str) -> None:
    with (
        world(name, "h1", "h2") as hosts,
        hosts.segments["h2"].join("C", group="G", endpoint="e"),
    ):
        until(lambda: hosts.alive("h1", "h2") == {"C"}, "C is shown")
        hosts.stop("h2")  # the other one
        until(lambda: hosts.health("h1", "h2") == {"SUSPECT"}, "nothing is heard")
        hosts.start("h2")
        until(lambda: hosts.alive("h1", "h2") == {"C"}, "C is back")
        hosts.stop("h1")  # our own
        assert hosts.seen("h1", "h2") == {}
        hosts.start("h1")
        assert until(lambda: hosts.alive("h1", "h2") == {"C"}, "C is back") < 0.9


def test_repeated_and_old_frames_change_nothing(name: str) -> None:
    with (
        world(name, "h1", "h2") as hosts,
        hosts.segments["h2"].join("C", group="G", endpoint="e") as node,
    ):
        until(lambda: hosts.alive("h1", "h2") == {"C"}, "C is shown")
        sender = hosts.services["h2"]._sender
        peer = hosts.services["h1"]._receiver.peers["h2"]
        old = sender.frame(full=True)
        with node.request():
            until(lambda: hosts.seen("h1", "h2")["C"][1] == 1, "its request is seen")
            for _ in range(3):
                hosts.net.inject("h2", "h1", old)
            until(lambda: peer.arrivals.dropped["overtaken"] >= 3, "they came")
            assert hosts.seen("h1", "h2")["C"][1] == 1


def test_a_host_speaks_for_itself_alone(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with (
        world(name, "h1", "h2", "h3") as hosts,
        hosts.segments["h2"].join("C", group="G", endpoint="e"),
    ):
        until(lambda: hosts.alive("h1", "h2") == {"C"}, "C is shown")
        forged = hosts.services["h2"]._sender.frame(full=True)
        peers = hosts.services["h1"]._receiver.peers
        # As the engine says that it is of h3: what the frame says does not count.
        hosts.net.inject("h3", "h1", forged)
        until(lambda: peers["h3"].wrong == 1, "it is refused")
        # Now it says so itself, and still speaks of a segment of h2.
        frame = decode(forged)
        raw = [getattr(frame, field) for field in frame.__struct_fields__]
        raw[0], raw[3] = "h3", 10**9
        hosts.net.inject("h3", "h1", encode(type(frame)(*raw)))
        until(lambda: "not its own here" in caplog.text, "it is refused")
        hosts.net.inject("h9", "h1", forged)
        until(lambda: "not in the configuration" in caplog.text, "it is refused")
        assert hosts.alive("h1", "h2") == {"C"}
        assert hosts.seen("h1", "h3") == {}


def test_garbage_is_refused_and_told_of_once(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with (
        world(name, "h1", "h2") as hosts,
        hosts.segments["h2"].join("C", group="G", endpoint="e"),
    ):
        until(lambda: hosts.alive("h1", "h2") == {"C"}, "C is shown")
        peer = hosts.services["h1"]._receiver.peers["h2"]
        for _ in range(5):
            hosts.net.inject("h2", "h1", b"garbage")
        until(lambda: peer.wrong == 5, "all are refused")
        assert caplog.text.count("not a frame of shmcoord") == 1
        assert hosts.alive("h1", "h2") == {"C"}


def test_members_that_cannot_be_are_refused_one_by_one(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An honest bridge sends no such thing; one that does must not end ours."""
    with (
        world(name, "h1", "h2") as hosts,
        hosts.segments["h2"].join("C", group="G", endpoint="e"),
    ):
        until(lambda: hosts.alive("h1", "h2") == {"C"}, "C is shown")
        frame = decode(hosts.services["h2"]._sender.frame(full=True))
        good = frame.parts[0].members[0]  # type: ignore[index]
        wrong = [
            good._replace(slot=9, node="a", generation=2**40),
            good._replace(slot=-1, node="b"),
            good._replace(slot=10, node="", generation=1),
            good._replace(slot=11, node="x" * 200),
            good._replace(slot=12, node="c", weight=float("nan")),
            good._replace(slot=13, node="d", gauges=["no identifier"]),
            good._replace(slot=14, node="e\n", capacity=2**63),
            good._replace(slot=15, node="f", slow_start_s=-1.0),
            good._replace(slot=16, generation=77),  # the name is taken
        ]
        part = msgspec.structs.replace(frame.parts[0], members=[good, *wrong])
        sent = msgspec.structs.replace(frame, parts=[part], sequence=10**9)
        hosts.net.inject("h2", "h1", encode(sent))
        until(lambda: caplog.text.count("cannot be shown") == len(wrong), "all are refused")
        assert hosts.alive("h1", "h2") == {"C"}
        cut_off = msgspec.structs.replace(
            frame,
            parts=[msgspec.structs.replace(part, members=[good], entries=b"123")],
            sequence=10**9 + 1,
        )
        hosts.net.inject("h2", "h1", encode(cut_off))
        until(lambda: "could not be written" in caplog.text, "it is refused")
        assert hosts.alive("h1", "h2") == {"C"}


def test_a_segment_is_made_later_and_made_anew(name: str) -> None:
    with world(name, "h1", "h2") as hosts:
        hosts.segments["h2"].close()
        Segment.unlink(hosts.segment("h2"))
        time.sleep(0.1)
        with Segment.open(hosts.segment("h2")) as anew, anew.join("C", group="G", endpoint="e"):
            until(lambda: hosts.alive("h1", "h2") == {"C"}, "C is shown")


def test_a_mirror_that_is_unlinked_is_made_anew(name: str) -> None:
    with (
        world(name, "h1", "h2") as hosts,
        hosts.segments["h2"].join("C", group="G", endpoint="e"),
    ):
        until(lambda: hosts.alive("h1", "h2") == {"C"}, "C is shown")
        Segment.unlink(hosts.mirror("h1", "h2"))
        until(lambda: hosts.alive("h1", "h2") == {"C"}, "C is shown again")


def test_a_router_that_was_first_sees_what_comes(name: str) -> None:
    """It made the segment itself, as routers do; the bridge takes it as it is."""
    with (
        world(name, "h1", "h2") as hosts,
        Router(hosts.segment("h1"), hosts.mirror("h1", "h2")) as router,
    ):
        with pytest.raises(shmcoord.NoBackend):
            router.pick("G")
        with hosts.segments["h2"].join("C", group="G", endpoint="e"):
            until(lambda: hosts.alive("h1", "h2") == {"C"}, "C is shown")
            assert router.pick("G").node == "C"
            with hosts.segments["h1"].join("A", group="G", endpoint="e"):
                assert {router.pick("G").node for _ in range(50)} == {"A"}  # our own first


def test_a_segment_with_nodes_of_this_host_is_not_taken(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with world(name, "h1", "h2") as hosts:
        hosts.stop("h1")
        with contextlib.suppress(shmcoord.SegmentNotFound):  # it may not have got so far
            Segment.unlink(hosts.mirror("h1", "h2"))
        with hosts.segments["h2"].join("C", group="G", endpoint="e"):
            with (
                Segment.open(hosts.mirror("h1", "h2")) as taken,
                taken.join("mine", group="G", endpoint="e"),
            ):
                hosts.start("h1")
                until(lambda: "give the mirror another name" in caplog.text, "it is said")
                assert set(hosts.seen("h1", "h2")) == {"mine"}
            until(lambda: hosts.alive("h1", "h2") == {"C"}, "C is shown")


def test_a_stopped_bridge_leaves_nothing(name: str) -> None:
    import threading

    before = set(threading.enumerate())
    with world(name, "h1", "h2") as hosts, hosts.segments["h2"].join("C", group="G", endpoint="e"):
        until(lambda: hosts.alive("h1", "h2") == {"C"}, "C is shown")
        service = hosts.services["h1"]
        hosts.stop("h1")
        service.close()  # twice does nothing
    left = {thread for thread in set(threading.enumerate()) - before if thread.is_alive()}
    assert {thread.name for thread in left} <= {"shmcoord-update"}
