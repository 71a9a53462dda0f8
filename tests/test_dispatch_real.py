"""Dispatcher, router and nodes together over real shared memory, by three transports.

One of them is a third party's: HTTP/1.1 by the standard library, written against nothing but
the documentation of `shmcoord.transport`.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import shmcoord
from shmcoord import AsyncDispatcher, Dispatcher, LeaseLost, NoBackend, Router, Saturated
from shmcoord.dispatch import NoneReachable
from shmcoord.transport import ConnectionLost, Transport, Unreachable
from shmcoord.transport.local import AsyncLocalTransport, LocalTransport


@pytest.fixture
def router(segment):
    with Router(segment) as router:
        yield router


def join(segment, *names, **options):
    return [
        segment.join(name, group="GREEN", endpoint=f"local:{name}", **options) for name in names
    ]


def adopting(node):
    def answer(request, lease):
        with node.adopt(lease):
            return node.name, request

    return {"answer": answer}


def inflight(segment):
    return sum(status.inflight for status in segment.snapshot())


# --- the local transports


def test_calls_spread_and_leave_nothing_behind(segment, router):
    nodes = join(segment, "A", "B")
    with LocalTransport({node.endpoint: adopting(node) for node in nodes}) as transport:
        dispatcher = Dispatcher(router, transport, adopts=True)
        served = {dispatcher.call("GREEN", "answer", n)[0] for n in range(40)}
    assert served == {"A", "B"}
    assert inflight(segment) == 0
    assert sum(status.served for status in segment.snapshot()) == 40


def test_a_node_without_a_server_is_passed_over(segment, router):
    here, _gone = join(segment, "here", "gone")
    seen = []
    with LocalTransport({here.endpoint: adopting(here)}) as transport:
        dispatcher = Dispatcher(
            router, transport, on_decision=lambda decision, lease: seen.append(decision)
        )
        for n in range(10):
            assert dispatcher.call("GREEN", "answer", n) == ("here", n)
    assert inflight(segment) == 0
    assert {decision.chosen.node for decision in seen} <= {"here", "gone"}
    assert "selected: here for" in str(seen[-1])


def test_with_nobody_reachable_each_is_tried_once(segment, router):
    nodes = join(segment, "A", "B", "C")
    dispatcher = Dispatcher(router, LocalTransport({}))
    with pytest.raises(NoneReachable) as caught:
        dispatcher.call("GREEN", "answer", None)
    assert sorted(attempt.node for attempt in caught.value.tried) == [n.name for n in nodes]
    assert inflight(segment) == 0


def test_a_lease_lost_on_the_way_is_tried_elsewhere(segment, router):
    """The node finds the lease gone (here: released by somebody), and has done nothing."""
    nodes = join(segment, "A", "B")
    done = []

    def handlers(node):
        def answer(request, lease):
            if not done:
                done.append("refused")
                raise LeaseLost("reaped")
            with node.adopt(lease):
                done.append(node.name)
                return node.name

        return {"answer": answer}

    dispatcher = Dispatcher(router, LocalTransport({n.endpoint: handlers(n) for n in nodes}))
    assert dispatcher.call("GREEN", "answer", None) in {"A", "B"}
    assert len(done) == 2
    assert inflight(segment) == 0


@pytest.mark.parametrize("adopted", [False, True])
def test_only_an_unadopted_lease_proves_that_nothing_was_done(segment, router, adopted):
    nodes = join(segment, "A", "B")
    executed = []

    def handlers(node):
        def answer(request, lease):
            if not executed and not adopted:
                executed.append("lost before adoption")
                raise ConnectionLost("reset")
            with node.adopt(lease):
                executed.append(node.name)
                if adopted:
                    raise ConnectionLost("reset")
                return node.name

        return {"answer": answer}

    transport = LocalTransport({node.endpoint: handlers(node) for node in nodes})
    dispatcher = Dispatcher(router, transport, adopts=True)
    if adopted:
        with pytest.raises(ConnectionLost):
            dispatcher.call("GREEN", "answer", None)
        assert len(executed) == 1
    else:
        assert dispatcher.call("GREEN", "answer", None) == executed[1]
    assert inflight(segment) == 0


def test_no_group_and_no_room(segment, router):
    (node,) = join(segment, "A", capacity=1)
    dispatcher = Dispatcher(router, LocalTransport({node.endpoint: adopting(node)}))
    with pytest.raises(NoBackend):
        dispatcher.call("PINK", "answer", None)
    with node.request(), pytest.raises(Saturated):
        dispatcher.call("GREEN", "answer", None, timeout_s=0.05)
    assert dispatcher.call("GREEN", "answer", 1, timeout_s=5.0) == ("A", 1)


def test_a_call_waits_for_room(segment, router):
    (node,) = join(segment, "A", capacity=1)
    dispatcher = Dispatcher(router, LocalTransport({node.endpoint: adopting(node)}))
    request = node.begin()
    timer = threading.Timer(0.1, request.end)
    timer.start()
    assert dispatcher.call("GREEN", "answer", 1, timeout_s=5.0) == ("A", 1)
    timer.join()


async def test_a_forgotten_stream_frees_its_lease(segment, router):
    (node,) = join(segment, "A")

    async def count(request):
        for number in range(10):
            yield number

    async with AsyncLocalTransport({node.endpoint: {"count": count}}) as transport:
        dispatcher = AsyncDispatcher(router, transport)
        stream = dispatcher.stream("GREEN", "count", None, timeout_s=5.0)
        assert await anext(stream) == 0
        assert inflight(segment) == 1
        del stream
        assert inflight(segment) == 0
        assert [n async for n in dispatcher.stream("GREEN", "count", None)] == list(range(10))
        assert inflight(segment) == 0


async def test_a_cancelled_call_frees_its_lease(segment, router):
    (node,) = join(segment, "A", capacity=1)

    async def stuck(request):
        await asyncio.sleep(60)

    dispatcher = AsyncDispatcher(router, AsyncLocalTransport({node.endpoint: {"stuck": stuck}}))
    running = asyncio.ensure_future(dispatcher.call("GREEN", "stuck", None))
    await asyncio.sleep(0.01)
    waiting = asyncio.ensure_future(dispatcher.call("GREEN", "stuck", None, timeout_s=30.0))
    await asyncio.sleep(0.01)
    assert inflight(segment) == 1
    for task in (waiting, running):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert inflight(segment) == 0


# --- a third party's transport


class HttpTransport:
    """POST /method to the node, with the lease in a header."""

    def __init__(self):
        self._idle = []

    def send(self, endpoint, method, request, *, lease, timeout_s):
        connection = http.client.HTTPConnection(endpoint, timeout=timeout_s)
        try:
            try:
                connection.connect()
            except OSError as error:
                raise Unreachable(f"{endpoint}: {error}") from error
            try:
                connection.request("POST", f"/{method}", request, {"X-Lease": lease})
                response = connection.getresponse()
                body = response.read()
            except TimeoutError:
                raise
            except (OSError, http.client.HTTPException) as error:
                raise ConnectionLost(f"{endpoint}: {error}") from error
        finally:
            connection.close()
        if response.status == 409:
            raise LeaseLost(body.decode())
        if response.status != 200:
            raise RuntimeError(f"{response.status} {body.decode()}")
        return body

    def close(self):
        pass


@contextlib.contextmanager
def http_node(segment, name, before_adoption=lambda: None):
    """A node that serves HTTP: it adopts the lease, then answers with its name."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if before_adoption() == "hang up":
                self.close_connection = True
                return
            try:
                work = node.adopt(self.headers["X-Lease"])
            except LeaseLost as error:
                self.reply(409, str(error).encode())
                return
            try:
                with work:
                    if body == b"fail":
                        raise ArithmeticError("in the node")
                    answer = name.encode() + b" " + body
            except ArithmeticError as error:
                self.reply(500, str(error).encode())
            else:
                self.reply(200, answer)

        def reply(self, status, body):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    endpoint = f"127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        with segment.join(name, group="GREEN", endpoint=endpoint) as node:
            yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_third_partys_transport(segment, router):
    transport = HttpTransport()
    assert isinstance(transport, Transport)
    dispatcher = Dispatcher(router, transport, adopts=True)
    with http_node(segment, "A"), http_node(segment, "B") as second:
        answers = {dispatcher.call("GREEN", "search", b"x", timeout_s=5.0) for _ in range(30)}
        assert answers == {b"A x", b"B x"}
        with pytest.raises(RuntimeError, match="in the node"):
            dispatcher.call("GREEN", "search", b"fail", timeout_s=5.0)
        second.socket.close()  # B still lives in the segment, but nobody listens
        answers = {dispatcher.call("GREEN", "search", b"x", timeout_s=5.0) for _ in range(10)}
        assert answers == {b"A x"}
        assert segment.status("A").failed + segment.status("B").failed == 1
        assert inflight(segment) == 0


