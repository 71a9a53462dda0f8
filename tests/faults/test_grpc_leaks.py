"""However a call of the gRPC plug-ins ends, nothing is held afterwards, on neither side.

Calls of all kinds through both channels to a server with threads and one with an event loop: with
deadlines that pass, cancellations, exceptions of handlers and of clients, streams that are dropped
half-read. What the nodes have counted is what the handlers have begun.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, ClassVar

import grpc_storm
import pytest
from grpc_worlds import Routed
from helpers import Raw, wait_until

import shmcoord
from shmcoord.grpc._counting import Arrival

THREADS, TASKS = 6, 12
CAPACITY = 8


def unreleased() -> int:
    """Leases of this process that nobody has released, though somebody holds them."""
    gc.collect()
    return sum(
        isinstance(thing, shmcoord.Lease) and not thing.released for thing in gc.get_objects()
    )


def leaks(routed: Routed, tally: grpc_storm.Tally | None) -> list[str]:
    """What is wrong now that no call is in progress any more."""
    found = [routed.held()] if routed.held() else []
    if leases := unreleased():
        found.append(f"{leases} leases that are not released")
    if waiters := Raw(routed.segment.name).number("sync", "waiters", 4):
        found.append(f"{waiters} routers that wait")
    for status in routed.segment.snapshot() if tally else ():
        began = tally.began[status.node]
        if status.served != began:
            found.append(f"{status.node} counted {status.served} calls, handlers began {began}")
    return found


def settled(routed: Routed, tally: grpc_storm.Tally | None, timeout_s: float = 20.0) -> list[str]:
    """`leaks` when it has become empty, or after the time-out."""
    deadline = time.monotonic() + timeout_s
    while (found := leaks(routed, tally)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


@pytest.fixture
def routed(new_world: Callable[..., Routed]) -> Iterator[Routed]:
    logging.disable(logging.CRITICAL)  # gRPC logs each exception of a handler
    yield new_world("shmcoord")
    logging.disable(logging.NOTSET)


def start(routed: Routed, services: ModuleType) -> grpc_storm.Tally:
    """A node with threads, B, and one with an event loop, D."""
    tally = grpc_storm.Tally()
    features = grpc_storm.features(services)
    greeter = grpc_storm.counted(services.Greeter, "B", tally)()
    guide = grpc_storm.counted(services.RouteGuide, "B", tally)(features)
    routed.serve("sync", "B", workers=CAPACITY, servicers=(greeter, guide))
    greeter = grpc_storm.aio_counted(services.AioGreeter, "D", tally)()
    guide = grpc_storm.aio_counted(services.AioRouteGuide, "D", tally)(features)
    routed.serve("aio", "D", capacity=CAPACITY, servicers=(greeter, guide))
    return tally


def storm(
    routed: Routed, services: ModuleType, calls: int, seed: int, kind: Any = shmcoord.Router
) -> Counter[str]:
    """Half of the calls through each channel, both at once; how they ended."""
    seen: list[Counter[str]] = []
    # Many calls fail on purpose: no node is left out for that.
    rules = {"eject_after": 0}

    async def on_the_loop(channel: Any) -> Counter[str]:
        return await grpc_storm.by_tasks(services, channel, calls // 2, TASKS, seed)

    def with_a_loop() -> None:
        with kind(routed.segment.name, **rules) as router:
            seen.append(routed.with_channel(on_the_loop, timeout_s=3000.0, router=router))

    thread = threading.Thread(target=with_a_loop)
    thread.start()
    try:
        with (
            kind(routed.segment.name, **rules) as router,
            routed.channel(router=router) as channel,
        ):
            seen.append(grpc_storm.by_threads(services, channel, calls // 2, THREADS, seed))
    finally:
        thread.join()
    return sum(seen, Counter())


def test_nothing_is_held_after_calls_that_end_in_every_way(
    routed: Routed,
    example_services: ModuleType,
    count: Callable[[int, int], int],
    report: Callable[..., None],
):
    calls = count(2400, 100_000) // (2 * THREADS * TASKS) * (2 * THREADS * TASKS)
    tally = start(routed, example_services)
    tasks_before = routed.loop.run(count_tasks())
    began = time.monotonic()
    seen = storm(routed, example_services, calls, seed=20)
    took_s = time.monotonic() - began
    assert sum(seen.values()) == calls
    assert settled(routed, tally) == []
    wait_until(lambda: routed.loop.run(count_tasks()) <= tasks_before)
    # All that was meant to happen did.
    ends = Counter(how.rpartition(": ")[2] for how in seen.elements())
    for wanted in ("OK", "CANCELLED", "DEADLINE_EXCEEDED", "UNKNOWN", "INVALID_ARGUMENT"):
        assert ends[wanted] > calls // 200, ends
    for node in "BD":
        assert tally.began[node] > calls // 10
    failed = sum(status.failed for status in routed.segment.snapshot())
    assert failed > calls // 200
    report(
        "gRPC calls that end in every way",
        calls=calls,
        handlers_began=sum(tally.began.values()),
        counted_otherwise=0,
        held_afterwards=0,
        ended_OK=ends["OK"],
        cancelled=ends["CANCELLED"] + ends["task cancelled"],
        deadline_passed=ends["DEADLINE_EXCEEDED"],
        failed=ends["UNKNOWN"] + ends["INVALID_ARGUMENT"] + ends["client's exception"],
        calls_per_s=round(calls / took_s),
    )


class Keeping(shmcoord.Router):
    """Its leases are not released by whom they were given to, one in so many."""

    kept: ClassVar[list[shmcoord.Lease]] = []

    def acquire(self, *args: Any, **options: Any) -> Any:
        return Kept(super().acquire(*args, **options))

    def try_acquire(self, *args: Any, **options: Any) -> Any:
        lease = super().try_acquire(*args, **options)
        return None if lease is None else Kept(lease)


class Kept:
    def __init__(self, lease: shmcoord.Lease) -> None:
        self._lease = lease

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lease, name)

    def release(self) -> bool:
        if len(Keeping.kept) < 3:
            Keeping.kept.append(self._lease)
            return False
        return self._lease.release()


def test_a_client_that_keeps_leases_is_found(
    routed: Routed, example_services: ModuleType, report: Callable[..., None]
):
    """Negative control: what a channel releases is not released three times."""
    tally = start(routed, example_services)
    with (
        Keeping(routed.segment.name) as router,
        routed.channel(router=router) as channel,
    ):
        grpc_storm.by_threads(example_services, channel, 60, THREADS, seed=21)
        found = settled(routed, tally, timeout_s=1.0)
        assert "3 leases that are not released" in found
        Keeping.kept.clear()
        assert settled(routed, tally) == []
    report("gRPC calls, control: three releases of the client taken out", found=" and ".join(found))


def test_a_server_that_ends_no_request_is_found(
    routed: Routed,
    example_services: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    report: Callable[..., None],
):
    """Negative control: three requests that have been served are not ended."""
    tally = start(routed, example_services)
    kept: list[Any] = []
    end = Arrival.end

    def forgetful(self: Arrival, *args: Any) -> None:
        if self.request is not None and len(kept) < 3:
            kept.append(self)
        else:
            end(self, *args)

    monkeypatch.setattr(Arrival, "end", forgetful)
    with contextlib.ExitStack() as stack, routed.channel() as channel:
        # Arrivals end themselves when they are collected; not by taking back the patch, please,
        # when the function that holds the last of them is gone already.
        stack.callback(kept.clear)
        stack.callback(monkeypatch.undo)
        grpc_storm.by_threads(example_services, channel, 60, THREADS, seed=22)
        found = settled(routed, tally, timeout_s=1.0)
        held = [
            status.node + f": {status.inflight} in flight" for status in routed.segment.snapshot()
        ]
        cells = Raw(routed.segment.name).taken()
        for arrival in kept:
            arrival.request.end()
            arrival.request = None
        assert cells == 3
        assert len(found) >= 2, found  # what is held, and what was counted
        assert settled(routed, tally) == []
    report("gRPC calls, control: the end of three requests taken out", found=" and ".join(held))


async def count_tasks() -> int:
    return len(asyncio.all_tasks())
