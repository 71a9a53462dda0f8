"""The threaded gRPC server that is a node: real servers on loopback."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from grpc_helpers import Method, path, service, trailing
from helpers import run, wait_until

import shmcoord.grpc
from shmcoord import NoBackend, NodeExists, Router, Saturated, Segment, State
from shmcoord.grpc._common import LEASE_KEY, LEASE_LOST_KEY, NODE_KEY, served_by

Start = Callable[..., tuple[Any, grpc.Channel]]


@pytest.fixture
def start(segment: Segment) -> Iterator[Start]:
    """Starts servers with one service, each with a channel to it."""
    open_things: list[Any] = []

    def begin(workers: int = 2, /, **options: Any) -> tuple[Any, grpc.Channel]:
        methods = options.pop("methods")
        serializer = options.pop("serializer", None)
        options = {"node": "B", "segment": segment.name, "group": "GREEN", **options}
        server = shmcoord.grpc.server(workers, **options)
        server.add_generic_rpc_handlers((service(serializer, **methods),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        open_things.append((server, channel))
        return server, channel

    yield begin
    for server, channel in open_things:
        channel.close()
        server.stop(None)


def echo(request: bytes, context: Any) -> bytes:
    return request


def test_a_served_call_is_counted_and_names_its_node(start: Start, segment: Segment) -> None:
    seen = []

    def answer(request: bytes, context: Any) -> bytes:
        status = segment.status("B")
        seen.append((status.inflight, status.waiting, served_by.get()))
        return request

    server, channel = start(methods={"Echo": Method(answer)})
    response, call = channel.unary_unary(path("Echo")).with_call(b"hello")
    assert response == b"hello"
    assert trailing(call)[NODE_KEY] == "B"
    assert seen == [(1, 0, "B")]
    wait_until(lambda: server.node.served == 1)
    status = segment.status("B")
    assert (status.served, status.failed, status.inflight, status.waiting) == (1, 0, 0, 0)
    assert status.endpoint == server.endpoint
    assert served_by.get() is None


def test_all_four_kinds(start: Start, segment: Segment) -> None:
    def total(requests: Iterator[bytes], context: Any) -> bytes:
        return b"".join(requests)

    def each(request: bytes, context: Any) -> Iterator[bytes]:
        for byte in request:
            yield bytes([byte])

    def back(requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        context.set_trailing_metadata((("mine", "kept"),))
        yield from requests

    server, channel = start(
        methods={
            "Echo": Method(echo),
            "Total": Method(total, True, False),
            "Each": Method(each, False, True),
            "Back": Method(back, True, True),
        }
    )
    assert channel.unary_unary(path("Echo"))(b"abc") == b"abc"
    assert channel.stream_unary(path("Total"))(iter([b"a", b"b"])) == b"ab"
    stream = channel.unary_stream(path("Each"))(b"abc")
    assert list(stream) == [b"a", b"b", b"c"]
    assert trailing(stream)[NODE_KEY] == "B"
    both = channel.stream_stream(path("Back"))(iter([b"x", b"y"]))
    assert list(both) == [b"x", b"y"]
    assert trailing(both)[NODE_KEY] == "B"
    assert trailing(both)["mine"] == "kept"
    wait_until(lambda: server.node.served == 4)
    assert server.node.inflight == 0
    assert segment.status("B").failed == 0


class Gate:
    """A handler that tells that it runs, and waits to be let go."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.open = threading.Event()
        self.count = 0
        self._lock = threading.Lock()

    def __call__(self, request: bytes, context: Any) -> bytes:
        with self._lock:
            self.count += 1
        self.entered.release()
        assert self.open.wait(20)
        return request


def metadata(token: str) -> tuple[tuple[str, str], ...]:
    return ((LEASE_KEY, token),)


def code_of(call: Any) -> grpc.StatusCode:
    """The status of a call, however it ended."""
    try:
        call.result(20)
    except grpc.RpcError as error:
        return error.code()
    except grpc.FutureCancelledError:
        return grpc.StatusCode.CANCELLED
    return grpc.StatusCode.OK


