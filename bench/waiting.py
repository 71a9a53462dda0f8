"""What waiting for capacity costs, against two naive ways: `python -m bench.waiting [LOAD ...]`.

Six router processes send Poisson arrivals to nodes of capacity 1 that hold each request for 5 ms,
at a given part of what the nodes can do. Waits count from the intended arrival to the lease. All
ways get the same arrivals:

    ours       the library: callers queue, whoever frees tells the router that waits longest
    no queue   everybody who waits is woken by each release, and chance decides who gets the cell
    polling    everybody who waits looks every 0.5 ms
    bound      computed: one first-come queue in front of all nodes, no cost at all

The two naive ways are written here on top of the library; they reserve through the same cells.
"""

from __future__ import annotations

import asyncio
import heapq
import json
import multiprocessing
import os
import random
import secrets
import statistics
import sys
import threading
import time
from typing import Any

import shmcoord
import shmcoord.waiting
from shmcoord import Router, Saturated, Segment

ROUTERS = 6
SERVICE_S = 0.005
#: A sleep of 5 ms takes a little longer; the load is made of what it takes.
HELD_S = 0.0051
LOADS = (0.7, 0.85)
RUN_S = 6.0
#: Who has not been served by then never will be.
TIMEOUT_S = 5.0
POLL_S = 0.0005
CAPACITIES = (1, 2, 6)


class NoQueue(shmcoord.waiting.WaitQueue[Any]):
    """All callers of the router try at once whenever one of them is told, in any order."""

    def ahead(self, group: str) -> int:
        """Nobody: a newcomer tries as well."""
        return 0

    def _enqueue(self, waiter: Any) -> bool:
        queued = super()._enqueue(waiter)
        if queued and waiter.queued:
            self._try(waiter)
        return queued

    def _serve(self, told: bool) -> None:
        with self._lock:
            waiters = [waiter for queue in self._queues.values() for waiter in queue]
        random.shuffle(waiters)
        for waiter in waiters:
            if waiter.is_gone():
                self._remove(waiter)
            elif waiter.queued:
                self._try(waiter)
        super()._serve(False)


class Holder(threading.Thread):
    """Releases each lease 5 ms after it was given, more exactly than an event loop would."""

    def __init__(self, release: Any) -> None:
        super().__init__(daemon=True)
        self._release = release
        self._due: list[tuple[float, int, Any]] = []
        self._changed = threading.Condition()
        self._count = 0

    def hold(self, lease: Any) -> None:
        """Take over a lease."""
        with self._changed:
            self._count += 1
            heapq.heappush(self._due, (time.monotonic() + SERVICE_S, self._count, lease))
            if self._due[0][1] == self._count:
                self._changed.notify()

    def run(self) -> None:
        """Release what is due."""
        while True:
            with self._changed:
                while not self._due or self._due[0][0] > time.monotonic():
                    left = self._due[0][0] - time.monotonic() if self._due else None
                    self._changed.wait(left if left is None else max(left, 0.0))
                lease = heapq.heappop(self._due)[2]
            self._release(lease)


async def _polled(router: Router) -> Any:
    ends = time.monotonic() + TIMEOUT_S
    while True:
        backend = router.pick("G")  # cheaper than an acquire in vain, which explains itself
        if backend.queue == 0:
            try:
                return router.acquire("G")
            except Saturated:
                pass
        if time.monotonic() > ends:
            raise Saturated("polled in vain")
        await asyncio.sleep(POLL_S)


async def _send(way: str, router: Router, holder: Holder, arrivals: list[float]) -> list[float]:
    waits = []

    async def one(at: float) -> None:
        try:
            if way == "polling":
                lease = await _polled(router)
            else:
                lease = await router.acquire_async("G", timeout_s=TIMEOUT_S)
        except Saturated:
            waits.append(TIMEOUT_S)
            return
        waits.append(time.monotonic() - at)
        holder.hold(lease)

    tasks = []
    for at in arrivals:
        left = at - time.monotonic()
        if left > 0:
            await asyncio.sleep(left)
        tasks.append(asyncio.create_task(one(at)))
    await asyncio.gather(*tasks)
    return waits


