"""A channel and the end of its process, and its fork."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from grpc_cluster import GROUP, Cluster
from helpers import run, wait_until

CLIENT = """
import grpc
import shmcoord.grpc

codec = dict(request_serializer=str.encode, response_deserializer=bytes.decode)
channel = shmcoord.grpc.channel(name, group="GREEN")
stub_say = channel.unary_unary("/test.Echo/Say", **codec)
stub_count = channel.unary_stream("/test.Echo/Count", **codec)
assert stub_say("warm") == "WARM"
"""


@pytest.fixture
def cluster(name: str) -> Iterator[Cluster]:
    cluster = Cluster(name)
    yield cluster
    cluster.close()


@pytest.mark.parametrize("adopts", [False, True])
def test_a_process_that_ends_with_calls_under_way(cluster: Cluster, adopts: bool) -> None:
    node = cluster.add(capacity=4, adopts=adopts)
    said = run(
        CLIENT
        + """
held = [stub_say.future("hold") for _ in range(2)]
stream = stub_count("1+")
assert next(stream) == "0"
blocked = threading.Thread(target=lambda: stub_say("hold"), daemon=True)
blocked.start()
time.sleep(0.1)
waits = stub_say.future("x"), stub_count("1")
hold_me = threading.Thread(target=lambda: stub_say("x"), daemon=True)
hold_me.start()
time.sleep(0.1)
say(len(held), [call.done() for call in waits])
""",
        cluster.name,
        timeout_s=20,
    )
    assert said.strip() == "2 [False, False]"
    assert node.seen.count("hold") == 3
    # What nodes have adopted they free; what they have not the client gave back at its exit.
    if adopts:
        wait_until(lambda: cluster.held() == 0)
    assert cluster.held() == 0


def test_a_process_that_is_killed(cluster: Cluster) -> None:
    cluster.add(capacity=4, adopts=False)
    with pytest.raises(AssertionError, match="exit code -9"):
        run(
            CLIENT
            + """
held = [stub_say.future("hold") for _ in range(2)]
os.kill(os.getpid(), signal.SIGKILL)
""",
            cluster.name,
        )
    # Free by the node's next beat, or now.
    assert cluster.held() in (0, 2)
    assert cluster.segment.reap() >= 1
    assert cluster.held() == 0


def test_a_forked_child_is_told(cluster: Cluster) -> None:
    cluster.add(capacity=4)
    said = run(
        CLIENT
        + """
stream = stub_count("1+")
assert next(stream) == "0"
waiting = [stub_say.future("hold") for _ in range(3)] + [stub_say.future("x")]
time.sleep(0.2)

def child():
    for call in (stub_say, stub_say.with_call, stub_say.future, stub_count):
        try:
            call("x")
        except ForkedHandle as error:
            assert "parent" in str(error), error
        else:
            raise AssertionError("it was called")
    # Calls that the parent has under way are not dropped here: that goes into gRPC, which does not
    # survive a fork if other threads are in it.
    channel.close()

pid = forked(child)
status = os.waitpid(pid, 0)[1]
assert status == 0, status
assert stream.is_active()
assert not any(call.done() for call in waiting)
assert not stub_say.future("x").done()
for call in [stream, *waiting]:
    assert call.cancel()
assert stub_say("y", timeout=10) == "Y"
say("unharmed")
""",
        cluster.name,
        timeout_s=30,
    )
    assert said.strip() == "unharmed"
    wait_until(lambda: cluster.held() == 0)


def test_a_child_may_have_a_channel_of_its_own(cluster: Cluster) -> None:
    cluster.add(capacity=4)
    assert GROUP == "GREEN"
    said = run(
        """
import grpc
import shmcoord.grpc

def child():
    with shmcoord.grpc.channel(name, group="GREEN") as channel:
        assert channel.unary_unary("/test.Echo/Say")(b"x", timeout=10) == b"X"

pid = forked(child)
status = os.waitpid(pid, 0)[1]
assert status == 0, status
say("done")
""",
        cluster.name,
    )
    assert said.strip() == "done"