def test_a_third_partys_broken_connection_goes_elsewhere_only_unadopted(segment, router):
    hang_up_once = iter(["hang up"])
    transport = HttpTransport()
    with (
        http_node(segment, "A", lambda: next(hang_up_once, None)),
        http_node(segment, "B", lambda: next(hang_up_once, None)),
    ):
        careful = Dispatcher(router, transport)
        trusting = Dispatcher(router, transport, adopts=True)
        assert trusting.call("GREEN", "search", b"x", timeout_s=5.0) in {b"A x", b"B x"}
        assert sum(status.served for status in segment.snapshot()) == 1
        hang_up_once = iter(["hang up"])
        with pytest.raises(ConnectionLost):
            careful.call("GREEN", "search", b"x", timeout_s=5.0)
        assert inflight(segment) == 0


def test_the_dispatchers_are_part_of_the_package():
    assert shmcoord.Dispatcher is Dispatcher
    assert shmcoord.AsyncDispatcher is AsyncDispatcher


def test_slow_failures_do_not_lead_in_a_circle(segment, name):
    """Two nodes that take longer to fail than their mark lasts: the third is asked all the same."""
    asked = []

    class Slow:
        def send(self, endpoint, method, request, *, lease, timeout_s):
            asked.append(endpoint)
            if endpoint != "c":
                router.mark_reachable(segment.backend(endpoint.upper()))
                raise Unreachable(f"no connection to {endpoint}")
            return request

        def close(self):
            pass

    with contextlib.ExitStack() as stack:
        router = stack.enter_context(shmcoord.Router(name))
        for node in "ABC":
            stack.enter_context(segment.join(node, group="G", endpoint=node.lower()))
        segment_c = segment.backend("C")
        with shmcoord.Router(name) as other, other.acquire("G", exclude=(segment.backend("A"),)):
            assert segment_c.alive
            assert shmcoord.Dispatcher(router, Slow()).call("G", "m", 7, timeout_s=20) == 7
    assert asked[-1] == "c"
    assert len(asked) == len(set(asked))