def test_what_waits_in_the_executor_is_the_queue(start: Start, segment: Segment) -> None:
    gate = Gate()
    server, channel = start(2, methods={"Wait": Method(gate)})
    call = channel.unary_unary(path("Wait"))
    calls = [call.future(b"") for _ in range(7)]
    for _ in range(2):
        assert gate.entered.acquire(timeout=10)
    wait_until(lambda: server.node.waiting == 5)
    status = segment.status("B")
    assert (status.inflight, status.waiting, status.queue) == (2, 5, 7)
    gate.open.set()
    assert [code_of(c) for c in calls] == [grpc.StatusCode.OK] * 7
    wait_until(lambda: server.node.inflight == 0)
    assert (server.node.served, server.node.waiting, gate.count) == (7, 0, 7)


def test_calls_that_never_start_leave_nothing_behind(start: Start, segment: Segment) -> None:
    """Ten arrive: one runs, two wait and are cancelled, three wait, four are rejected."""
    gate = Gate()
    server, channel = start(1, methods={"Wait": Method(gate)}, maximum_concurrent_rpcs=6)
    call = channel.unary_unary(path("Wait"))
    first = call.future(b"")
    assert gate.entered.acquire(timeout=10)
    doomed = [call.future(b"") for _ in range(2)]
    wait_until(lambda: server.node.waiting == 2)
    rest = [call.future(b"") for _ in range(3)]
    wait_until(lambda: server.node.waiting == 5)
    rejected = [call.future(b"") for _ in range(4)]
    assert [code_of(c) for c in rejected] == [grpc.StatusCode.RESOURCE_EXHAUSTED] * 4
    for c in doomed:
        c.cancel()
    assert channel.unary_unary("/grpc.nothing/There").future(b"").code() is not None
    gate.open.set()
    assert [code_of(c) for c in (first, *rest)] == [grpc.StatusCode.OK] * 4
    wait_until(lambda: server.node.waiting == 0 and server.node.inflight == 0)
    assert gate.count == 4
    assert (server.node.served, server.node.failed) == (4, 0)


def test_a_note_is_never_taken_by_another_call(start: Start) -> None:
    """What a rejected call left behind, a bad lease token, is not the next call's."""
    gate = Gate()
    server, channel = start(1, methods={"Wait": Method(gate)}, maximum_concurrent_rpcs=1)
    call = channel.unary_unary(path("Wait"))
    first = call.future(b"")
    assert gate.entered.acquire(timeout=10)
    bad = call.future(b"", metadata=metadata("1-1-1-1-1-1"))
    assert code_of(bad) is grpc.StatusCode.RESOURCE_EXHAUSTED  # by gRPC, before anything of ours
    gate.open.set()
    assert code_of(first) is grpc.StatusCode.OK
    # gRPC counts a call until its pool task has ended, a moment after the client has its answer.
    wait_until(lambda: code_of(call.future(b"next")) is grpc.StatusCode.OK)
    wait_until(lambda: server.node.inflight == 0)
    assert (server.node.served, server.node.refused, server.node.waiting) == (2, 0, 0)


def test_a_submit_that_is_no_call_takes_no_note(segment: Segment) -> None:
    """Whoever gives the executor work of his own, with a call's note at hand, is not counted."""
    plug = shmcoord.grpc.instrument(
        node="B", segment=segment.name, group="GREEN", endpoint="local", capacity=1
    )
    plug.start()
    executor = plug.executor()
    handler = grpc.unary_unary_rpc_method_handler(echo)
    details = Details(path("Echo"))
    wrapped = plug.interceptor.intercept_service(lambda _: handler, details)  # type: ignore[arg-type]
    assert wrapped is not None
    # The note is there. A call without a handler wipes it, and so does one that raises.
    plug.interceptor.intercept_service(lambda _: None, details)  # type: ignore[arg-type]
    entered, leave = threading.Event(), threading.Event()

    def work() -> None:
        entered.set()
        leave.wait(10)

    first, second = executor.submit(work), executor.submit(work)
    assert entered.wait(10)
    assert plug.waiting == 0
    leave.set()
    first.result(10)
    second.result(10)
    executor.shutdown()
    assert (plug.node.served, plug.node.inflight) == (0, 0)
    plug.stop()


