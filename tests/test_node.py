"""The serving side as its users hold it."""

from __future__ import annotations

import asyncio
import gc
import threading
import time

import pytest
from helpers import Raw, wait_until

from shmcoord import (
    ForkedHandle,
    LeaseLost,
    Router,
    Segment,
    SegmentFull,
    ShmcoordError,
    State,
)


@pytest.fixture
def node(segment):
    with segment.join(
        "B", group="GREEN", endpoint="e", capacity=4, interval_s=0.05, gauges=("kv", "temp")
    ) as node:
        yield node


@pytest.fixture
def join(segment):
    """`segment.join` with something good for every argument that is not given."""

    def call(name="B", **options):
        return segment.join(name, **{"group": "GREEN", "endpoint": "e", **options})

    return call


# --- join


def test_a_node_knows_what_it_joined_with(segment, node):
    assert (node.name, node.group, node.endpoint) == ("B", "GREEN", "e")
    assert (node.capacity, node.weight, node.interval_s) == (4, 1.0, 0.05)
    assert node.segment is segment
    assert (node.state, node.inflight, node.waiting, node.busy) == (State.IDLE, 0, 0, False)
    assert (node.served, node.failed, node.latency_s, node.refused) == (0, 0, 0, 0)
    assert not node.left
    assert "B" in repr(node)
    for attribute in ("name", "group", "endpoint", "capacity", "weight", "served", "inflight"):
        with pytest.raises(AttributeError):
            setattr(node, attribute, 1)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"name": ""}, ValueError),
        ({"name": "x" * 64}, ValueError),
        ({"name": "ö" * 32}, ValueError),
        ({"name": "a\nb"}, ValueError),
        ({"name": "a\0b"}, ValueError),
        ({"name": "\x1b[31m"}, ValueError),
        ({"name": "\ud800"}, ValueError),
        ({"name": None}, TypeError),
        ({"name": b"B"}, TypeError),
        ({"group": ""}, ValueError),
        ({"group": "g" * 64}, ValueError),
        ({"group": None}, TypeError),
        ({"endpoint": ""}, ValueError),
        ({"endpoint": "e" * 256}, ValueError),
        ({"endpoint": 50051}, TypeError),
        ({"capacity": 0}, ValueError),
        ({"capacity": -1}, ValueError),
        ({"capacity": 17}, ValueError),
        ({"capacity": 2**70}, ValueError),
        ({"capacity": 1.0}, TypeError),
        ({"capacity": True}, TypeError),
        ({"capacity": "4"}, TypeError),
        ({"weight": 0}, ValueError),
        ({"weight": -1}, ValueError),
        ({"weight": float("nan")}, ValueError),
        ({"weight": float("inf")}, ValueError),
        ({"weight": "heavy"}, ValueError),
        ({"weight": None}, TypeError),
        ({"interval_s": 0}, ValueError),
        ({"interval_s": -1}, ValueError),
        ({"interval_s": 0.0001}, ValueError),
        ({"interval_s": 3601}, ValueError),
        ({"interval_s": float("nan")}, ValueError),
        ({"interval_s": None}, TypeError),
        ({"gauges": "kv"}, TypeError),
        ({"gauges": ("kv", "kv")}, ValueError),
        ({"gauges": ("not an identifier",)}, ValueError),
        ({"gauges": ("",)}, ValueError),
        ({"gauges": (3,)}, TypeError),
        ({"gauges": ("g" * 32,)}, ValueError),
        ({"gauges": tuple(f"g{i}" for i in range(17))}, ValueError),
        ({"gauges": 3}, TypeError),
        ({"nonsense": 1}, TypeError),
    ],
)
def test_wrong_arguments_claim_nothing(segment, join, options, error):
    before = Raw(segment.name).number("sync", "epoch", 8)
    with pytest.raises(error):
        join(**options)
    assert segment.snapshot() == ()
    assert Raw(segment.name).number("sync", "epoch", 8) == before
    join().leave()


