"""The connectivity of a channel to many nodes: one state, told as gRPC tells it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import grpc
import pytest
from grpc_cluster import GROUP, Cluster, Stub, close_soon
from helpers import wait_until

import shmcoord.grpc

State = grpc.ChannelConnectivity


@pytest.fixture
def cluster(name: str) -> Iterator[Cluster]:
    cluster = Cluster(name)
    yield cluster
    cluster.close()


@pytest.fixture
def channel(cluster: Cluster) -> Iterator[grpc.Channel]:
    channel = shmcoord.grpc.channel(cluster.name, group=GROUP)
    yield channel
    close_soon(channel)


def test_it_is_idle_until_somebody_calls(cluster: Cluster, channel: grpc.Channel) -> None:
    cluster.add()
    told: list[State] = []
    channel.subscribe(told.append)
    wait_until(lambda: told == [State.IDLE])
    time.sleep(0.3)
    assert told == [State.IDLE]
    assert Stub(channel).Say("x") == "X"
    wait_until(lambda: told[-1] is State.READY)
    assert set(told) <= {State.IDLE, State.CONNECTING, State.READY}


def test_it_is_ready_while_any_link_is(cluster: Cluster, channel: grpc.Channel) -> None:
    told: list[State] = []
    nodes = [cluster.add(name) for name in "BC"]
    stub = Stub(channel)
    for _ in range(40):
        stub.Say("x")
        if all(node.seen for node in nodes):
            break
    channel.subscribe(told.append)
    wait_until(lambda: told == [State.READY])
    nodes[0].stop()
    time.sleep(0.3)
    assert told == [State.READY]
    nodes[1].stop()
    wait_until(lambda: told[-1] is not State.READY)
    cluster.add("D")
    assert stub.Say("x", wait_for_ready=True) == "X"
    wait_until(lambda: told[-1] is State.READY)


def test_channel_ready_future(cluster: Cluster, channel: grpc.Channel) -> None:
    future = grpc.channel_ready_future(channel)
    with pytest.raises(grpc.FutureTimeoutError):
        future.result(timeout=0.1)
    node = cluster.add()
    future.result(timeout=5)
    assert future.done()
    assert not node.seen
    wait_until(lambda: not _watching())
    grpc.channel_ready_future(channel).result(timeout=5)


def test_who_wants_a_connection_is_told_why_there_is_none(
    cluster: Cluster, channel: grpc.Channel
) -> None:
    told: list[State] = []
    channel.subscribe(told.append, try_to_connect=True)
    wait_until(lambda: told == [State.TRANSIENT_FAILURE])
    cluster.add("B", listens=False)
    time.sleep(0.2)
    assert State.READY not in told
    cluster.add("C")
    wait_until(lambda: told[-1] is State.READY)


def test_subscribers(
    cluster: Cluster, channel: grpc.Channel, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.add()
    told: list[State] = []
    more: list[State] = []

    def fail(state: State) -> None:
        raise RuntimeError(f"cannot stand {state}")

    channel.subscribe(fail)
    channel.subscribe(told.append)
    wait_until(lambda: told == [State.IDLE])
    assert "cannot stand" in caplog.text
    channel.unsubscribe(told.append)
    channel.unsubscribe(told.append)  # as in gRPC nothing happens
    channel.subscribe(more.append, try_to_connect=True)
    wait_until(lambda: more[-1:] == [State.READY])
    assert told == [State.IDLE]
    channel.unsubscribe(fail)
    channel.unsubscribe(more.append)
    wait_until(lambda: not _watching())


def test_the_end_is_told(cluster: Cluster) -> None:
    cluster.add()
    channel = shmcoord.grpc.channel(cluster.name, group=GROUP)
    told: list[State] = []
    channel.subscribe(told.append, try_to_connect=True)
    wait_until(lambda: told[-1:] == [State.READY])
    channel.close()
    wait_until(lambda: told[-1] is State.SHUTDOWN)
    late: list[State] = []
    channel.subscribe(late.append)
    wait_until(lambda: late == [State.SHUTDOWN])
    wait_until(lambda: not _watching())


def test_a_subscriber_does_not_keep_a_dropped_channel(cluster: Cluster) -> None:
    cluster.add()
    told: list[State] = []
    channel = shmcoord.grpc.channel(cluster.name, group=GROUP)
    channel.subscribe(told.append, try_to_connect=True)
    wait_until(lambda: told[-1:] == [State.READY])
    del channel
    wait_until(lambda: told[-1] is State.SHUTDOWN)


def _watching() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "shmcoord-connectivity"]