class Details:
    """What an interceptor gets of a call."""

    def __init__(self, method: str, *metadata: tuple[str, str]) -> None:
        self.method = method
        self.invocation_metadata = metadata


def test_what_is_thrown_out_of_the_queue_waits_no_longer(segment: Segment) -> None:
    plug = shmcoord.grpc.instrument(
        node="B", segment=segment.name, group="GREEN", endpoint="local", capacity=1
    )
    plug.start()
    executor = plug.executor()
    handler = grpc.unary_unary_rpc_method_handler(echo)
    gate = threading.Event()
    for _ in range(4):
        plug.interceptor.intercept_service(lambda _: handler, Details(path("Echo")))  # type: ignore[arg-type]
        executor.submit(gate.wait, 10)
    assert plug.node.waiting == 4  # the first has a worker, but its handler has not begun
    executor.shutdown(wait=False, cancel_futures=True)
    wait_until(lambda: plug.node.waiting == 1)
    gate.set()
    wait_until(lambda: plug.node.waiting == 0)
    assert plug.node.served == 0
    plug.stop()


def test_a_lease_is_adopted(start: Start, segment: Segment) -> None:
    gate = Gate()
    server, channel = start(1, methods={"Wait": Method(gate)}, capacity=4)
    call = channel.unary_unary(path("Wait"))
    with Router(segment.name) as router:
        leases = [router.acquire("GREEN") for _ in range(3)]
        calls = [call.future(b"")]
        assert gate.entered.acquire(timeout=10)
        calls += [call.future(b"", metadata=metadata(lease.token)) for lease in leases]
        calls.append(call.future(b""))
        wait_until(lambda: server.node.waiting == 1)
        # Those that hold a lease are in flight already, and must not be counted twice.
        status = segment.status("B")
        assert (status.inflight, status.waiting) == (4, 1)
        gate.open.set()
        assert [code_of(c) for c in calls] == [grpc.StatusCode.OK] * 5
        wait_until(lambda: server.node.inflight == 0)
        # Nothing is left to give back: the node has adopted all of them.
        assert [lease.release() for lease in leases] == [False] * 3
    assert (server.node.served, server.node.refused, server.node.waiting) == (5, 0, 0)


def test_of_several_leases_the_first_is_meant(start: Start, segment: Segment) -> None:
    """The channel puts its own before whatever interceptors add."""
    _, channel = start(methods={"Echo": Method(echo)})
    call = channel.unary_unary(path("Echo"))
    with Router(segment.name) as router:
        lease = router.acquire("GREEN")
        assert call(b"x", metadata=(*metadata(lease.token), *metadata("nonsense"))) == b"x"
        assert not lease.release(), "it was adopted"
    with pytest.raises(grpc.RpcError) as caught:
        call(b"x", metadata=metadata("nonsense"))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_lost_lease_is_refused_before_anything_is_done(start: Start, segment: Segment) -> None:
    executed = []
    server, channel = start(methods={"Echo": Method(lambda r, c: executed.append(r) or r)})
    call = channel.unary_unary(path("Echo"))
    with Router(segment.name) as router:
        lease = router.acquire("GREEN")
        lease.release()
        with pytest.raises(grpc.RpcError) as caught:
            call(b"lost", metadata=metadata(lease.token))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert trailing(caught.value)[LEASE_LOST_KEY] == lease.token
    assert trailing(caught.value)[NODE_KEY] == "B"
    with pytest.raises(grpc.RpcError) as caught:
        call(b"nonsense", metadata=metadata("nonsense"))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert LEASE_LOST_KEY not in trailing(caught.value)
    assert executed == []
    assert call(b"good") == b"good"
    wait_until(lambda: server.node.served == 1)
    assert (server.node.inflight, server.node.failed) == (0, 0)