def test_group_and_endpoint_are_required(segment):
    with pytest.raises(TypeError):
        segment.join("B")
    with pytest.raises(TypeError):
        segment.join("B", group="GREEN")


def test_several_nodes_of_one_process(segment, join):
    with join("A") as first, join("B") as second:
        with first.request(), second.request(), second.request():
            assert segment.status("A").inflight == 1
            assert segment.status("B").inflight == 2
        with pytest.raises(ValueError, match="another node"):
            first.end(second.begin())


# --- requests


def test_errors_that_leave_the_block_count_as_failed(segment, node):
    with node.request():
        pass
    assert (node.served, node.failed) == (1, 0)
    with pytest.raises(KeyError), node.request():
        raise KeyError
    assert (node.served, node.failed) == (2, 1)
    with node.request() as request:
        request.end()
    assert (node.served, node.failed) == (3, 1)
    with node.request() as request:
        node.end(request, failed=True)
    assert (node.served, node.failed) == (4, 2)
    status = segment.status("B")
    assert (status.served, status.failed, status.inflight) == (4, 2, 0)


async def test_cancelled_work_counts_as_failed(node):
    async def work():
        with node.request():
            await asyncio.sleep(60)

    task = asyncio.create_task(work())
    await asyncio.sleep(0.01)
    assert node.inflight == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (node.inflight, node.served, node.failed) == (0, 1, 1)


def test_a_stream_that_is_not_read_to_its_end_counts_as_failed(node):
    def stream():
        with node.request():
            yield 1
            yield 2

    reading = stream()
    next(reading)
    assert node.inflight == 1
    reading.close()
    assert (node.inflight, node.served, node.failed) == (0, 1, 1)


def test_a_handle_ends_once(node):
    handle = node.begin()
    handle.end()
    for again in (handle.end, lambda: node.end(handle)):
        with pytest.raises(ValueError, match="ended before"):
            again()
    assert node.served == 1
    for wrong in (None, 0, "handle"):
        with pytest.raises(TypeError):
            node.end(wrong)


def test_a_dropped_handle_is_ended_as_failed(node):
    node.begin()
    gc.collect()
    assert (node.inflight, node.served, node.failed) == (0, 1, 1)