def _router(way: str, name: str, arrivals: list[float], begin_at: float, answer: Any) -> None:
    """One router process."""
    if way == "no queue":
        shmcoord.waiting.WaitQueue = NoQueue  # type: ignore[misc]
    router = Router(name, max_waiters=100_000)

    def release(lease: Any) -> None:
        lease.release()
        if way == "no queue":  # it has told one; tell the others too
            for _ in range(ROUTERS - 1):
                router._pass_on(None)  # type: ignore[attr-defined]

    holder = Holder(release)
    holder.start()
    began_cpu = time.process_time()
    waits = asyncio.run(_send(way, router, holder, [begin_at + at for at in arrivals]))
    cpu = time.process_time() - began_cpu
    time.sleep(2 * SERVICE_S)
    answer.put((waits, cpu))
    router.close()


def arrivals_of(capacity: int, load: float, seed: int) -> list[list[float]]:
    """For each router, when its requests arrive, in seconds from the beginning."""
    chance = random.Random(seed * 100 + capacity)
    rate = load * capacity / HELD_S / ROUTERS
    found = []
    for _ in range(ROUTERS):
        at, mine = 0.0, []
        while (at := at + chance.expovariate(rate)) < RUN_S:
            mine.append(at)
        found.append(mine)
    return found


def bound(capacity: int, arrivals: list[list[float]]) -> list[float]:
    """Waits in one first-come queue in front of all nodes."""
    free = [0.0] * capacity
    waits = []
    for at in sorted(at for mine in arrivals for at in mine):
        begun = max(at, heapq.heappop(free))
        waits.append(begun - at)
        heapq.heappush(free, begun + SERVICE_S)
    return waits


def measure(way: str, capacity: int, arrivals: list[list[float]]) -> tuple[list[float], float]:
    """The waits of all requests, seconds, and CPU seconds of the routers per request."""
    context = multiprocessing.get_context("spawn")
    name = f"bench_waiting_{os.getpid()}_{secrets.token_hex(3)}"
    with Segment.open(name, slots=32, leases=4) as segment:
        nodes = [
            segment.join(f"N{i}", group="G", endpoint="e", capacity=1) for i in range(capacity)
        ]
        answer = context.Queue()
        begin_at = time.monotonic() + 2.0
        routers = [
            context.Process(target=_router, args=(way, name, mine, begin_at, answer))
            for mine in arrivals
        ]
        try:
            for router in routers:
                router.start()
            answers = [answer.get(timeout=RUN_S + 2 * TIMEOUT_S + 30) for _ in routers]
            for router in routers:
                router.join(10)
        finally:
            for router in routers:
                router.kill()
            for node in nodes:
                node.leave()
            Segment.unlink(name)
    waits = [wait for mine, _ in answers for wait in mine]
    return waits, sum(cpu for _, cpu in answers) / len(waits)


def main() -> None:
    """Measure all ways at all loads and capacities; print a table, and the figures as JSON."""
    rows = []
    print("| load | nodes | way | requests | median, ms | p99, ms | given up | CPU/request, ms |")
    print("|---|---|---|---|---|---|---|---|")
    for load in tuple(map(float, sys.argv[1:])) or LOADS:
        for capacity in CAPACITIES:
            arrivals = arrivals_of(capacity, load, seed=1)
            for way in ("bound", "ours", "no queue", "polling"):
                cpu = 0.0
                if way == "bound":
                    waits = bound(capacity, arrivals)
                else:
                    waits, cpu = measure(way, capacity, arrivals)
                row = {
                    "load": load,
                    "nodes": capacity,
                    "way": way,
                    "requests": len(waits),
                    "median_ms": statistics.median(waits) * 1e3,
                    "p99_ms": statistics.quantiles(waits, n=100)[98] * 1e3,
                    "given_up": sum(wait >= TIMEOUT_S for wait in waits),
                    "cpu_ms": cpu * 1e3,
                }
                rows.append(row)
                print(
                    f"| {load:.0%} | {capacity} | {way} | {row['requests']} | "
                    f"{row['median_ms']:.1f} | {row['p99_ms']:.1f} | {row['given_up']} | "
                    f"{row['cpu_ms']:.2f} |",
                    flush=True,
                )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