def _raises(error: Exception) -> Callable[[bytes, Any], bytes]:
    def handler(request: bytes, context: Any) -> bytes:
        raise error

    return handler


def _aborts(code: grpc.StatusCode) -> Callable[[bytes, Any], bytes]:
    def handler(request: bytes, context: Any) -> bytes:
        context.set_trailing_metadata((("mine", "kept"),))
        context.abort(code, "no")
        raise AssertionError

    return handler


def _sets(code: grpc.StatusCode) -> Callable[[bytes, Any], bytes]:
    def handler(request: bytes, context: Any) -> bytes:
        context.set_code(code)
        return request

    return handler


@pytest.mark.parametrize(
    ("handler", "code", "failed"),
    [
        (_raises(KeyError("x")), grpc.StatusCode.UNKNOWN, 1),
        (_aborts(grpc.StatusCode.UNKNOWN), grpc.StatusCode.UNKNOWN, 1),
        (_aborts(grpc.StatusCode.INTERNAL), grpc.StatusCode.INTERNAL, 1),
        (_aborts(grpc.StatusCode.DATA_LOSS), grpc.StatusCode.DATA_LOSS, 1),
        (_aborts(grpc.StatusCode.UNAVAILABLE), grpc.StatusCode.UNAVAILABLE, 1),
        (_aborts(grpc.StatusCode.DEADLINE_EXCEEDED), grpc.StatusCode.DEADLINE_EXCEEDED, 1),
        (_sets(grpc.StatusCode.INTERNAL), grpc.StatusCode.INTERNAL, 1),
        (_aborts(grpc.StatusCode.INVALID_ARGUMENT), grpc.StatusCode.INVALID_ARGUMENT, 0),
        (_aborts(grpc.StatusCode.NOT_FOUND), grpc.StatusCode.NOT_FOUND, 0),
        (_aborts(grpc.StatusCode.CANCELLED), grpc.StatusCode.CANCELLED, 0),
        (_sets(grpc.StatusCode.NOT_FOUND), grpc.StatusCode.NOT_FOUND, 0),
        (_raises(Saturated("full", 0.25)), grpc.StatusCode.RESOURCE_EXHAUSTED, 0),
        (_raises(NoBackend("nobody")), grpc.StatusCode.UNAVAILABLE, 1),
        (lambda request, context: 7, grpc.StatusCode.INTERNAL, 1),  # cannot be serialized
    ],
)
@pytest.mark.parametrize("responses", [False, True])
def test_faults_of_the_server_count_as_failed(
    start: Start, handler: Any, code: grpc.StatusCode, failed: int, responses: bool
) -> None:
    def stream(request: bytes, context: Any) -> Iterator[Any]:
        yield handler(request, context)

    server, channel = start(
        methods={"Do": Method(stream if responses else handler, False, responses)},
        serializer=bytes_only,
    )
    if responses:
        call: Any = channel.unary_stream(path("Do"))(b"")
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
    else:
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(path("Do"))(b"")
    assert caught.value.code() is code
    found = trailing(caught.value)
    # A stream whose response cannot be serialized is ended by gRPC in the middle.
    assert found.get(NODE_KEY) == "B" or (responses and code is grpc.StatusCode.INTERNAL)
    if code is grpc.StatusCode.NOT_FOUND and "mine" in found:
        assert found["mine"] == "kept"
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        assert found["grpc-retry-pushback-ms"] == "250"
    wait_until(lambda: server.node.served == 1)
    assert server.node.failed == failed


def bytes_only(response: Any) -> bytes:
    assert isinstance(response, bytes)
    return response


def test_a_deadline_that_passes_in_the_handler_is_a_fault(start: Start) -> None:
    """A client that goes for another reason is none."""
    gate = Gate()
    server, channel = start(2, methods={"Wait": Method(gate)})
    call = channel.unary_unary(path("Wait"))
    late = call.future(b"", timeout=0.2)
    gone = call.future(b"")
    assert gate.entered.acquire(timeout=10)
    assert gate.entered.acquire(timeout=10)
    assert code_of(late) is grpc.StatusCode.DEADLINE_EXCEEDED
    gone.cancel()
    gate.open.set()
    wait_until(lambda: server.node.served == 2)
    assert server.node.failed == 1


