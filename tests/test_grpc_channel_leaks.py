"""A few thousand calls of all kinds that end in all ways: nothing is held afterwards."""

from __future__ import annotations

import gc
import logging
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from grpc_cluster import GROUP, METHODS, SERVICE, Cluster, Stub
from helpers import wait_until

import shmcoord.grpc
from shmcoord import Lease
from shmcoord.grpc._flight import Flight

CALLS = 3000
THREADS = 6


@pytest.fixture
def cluster(name: str) -> Iterator[Cluster]:
    cluster = Cluster(name)
    yield cluster
    cluster.close()


def requests(rng: random.Random) -> Iterator[str]:
    for _ in range(rng.randrange(4)):
        yield rng.choice(["a", "b", "NOT_FOUND"])
    if rng.random() < 0.1:
        raise RuntimeError("no more requests")


class Caller:
    """Makes calls of all kinds, and ends them in all ways."""

    def __init__(self, channel: grpc.Channel, seed: int) -> None:
        self.stub = Stub(channel)
        self.rng = random.Random(seed)
        self.endings: dict[str, int] = {}
        self.later: list[Any] = []
        self.fails = channel.unary_unary(f"/{SERVICE}/Say", _fail, bytes.decode)

    def run(self, calls: int) -> None:
        for _ in range(calls):
            try:
                how = self.one()
            except grpc.RpcError as error:
                how = error.code().name  # type: ignore[attr-defined]
            except (grpc.FutureCancelledError, grpc.FutureTimeoutError) as error:
                how = type(error).__name__
            self.endings[how] = self.endings.get(how, 0) + 1
        for call in self.later:
            call.cancel()

    def one(self) -> str:
        rng, stub = self.rng, self.stub
        timeout = rng.choice([None, None, 5.0, rng.random() * 0.02, 0.0])
        request = rng.choice(["x"] * 6 + ["NOT_FOUND", "UNAVAILABLE", "before"])
        if timeout is not None and rng.random() < 0.3:
            request = "hold" if timeout < 1 else request
        options = {"timeout": timeout, "wait_for_ready": rng.choice([None, True])}
        kind = rng.randrange(8)
        if kind == 0:
            stub.Say(request, **options)
        elif kind == 1:
            stub.Say.with_call(request, **options)
        elif kind == 2:
            stub.Gather(requests(rng), **options)
        elif kind == 3:
            self.fails("x", **options)
        else:
            if kind == 4:
                call = stub.Say.future(request, **options)
            elif kind == 5:
                call = stub.Count(rng.choice(["0", "3", "3!", "2+", "NOT_FOUND"]), **options)
            elif kind == 6:
                call = stub.Gather.future(requests(rng), **options)
            else:
                call = stub.Chat(requests(rng), **options)
            return self.finish(call, kind in (5, 7))
        return "returned"

    def finish(self, call: Any, streams: bool) -> str:
        rng = self.rng
        way = rng.randrange(4)
        if way and rng.random() < 0.2:  # such a callback keeps a call that is dropped
            call.add_done_callback(lambda _: None)
        if streams and rng.random() < 0.7:
            for _ in range(rng.randrange(3)):
                next(call, None)
        if way == 0:
            return "dropped"
        if way == 1:
            time.sleep(rng.random() * 0.002)
            call.cancel()
            return "cancelled"
        if way == 2:
            canceller = threading.Timer(rng.random() * 0.005, call.cancel)
            canceller.start()
            try:
                list(call) if streams else call.result()
            finally:
                canceller.join()
            return "raced"
        self.later.append(call)
        if len(self.later) > 1:
            self.later.pop(0).cancel()
        return "later"


def _fail(_: object) -> bytes:
    raise RuntimeError("no bytes")


@pytest.mark.parametrize("adopts", [True, False])
def test_nothing_is_held_afterwards(
    cluster: Cluster, adopts: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "grpc")  # serializers that fail are logged there
    before = _alive(Lease)  # of other tests
    nodes = [cluster.add(name, capacity=6, adopts=adopts) for name in "BC"]
    channel = shmcoord.grpc.channel(
        cluster.name, group=GROUP, idempotent=METHODS[:1], max_wait_s=10.0
    )
    callers = [Caller(channel, seed) for seed in range(THREADS)]
    threads = [
        threading.Thread(target=caller.run, args=(CALLS // 2 // THREADS,)) for caller in callers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    endings: dict[str, int] = {}
    for caller in callers:
        for how, count in caller.endings.items():
            endings[how] = endings.get(how, 0) + count
        caller.later.clear()
    assert sum(endings.values()) == CALLS // 2
    # Without all of these the test would not test what it says.
    for how in ("returned", "dropped", "cancelled", "raced", "later", "DEADLINE_EXCEEDED"):
        assert endings.get(how), endings
    assert endings.get("NOT_FOUND"), endings
    assert all(node.seen for node in nodes)
    gc.collect()
    wait_until(lambda: cluster.held() == 0)
    links = channel._core.pool.links()  # type: ignore[attr-defined]
    wait_until(lambda: not any(link.users for link in links))
    wait_until(lambda: not _alive(Flight))
    assert not [lease for lease in _alive(Lease) if not any(lease is old for old in before)]
    assert Stub(channel).Say("x", timeout=10) == "X"
    channel.close()


def _alive(kind: type) -> list[Any]:
    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing) is kind]