def test_eight_threads_on_one_node(segment, node):
    counts = []

    def work():
        for index in range(1500):
            handle = node.begin()
            node.publish(kv=float(index))
            handle.end(failed=index % 3 == 0)
        counts.append(1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(counts) == 8
    assert (node.served, node.failed) == (12000, 4000)
    wait_until(lambda: node.inflight == 0, 1)
    assert Raw(segment.name).taken() == 0


# --- gauges, waiting, busy


def test_gauges_of_one_call_and_those_before(segment, node):
    assert segment.status("B").gauges == {"kv": 0.0, "temp": 0.0}
    node.publish(kv=0.5)
    node.publish(temp=40)
    assert segment.status("B").gauges == {"kv": 0.5, "temp": 40.0}
    node.publish()
    assert segment.status("B").gauges == {"kv": 0.5, "temp": 40.0}


def test_a_wrong_gauge_changes_none(segment, node):
    node.publish(kv=1, temp=2)
    with pytest.raises(ValueError, match="no gauge 'other'"):
        node.publish(kv=5, other=6)
    for wrong in ("x", None, [1]):
        with pytest.raises((TypeError, ValueError)):
            node.publish(kv=7, temp=wrong)
    with pytest.raises(OverflowError):
        node.publish(kv=7, temp=10**400)
    assert segment.status("B").gauges == {"kv": 1.0, "temp": 2.0}


@pytest.mark.parametrize(
    ("value", "error"),
    [(-1, ValueError), (1.0, TypeError), (None, TypeError), (True, TypeError), ("3", TypeError)],
)
def test_wrong_waiting(node, value, error):
    node.waiting = 2
    with pytest.raises(error):
        node.waiting = value
    assert node.waiting == 2


# --- states and the end


def test_drain_resume_shutdown(segment, node):
    with node.request():
        node.drain()
        assert (node.state, node.inflight) == (State.DRAINING, 1)
        assert segment.status("B").state == State.DRAINING
        with node.request():  # it cannot be refused here
            assert node.inflight == 2
    node.drain()
    node.resume()
    assert node.state == State.IDLE
    node.shutdown()
    assert segment.status("B").state == State.SHUTDOWN
    for forbidden in (node.drain, node.resume):
        with pytest.raises(ValueError, match="shut down"):
            forbidden()
    assert segment.status("B").state == State.SHUTDOWN
    node.leave()
    assert segment.snapshot() == ()


def test_leaving_is_final_and_idempotent(segment, join):
    node = join(interval_s=0.02)
    handles = [node.begin() for _ in range(3)]
    node.leave()
    node.leave()
    assert node.left
    assert "left" in repr(node)
    assert segment.snapshot() == ()
    assert Raw(segment.name).taken() == 0
    uses = [
        node.begin,
        node.request,
        node.drain,
        node.resume,
        node.shutdown,
        node.refresh,
        node.publish,
        lambda: node.adopt("x"),
        lambda: node.waiting,
        lambda: setattr(node, "waiting", 1),
        lambda: setattr(node, "busy", True),
        lambda: node.inflight,
        lambda: node.state,
        lambda: node.refused,
    ]
    with join() as successor:  # in the same slot
        for use in uses:
            with pytest.raises(ValueError, match="left") as caught:
                use()
            assert not isinstance(caught.value, ShmcoordError)
        for handle in handles:
            handle.end()  # harmless: leaving gave back what it took
        assert (successor.inflight, successor.served, segment.status("B").served) == (0, 0, 0)


def test_a_block_leaves(segment, join):
    with pytest.raises(KeyError), join():
        raise KeyError
    assert segment.snapshot() == ()


def test_who_drops_the_node_leaves(segment, join):
    node = join()
    assert len(segment.snapshot()) == 1
    del node
    gc.collect()
    assert segment.snapshot() == ()
    assert segment.reap() == 0


def test_closing_the_segment_leaves_with_its_nodes(name):
    with Segment.open(name, slots=4, leases=4) as observer:
        with Segment.open(name) as segment:
            first = segment.join("A", group="GREEN", endpoint="e")
            second = segment.join("B", group="GREEN", endpoint="e")
            assert len(observer.snapshot()) == 2
        assert observer.snapshot() == ()
        assert first.left
        assert second.left


def test_a_router_whose_segment_was_closed_harms_nobody(name):
    """Its slot stays its own until it is closed too, or the next owner of the slot is safe."""
    with (
        Segment.open(name, slots=2, leases=4) as other,
        other.join("target", group="GREEN", endpoint="e", interval_s=0.02),
    ):
        segment = Segment.open(name)
        router = Router(segment)
        lease = router.acquire("GREEN")
        segment.close()
        other.reap()
        try:
            heir = other.join("heir", group="PINK", endpoint="e", interval_s=0.02)
        except SegmentFull:  # still the router's
            router.close()
            heir = other.join("heir", group="PINK", endpoint="e", interval_s=0.02)
        request = heir.begin()
        backend = other.backend("heir")
        router.close()
        del lease, router, segment
        gc.collect()
        assert backend.alive
        assert [status.node for status in other.snapshot()] == ["target", "heir"]
        time.sleep(0.06)
        assert (heir.inflight, Raw(name).taken()) == (1, 1)
        request.end()
        heir.leave()
        assert Raw(name).taken() == 0


def test_errors_are_of_one_hierarchy():
    for error in (ForkedHandle, LeaseLost):
        assert issubclass(error, ShmcoordError)
    assert not issubclass(ShmcoordError, (ValueError, TypeError))