def test_a_stream_that_the_client_leaves_is_ended(start: Start) -> None:
    closed = threading.Event()

    def endless(request: bytes, context: Any) -> Iterator[bytes]:
        try:
            while True:
                yield b"x"
        finally:
            closed.set()

    server, channel = start(1, methods={"Endless": Method(endless, False, True)})
    stream = channel.unary_stream(path("Endless"))(b"")
    assert next(stream) == b"x"
    assert (server.node.inflight, server.node.served) == (1, 0)
    stream.cancel()
    assert closed.wait(10)
    wait_until(lambda: server.node.inflight == 0)
    assert (server.node.served, server.node.failed) == (1, 0)


def test_infrastructure_occupies_no_worker_and_is_not_counted(start: Start) -> None:
    gate = Gate()
    server, channel = start(1, methods={"Wait": Method(gate)}, handlers=[infrastructure()])
    busy = channel.unary_unary(path("Wait")).future(b"")
    assert gate.entered.acquire(timeout=10)
    watches = [channel.unary_stream("/grpc.health.v1.Health/Watch")(b"") for _ in range(3)]
    assert [next(watch) for watch in watches] == [b"serving"] * 3
    assert (server.node.inflight, server.node.waiting) == (1, 0)
    for watch in watches:
        watch.cancel()
    gate.open.set()
    assert code_of(busy) is grpc.StatusCode.OK
    wait_until(lambda: server.node.inflight == 0)
    assert server.node.served == 1


def test_watches_do_not_stand_in_the_way_of_refusals(start: Start) -> None:
    """They occupy every thread of what runs beside the workers."""

    def back(requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        yield from requests

    server, channel = start(
        1,
        methods={"Echo": Method(echo), "Back": Method(back, True, True)},
        handlers=[infrastructure()],
    )
    watches = []
    for number in range(20):
        watches.append(channel.unary_stream("/grpc.health.v1.Health/Watch")(b""))
        if number < 16:
            assert next(watches[-1]) == b"serving"
    server._plug.drain()
    refused = [channel.unary_unary(path("Echo")).future(b"x", timeout=5) for _ in range(40)]
    never_sent = channel.stream_stream(path("Back"))(iter(threading.Event().wait, True), timeout=5)
    assert {code_of(call) for call in [*refused, never_sent]} == {grpc.StatusCode.UNAVAILABLE}
    assert {call.details() for call in [*refused, never_sent]} == {"node B is draining"}
    assert trailing(refused[0])[NODE_KEY] == "B"
    assert (server.node.served, server.node.inflight) == (0, 0)
    for watch in watches:
        watch.cancel()


class Sending:
    """A stream that does not occupy its thread: `send` is used by the test, or by `behave`."""

    experimental_non_blocking = True

    def __init__(self, behave: Callable[[Any, Any], None] = lambda context, send: None) -> None:
        self.began = threading.Event()
        self._behave = behave
        self.send: Any = None
        self.context: Any = None
        self.thread = ""

    def __call__(self, request: bytes, context: Any, send: Callable[[Any], None]) -> None:
        self.context, self.send = context, send
        self.thread = threading.current_thread().name
        self.began.set()
        self._behave(context, send)


@pytest.fixture(params=["plain", "ours"])
def sending(request: pytest.FixtureRequest, start: Start) -> Iterator[Callable[..., Any]]:
    """Serves a `Sending` by one worker; plain gRPC is the control. Yields what makes the channel.

    With it comes what tells the counts of the node: served, failed, in flight.
    """
    open_things: list[Any] = []

    def make(handler: Sending, serializer: Any = None) -> tuple[grpc.Channel, Any]:
        methods = {"Send": Method(handler, False, True), "Echo": Method(echo)}
        if request.param == "ours":
            server, channel = start(1, methods=methods, serializer=serializer)
            node = server.node
            return channel, lambda: (node.served, node.failed, node.inflight)
        plain = grpc.server(ThreadPoolExecutor(1))
        plain.add_generic_rpc_handlers((service(serializer, **methods),))
        port = plain.add_insecure_port("127.0.0.1:0")
        plain.start()
        channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        open_things.append((plain, channel))
        return channel, None

    yield make
    for plain, channel in open_things:
        channel.close()
        plain.stop(None).wait(10)


def test_a_handler_that_does_not_block_sends_from_other_threads(
    sending: Callable[..., Any],
) -> None:
    """It is in flight until its end, and its only worker is free meanwhile."""
    handler = Sending()
    channel, counts = sending(handler)
    call = channel.unary_stream(path("Send"))(b"", timeout=20)
    assert handler.began.wait(10)
    assert channel.unary_unary(path("Echo"))(b"x", timeout=10) == b"x"
    if counts:
        wait_until(lambda: counts() == (1, 0, 1))
    for response in (b"1", b"2"):
        handler.send(response)
        assert next(call) == response
    if counts:
        assert counts() == (1, 0, 1)
    handler.context.set_trailing_metadata((("mine", "kept"),))
    handler.send(None)
    assert list(call) == []
    assert call.code() is grpc.StatusCode.OK
    assert trailing(call)["mine"] == "kept"
    if counts:
        assert trailing(call)[NODE_KEY] == "B"
        wait_until(lambda: counts() == (2, 0, 0))


def test_a_handler_that_does_not_block_may_end_at_once_or_fail(
    sending: Callable[..., Any],
) -> None:
    def behave(context: Any, send: Any) -> None:
        send(b"1")
        if how == "raise":
            raise ValueError("oops")
        if how == "abort":
            context.abort(grpc.StatusCode.INTERNAL, "oops")
        context.set_code(grpc.StatusCode.NOT_FOUND)
        send(None)

    channel, counts = sending(Sending(behave))
    failed = 0
    for number, (how, code) in enumerate(
        [
            ("raise", grpc.StatusCode.UNKNOWN),
            ("abort", grpc.StatusCode.INTERNAL),
            ("end", grpc.StatusCode.NOT_FOUND),
        ],
        1,
    ):
        call = channel.unary_stream(path("Send"))(b"", timeout=10)
        assert next(call) == b"1"
        assert code_of(call) is code
        failed += how != "end"
        if counts:
            wait_until(lambda: counts() == (number, failed, 0))  # noqa: B023 - within its round


def test_a_handler_that_does_not_block_ends_with_its_call(sending: Callable[..., Any]) -> None:
    """Gone is no failure; late is one; a response that cannot be serialized too."""

    def serialize(response: bytes) -> bytes:
        if response == b"bad":
            raise ValueError("oops")
        return response

    handler = Sending()
    channel, counts = sending(handler, serialize)
    call = channel.unary_stream(path("Send"))
    gone = call(b"")
    assert handler.began.wait(10)
    gone.cancel()
    if counts:
        wait_until(lambda: counts() == (1, 0, 0))
    assert code_of(call(b"", timeout=0.1)) is grpc.StatusCode.DEADLINE_EXCEEDED
    if counts:
        wait_until(lambda: counts() == (2, 1, 0))
    handler.began.clear()
    unserialized = call(b"", timeout=10)
    assert handler.began.wait(10)
    handler.send(b"bad")
    assert code_of(unserialized) is grpc.StatusCode.INTERNAL
    if counts:
        wait_until(lambda: counts() == (3, 2, 0))


def test_a_handler_with_a_pool_of_its_own_runs_there(sending: Callable[..., Any]) -> None:
    handler = Sending(lambda context, send: send(None))
    with ThreadPoolExecutor(1, thread_name_prefix="own") as pool:
        handler.experimental_thread_pool = pool  # type: ignore[attr-defined]
        channel, counts = sending(handler)
        assert list(channel.unary_stream(path("Send"))(b"", timeout=10)) == []
        assert handler.thread.startswith("own")
        if counts:
            wait_until(lambda: counts() == (1, 0, 0))


def test_draining_waits_for_a_handler_that_does_not_block(start: Start, segment: Segment) -> None:
    """One that came with a lease is counted by it alone; it may finish."""
    handler = Sending()
    server, channel = start(1, methods={"Send": Method(handler, False, True)}, capacity=2)
    with Router(segment.name) as router:
        lease = router.acquire("GREEN")
        call = channel.unary_stream(path("Send"))(b"", timeout=20, metadata=metadata(lease.token))
        assert handler.began.wait(10)
        assert server.node.inflight == 1
        stopped = server.stop(10)
        assert not stopped.wait(0.1)
        handler.send(b"last")
        handler.send(None)
        assert list(call) == [b"last"]
        assert stopped.wait(5)


def infrastructure() -> grpc.GenericRpcHandler:
    """A health service that blocks while it is watched."""

    def watch(request: bytes, context: Any) -> Iterator[bytes]:
        over = threading.Event()
        context.add_callback(over.set)
        yield b"serving"
        over.wait(20)

    method = grpc.unary_stream_rpc_method_handler(watch)
    return grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Watch": method})


def test_draining_serves_leases_of_before_and_refuses_the_rest(
    start: Start, segment: Segment
) -> None:
    """Health is told after DRAINING is published, and the end is SHUTDOWN and an empty slot."""
    gate = Gate()
    seen: list[Any] = []

    class Health:
        def enter_graceful_shutdown(self) -> None:
            seen.append(segment.status("B").state)

    server, channel = start(2, methods={"Wait": Method(gate)}, health=Health(), capacity=4)
    node = server.node
    call = channel.unary_unary(path("Wait"))
    with Router(segment.name) as router:
        lease = router.acquire("GREEN")
        running = call.future(b"")
        assert gate.entered.acquire(timeout=10)
        stopped = server.stop(20)
        assert not stopped.is_set()
        wait_until(lambda: seen)
        assert seen == [State.DRAINING]
        fresh = call.future(b"")
        assert code_of(fresh) is grpc.StatusCode.UNAVAILABLE
        assert "draining" in fresh.details()
        assert gate.count == 1
        held = call.future(b"", metadata=metadata(lease.token))
        assert gate.entered.acquire(timeout=10)
        assert not stopped.wait(0.05)
        gate.open.set()
        assert [code_of(c) for c in (running, held)] == [grpc.StatusCode.OK] * 2
    assert stopped.wait(10)
    assert server.wait_for_termination(0) is False
    assert node.left
    assert node.served == 2
    assert segment.snapshot() == ()


def test_a_lease_that_never_comes_ends_with_the_grace_period(
    start: Start, segment: Segment
) -> None:
    server, _ = start(methods={"Echo": Method(echo)})
    with Router(segment.name) as router, router.acquire("GREEN"):
        began = time.monotonic()
        stopped = server.stop(0.3)
        assert stopped.wait(10)
        assert 0.3 <= time.monotonic() - began < 5


@pytest.mark.parametrize("grace", [None, 0.1])
def test_whoever_has_no_answer_is_told_unavailable(start: Start, grace: float | None) -> None:
    """Never CANCELLED, which no client retries: what runs, what waits, what comes meanwhile."""
    gate = Gate()
    server, channel = start(2, methods={"Wait": Method(gate)})
    call = channel.unary_unary(path("Wait"))
    calls = [call.future(b"") for _ in range(5)]
    for _ in range(2):
        assert gate.entered.acquire(timeout=10)
    wait_until(lambda: server.node.waiting == 3)
    codes: list[grpc.StatusCode] = []
    over = threading.Event()

    def arrive() -> None:
        while not over.is_set():
            codes.append(code_of(call.future(b"", timeout=5)))

    arriving = threading.Thread(target=arrive)
    arriving.start()
    stopped = server.stop(grace)
    assert stopped.wait(10)
    assert [code_of(c) for c in calls] == [grpc.StatusCode.UNAVAILABLE] * 5
    wait_until(lambda: len(codes) > 3)
    over.set()
    arriving.join()
    assert set(codes) == {grpc.StatusCode.UNAVAILABLE}
    gate.open.set()
    assert gate.count == 2


def test_a_second_stop_shortens_the_first(start: Start) -> None:
    gate = Gate()
    server, channel = start(1, methods={"Wait": Method(gate)})
    call = channel.unary_unary(path("Wait")).future(b"")
    assert gate.entered.acquire(timeout=10)
    first = server.stop(60)
    assert not first.wait(0.05)
    assert server.wait_for_termination(0.01) is True
    began = time.monotonic()
    assert server.stop(None).is_set()
    assert time.monotonic() - began < 5
    assert first.is_set()
    assert code_of(call) is grpc.StatusCode.UNAVAILABLE
    gate.open.set()
    assert server.stop(1).is_set()


def test_starting_and_stopping_out_of_order(segment: Segment) -> None:
    def new(node: str = "B", **options: Any) -> Any:
        return shmcoord.grpc.server(1, node=node, segment=segment.name, group="GREEN", **options)

    never = new()
    with pytest.raises(ValueError, match="no port"):
        never.start()
    with pytest.raises(RuntimeError, match="start it first"):
        never.node  # noqa: B018
    assert never.stop(None).is_set()
    assert segment.snapshot() == ()

    server = new()
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with pytest.raises(ValueError, match="already-started"):
        server.start()
    other = new("C")
    with pytest.raises(RuntimeError, match="bind"):
        other.add_insecure_port(f"127.0.0.1:{port}")
    other.stop(None)

    twin = new("B")
    twin_port = twin.add_insecure_port("127.0.0.1:0")
    with pytest.raises(NodeExists):
        twin.start()
    # It is stopped again: nobody listens there.
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", twin_port)):
        pass
    assert twin.stop(None).is_set()
    assert server.node.state is State.IDLE
    server.stop(None)
    with pytest.raises(ValueError, match="already-started"):
        server.start()
    again = new("B", endpoint="unix:elsewhere")
    again.add_insecure_port(f"127.0.0.1:{port}")
    again.start()
    assert segment.status("B").endpoint == "unix:elsewhere"
    again.stop(None)


def test_the_child_of_a_fork_cannot_stop_the_server(name: str) -> None:
    said = run(
        """
import warnings
warnings.simplefilter("ignore")
import shmcoord.grpc
server = shmcoord.grpc.server(1, node="B", segment=name, group="G")
server.add_insecure_port("127.0.0.1:0")
server.start()
def child():
    try:
        server.stop(None)
    except ForkedHandle as error:
        return 7
pid = forked(child)
say(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), Segment.attach(name).status("B").state.name)
server.stop(None)
say("stopped")
Segment.unlink(name)
""",
        name,
    )
    assert said.split() == ["7", "IDLE", "stopped"]


def test_excluded_methods_are_no_load_and_go_on_while_it_drains(
    start: Start, segment: Segment
) -> None:
    seen = []

    def ask(request: bytes, context: Any) -> bytes:
        status = segment.status("B")
        seen.append((status.inflight, status.waiting, status.state))
        return request

    server, channel = start(
        methods={"Echo": Method(echo), "Ask": Method(ask)}, exclude=[path("As")]
    )
    call, echoed = channel.unary_unary(path("Ask")), channel.unary_unary(path("Echo"))
    assert call(b"x") == b"x"
    assert echoed(b"x") == b"x"
    server._plug.drain()
    assert call(b"x") == b"x"
    with pytest.raises(grpc.RpcError) as refused:
        echoed(b"x")
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert seen == [(0, 0, State.IDLE), (0, 0, State.DRAINING)]
    wait_until(lambda: server.node.served == 1)
    with pytest.raises(TypeError, match="exclude"):
        shmcoord.grpc.server(node="C", segment=segment.name, group="GREEN", exclude="/a/")
