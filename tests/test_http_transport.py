"""The httpx transports: where a request goes, what may be repeated, and that no lease stays."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from helpers import Raw, wait_until
from http_helpers import TEXT, Servers, bound, ok, serving, text

import shmcoord
from shmcoord import NoneReachable, Router
from shmcoord.http import AsyncTransport, Middleware, Transport
from shmcoord.http._sending import tls

URL = "http://green/path?q=1"


class SyncSide:
    """A client in the calling thread."""

    kind = "sync"

    def __init__(self, *segments, **options):
        options.setdefault("group", "GREEN")
        self.transport = Transport(*segments, **options)
        self.client = httpx.Client(transport=self.transport)
        self.run = lambda result: result

    def request(self, method="GET", url=URL, **options):
        return self.run(self.client.request(method, url, **options))

    def open(self, method="GET", url=URL, **options):
        """Send a request; the response is not read yet."""
        return self.run(
            self.client.send(self.client.build_request(method, url, **options), stream=True)
        )

    def body(self, *parts):
        """A body that can be read once; counts how often it is."""

        def make():
            self.reads += 1
            yield from parts

        self.reads = 0
        return make()

    def read(self, response):
        return response.read()

    def close_response(self, response):
        response.close()

    def parts(self, response):
        return response.iter_raw(1)

    def part(self, parts):
        return next(parts)

    def close_transport(self):
        self.transport.close()

    def close(self):
        self.client.close()


class AsyncSide(SyncSide):
    """The same on an event loop that runs while a call does."""

    kind = "async"

    def __init__(self, *segments, **options):
        options.setdefault("group", "GREEN")
        self.transport = AsyncTransport(*segments, **options)
        self.client = httpx.AsyncClient(transport=self.transport)
        self.loop = asyncio.new_event_loop()
        self.run = self.loop.run_until_complete

    def body(self, *parts):
        async def make():
            self.reads += 1
            for part in parts:
                yield part

        self.reads = 0
        return make()

    def read(self, response):
        return self.run(response.aread())

    def close_response(self, response):
        self.run(response.aclose())

    def parts(self, response):
        return response.aiter_raw(1)

    def part(self, parts):
        return self.run(parts.__anext__())

    def close_transport(self):
        self.run(self.transport.aclose())

    def close(self):
        self.run(self.client.aclose())
        self.run(self.loop.shutdown_asyncgens())
        self.loop.close()


@pytest.fixture(params=[SyncSide, AsyncSide], ids=["sync", "async"])
def make_side(request):
    """Makes clients of either kind, which are closed with the test."""
    with contextlib.ExitStack() as sides:

        def make(*segments, **options):
            side = request.param(*segments, **options)
            sides.callback(lambda: side.close())
            return side

        yield make


@pytest.fixture
def side(make_side, segment):
    return make_side(segment)


@pytest.fixture(scope="module")
def servers():
    servers = Servers()
    yield servers
    servers.close()


@pytest.fixture
def web(segment, servers):
    """Starts nodes of uvicorn, which leave with the test."""
    with contextlib.ExitStack() as nodes:
        yield lambda app, name, **options: nodes.enter_context(
            servers.node(app, segment, name, **options)
        )


@pytest.fixture
def raw(segment):
    """Starts nodes whose connections are served by a function of the test, one after another."""
    stop = threading.Event()
    threads = []
    live = set()

    def start(name, serve, **options):
        sock, endpoint = bound()
        sock.listen()
        sock.settimeout(0.05)
        options = {"group": "GREEN", "endpoint": endpoint, "interval_s": 3600, **options}
        node = segment.join(name, **options)

        def accept():
            while not stop.is_set():
                with contextlib.suppress(TimeoutError), sock.accept()[0] as connection:
                    connection.settimeout(5)
                    live.add(connection)
                    serve(node, connection)
                    live.remove(connection)
            sock.close()

        threads.append(threading.Thread(target=accept))
        threads[-1].start()
        return node

    yield start
    stop.set()
    for connection in list(live):
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
    for thread in threads:
        thread.join()


def heads(connection):
    """The heads of the requests that come over a connection; bodies of b"body" are read."""
    data = b""
    while True:
        while b"\r\n\r\n" not in data:
            more = connection.recv(65536)
            if not more:
                return
            data += more
        head, data = data.split(b"\r\n\r\n", 1)
        if head.startswith(b"POST"):
            while len(data) < 4:
                data += connection.recv(65536)
            data = data[4:]
        yield head


def token_of(head):
    [line] = [line for line in head.split(b"\r\n") if line.lower().startswith(b"shmcoord-lease:")]
    return line.split(b": ")[1].decode()


def answer(connection, *headers, body=b"raw", status=b"200 OK"):
    lines = [b"HTTP/1.1 " + status, b"Content-Length: %d" % len(body), *headers, b"", body]
    connection.sendall(b"\r\n".join(lines))


def second(node):
    """Make a node the second choice of `least-loaded`."""
    node = getattr(node, "node", node)
    node.waiting = 5
    return node


def nothing_held(name):
    wait_until(lambda: Raw(name).taken() == 0)


# --- the way of a request


def test_a_request_reaches_the_node_as_it_was_made(name, side, web):
    seen = []

    async def app(scope, receive, send):
        assert scope["type"] == "http"
        body = b""
        while True:
            event = await receive()
            body += event.get("body", b"")
            if not event.get("more_body"):
                break
        node = scope["shmcoord.node"]
        seen.append(
            (scope["method"], scope["raw_path"], scope["query_string"], body, node.inflight)
        )
        seen.append(dict(scope["headers"]))
        await text(send, 201)

    node = web(app, "B").node
    response = side.request(
        "PUT",
        "http://green/a%2Fb?q=%20x",
        content=b"abc",
        headers={"x-own": "1", "shmcoord-lease": "no"},
    )
    assert (response.status_code, response.content) == (201, b"ok")
    assert response.extensions["shmcoord_node"] == "B"
    assert response.url == "http://green/a%2Fb?q=%20x"
    assert seen[0] == ("PUT", b"/a%2Fb", b"q=%20x", b"abc", 1)
    assert seen[1][b"host"] == b"green"
    assert seen[1][b"x-own"] == b"1"
    assert "shmcoord-lease" in response.request.headers  # the caller's own request is not touched
    assert response.request.headers["shmcoord-lease"] == "no"
    side.request("POST", content=side.body(b"one", b"two"), headers={"Host": "other.example"})
    assert seen[2][3] == b"onetwo"
    assert seen[3][b"host"] == b"other.example"
    assert (node.served, node.failed, node.inflight, node.refused) == (2, 0, 0, 0)
    nothing_held(name)


def test_requests_go_to_the_least_loaded(side, web):
    nodes = {name: web(ok, name).node for name in "ABC"}
    for name in "CAB":
        for other, node in nodes.items():
            node.waiting = 0 if other == name else 3
        assert side.request().extensions["shmcoord_node"] == name


def test_cost_and_key_come_as_an_extension(segment, make_side, web):
    seen = []

    async def app(scope, receive, send):
        assert scope["type"] == "http"
        node = scope["shmcoord.node"]
        seen.append((node.name, node.inflight))
        await text(send)

    for name in "ABCD":
        web(app, name)
    side = make_side(segment, policy="affinity")
    for key in ("x", b"y", 7):
        seen.clear()
        for _ in range(6):
            side.request(extensions={"shmcoord": {"key": key, "cost": 3}})
        assert len(set(seen)) == 1
        assert seen[0][1] == 3
    seen.clear()
    for key in range(20):
        side.request(extensions={"shmcoord": {"key": key}})
    assert len({node for node, _ in seen}) > 1
    assert {cost for _, cost in seen} == {1}
    with pytest.raises(ValueError, match="cost"):
        side.request(extensions={"shmcoord": {"cost": 0}})


def test_a_unix_socket(tmp_path, name, segment, make_side):
    path = str(tmp_path / "web.sock")
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(path)
    node = Middleware(ok, node="B", segment=segment, group="GREEN", endpoint=f"unix:{path}")
    with serving(node, sock):
        side = make_side(segment)
        for _ in range(3):
            assert side.request().extensions["shmcoord_node"] == "B"
        inner = httpx.HTTPTransport() if side.kind == "sync" else httpx.AsyncHTTPTransport()
        other = make_side(segment, transport=inner)
        with pytest.raises(httpx.UnsupportedProtocol, match="unix:"):
            other.request()
        nothing_held(name)


def test_the_certificate_is_the_services(segment, make_side):
    seen = []

    def handle(request):
        seen.append((str(request.url), request.extensions.get("sni_hostname")))
        return httpx.Response(200, text="x")

    with segment.join("B", group="GREEN", endpoint="127.0.0.1:9", interval_s=3600) as node:
        side = make_side(segment, transport=httpx.MockTransport(handle))
        side.request(url="https://green.example/x")
        side.request(url="https://green.example/x", extensions={"sni_hostname": "own"})
        side.request(url="http://green.example/x")
        assert node.inflight == 0  # though the answer was whole before anybody read it
    assert seen == [
        ("https://127.0.0.1:9/x", "green.example"),
        ("https://127.0.0.1:9/x", "own"),
        ("http://127.0.0.1:9/x", None),
    ]


# --- no node


def test_saturated_is_a_time_out_of_the_pool(name, side, web):
    web(ok, "B", capacity=1)
    with side.transport._sender.router.acquire("GREEN"):
        began = time.monotonic()
        with pytest.raises(shmcoord.http.Saturated) as caught:
            side.request(timeout=httpx.Timeout(5, pool=0.1))
        assert 0.1 <= time.monotonic() - began < 2
    error = caught.value
    assert isinstance(error, shmcoord.Saturated)
    assert isinstance(error, httpx.PoolTimeout)
    assert isinstance(error, httpx.HTTPError)
    assert error.request.url == URL
    assert [(c.node, c.capacity) for c in error.candidates] == [("B", 1)]
    assert side.request().status_code == 200
    nothing_held(name)


def test_a_request_waits_for_capacity(side, web):
    web(ok, "B", capacity=1)
    lease = side.transport._sender.router.acquire("GREEN")
    timer = threading.Timer(0.1, lease.release)
    timer.start()
    began = time.monotonic()
    assert side.request(timeout=httpx.Timeout(5, pool=10)).status_code == 200
    assert 0.09 <= time.monotonic() - began < 5
    timer.join()


@pytest.mark.parametrize("pool_s", [None, 10])
def test_nobody_waits_longer_than_the_transport_says(segment, make_side, pool_s):
    side = make_side(segment, max_wait_s=0.05)
    with (
        segment.join("B", group="GREEN", endpoint="e:1", capacity=1, interval_s=3600) as node,
        node.request(),
    ):
        began = time.monotonic()
        with pytest.raises(shmcoord.http.Saturated):
            side.request(timeout=httpx.Timeout(5, pool=pool_s))
        assert 0.05 <= time.monotonic() - began < 2


def test_no_backend_is_a_failed_connection(side):
    with pytest.raises(shmcoord.http.NoBackend) as caught:
        side.request()
    assert isinstance(caught.value, shmcoord.NoBackend)
    assert isinstance(caught.value, httpx.ConnectError)
    assert not isinstance(caught.value, NoneReachable)
    assert caught.value.candidates == ()
    side.close_transport()
    assert caught.value.candidates == ()


# --- failing over


def test_a_refused_connection_leads_elsewhere(name, segment, side, web):
    second(web(ok, "B"))
    closed, endpoint = bound()
    with closed, segment.join("A", group="GREEN", endpoint=endpoint, interval_s=3600):
        for number in range(3):
            body = side.body(b"x", b"y")  # it can be sent once, and was not
            response = side.request("POST", content=body)
            assert (number, response.extensions["shmcoord_node"]) == (number, "B")
            assert side.reads == 1
    nothing_held(name)


def test_when_none_is_reachable_all_are_named(name, segment, side):
    first, endpoint = bound()
    other, endpoint2 = bound()
    with first, other:
        nodes = [
            segment.join(name, group="GREEN", endpoint=each, interval_s=3600)
            for name, each in (("A", endpoint), ("B", endpoint2))
        ]
        with pytest.raises(shmcoord.http.NoneReachable) as caught:
            side.request()
    error = caught.value
    assert isinstance(error, (NoneReachable, shmcoord.http.NoBackend))
    assert isinstance(error, httpx.ConnectError)
    assert sorted(attempt.node for attempt in error.tried) == [node.name for node in nodes]
    assert "ConnectError" in str(error)
    nothing_held(name)


def test_a_spent_budget_ends_it(name, segment, side, web):
    second(web(ok, "B"))
    closed, endpoint = bound()
    with closed, segment.join("A", group="GREEN", endpoint=endpoint, interval_s=3600):
        budget = side.transport._sender.router.retry_budget()
        while budget.spend():
            pass
        with pytest.raises(shmcoord.http.NoneReachable, match="budget"):
            side.request()
    nothing_held(name)


def test_a_lost_lease_leads_elsewhere(name, segment, side, web):
    ran = []

    async def app(scope, receive, send):
        assert scope["type"] == "http"
        ran.append(scope["method"])
        await text(send)

    node = second(web(app, "B"))
    with segment.join("A", group="GREEN", endpoint=node.endpoint, interval_s=3600):
        # What is reserved on A comes to B, who did not give it.
        response = side.request("POST", content=b"body")
        assert (response.status_code, response.extensions["shmcoord_node"]) == (200, "B")
        assert (ran, node.refused, node.served) == (["POST"], 1, 1)
    nothing_held(name)


def test_a_body_that_can_be_sent_once_is_not_sent_twice(name, segment, side, web):
    node = second(web(ok, "B"))
    with segment.join("A", group="GREEN", endpoint=node.endpoint, interval_s=3600):
        with pytest.raises(shmcoord.http.NoBackend, match="once"):
            side.request("PUT", content=side.body(b"x", b"y"))
        assert side.reads == 1
        assert (node.refused, node.served) == (1, 0)
    nothing_held(name)


def test_a_refusal_that_was_copied_proves_nothing(name, side, raw):
    def serve(node, connection):
        for head in heads(connection):
            node.adopt(token_of(head)).end()
            answer(
                connection,
                b"shmcoord-lease-lost: 1",
                b"shmcoord-lease: 1-2-3-4-5-6",
                status=b"503 Service Unavailable",
            )

    raw("A", serve)
    response = side.request("POST", content=b"body")
    assert (response.status_code, response.content) == (503, b"raw")
    nothing_held(name)


def breaking(names, adopt=False):
    """Serve all requests but the last kind: that which asks for it is broken off unanswered."""

    def serve(node, connection):
        for head in heads(connection):
            if adopt:
                node.adopt(token_of(head)).end()
            names["seen"] += 1
            if b"/break" in head:
                return
            answer(connection, *names["headers"])

    return serve


BREAK = "http://green/break"


@pytest.mark.parametrize(
    ("method", "options", "extensions"),
    [
        ("GET", {}, {}),
        ("DELETE", {}, {}),
        ("POST", {}, {"shmcoord": {"idempotent": True}}),
        ("POST", {"idempotent": ["POST"]}, {}),
    ],
)
def test_what_may_be_repeated_goes_elsewhere(
    name, segment, make_side, web, raw, method, options, extensions
):
    side = make_side(segment, **options)
    names = Counter(headers=())
    names["headers"] = ()
    raw("A", breaking(names))
    second(web(ok, "B"))
    content = b"body" if method == "POST" else None
    response = side.request(method, BREAK, content=content, extensions=extensions)
    assert response.extensions["shmcoord_node"] == "B"
    assert names["seen"] == 1
    nothing_held(name)


@pytest.mark.parametrize(("method", "options"), [("POST", {}), ("GET", {"idempotent": ()})])
def test_what_may_not_be_repeated_ends(name, segment, make_side, web, raw, method, options):
    side = make_side(segment, **options)
    names = {"headers": (), "seen": 0}
    raw("A", breaking(names))
    node = second(web(ok, "B"))
    with pytest.raises(httpx.RemoteProtocolError):
        side.request(method, BREAK, content=b"body" if method == "POST" else None)
    assert (names["seen"], node.served) == (1, 0)
    nothing_held(name)


@pytest.mark.parametrize(
    ("shown", "adopted", "goes"),
    [(b"A", False, True), (b"A", True, False), (b"other", False, False)],
)
def test_who_adopts_and_did_not_has_done_nothing(name, side, web, raw, shown, adopted, goes):
    """A node that showed that it adopts, and whose lease we could free, has not executed it."""
    names = {"headers": (b"shmcoord-node: " + shown,), "seen": 0}
    raw("A", breaking(names, adopted))
    node = second(web(ok, "B"))
    assert side.request("POST", content=b"body").extensions["shmcoord_node"] == "A"
    if goes:
        assert side.request("POST", BREAK, content=b"body").extensions["shmcoord_node"] == "B"
    else:
        with pytest.raises(httpx.RemoteProtocolError):
            side.request("POST", BREAK, content=b"body")
    assert (names["seen"], node.served) == (2, int(goes))
    nothing_held(name)


def test_a_body_that_was_begun_stays_with_its_node(name, side, web, raw):
    def serve(node, connection):
        connection.recv(65536)  # and away

    raw("A", serve)
    node = second(web(ok, "B"))
    with pytest.raises((httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError)):
        side.request("PUT", content=side.body(b"x", b"y"))
    assert (side.reads, node.served) == (1, 0)
    nothing_held(name)


def test_a_time_out_while_reading_is_the_callers(name, side, web, raw):
    gone = threading.Event()
    raw("A", lambda node, connection: gone.wait(5))
    node = second(web(ok, "B"))
    with pytest.raises(httpx.ReadTimeout):
        side.request(timeout=httpx.Timeout(5, read=0.05))
    gone.set()
    assert node.served == 0
    nothing_held(name)


# --- until when the lease is held


@pytest.fixture
def unaware(segment):
    """A node that adopts nothing, so that what is held is ours; ten bytes, one at a time."""
    sock, endpoint = bound()

    async def app(scope, receive, send):
        assert scope["type"] == "http"
        await send({"type": "http.response.start", "status": 200, "headers": TEXT})
        for number in range(10):
            body = str(number).encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})
        if scope["path"] == "/fail":
            raise LookupError
        await send({"type": "http.response.body"})

    with (
        serving(app, sock),
        segment.join("B", group="GREEN", endpoint=endpoint, interval_s=3600) as node,
    ):
        yield node


def test_the_lease_is_held_until_the_response_is_read(unaware, side):
    response = side.open()
    assert unaware.inflight == 1
    assert side.read(response) == b"0123456789"
    assert unaware.inflight == 0


def test_the_lease_is_held_until_the_response_is_closed(unaware, side):
    response = side.open()
    parts = side.parts(response)
    assert side.part(parts) == b"0"
    assert unaware.inflight == 1
    side.close_response(response)
    assert unaware.inflight == 0
    side.close_response(response)  # may be repeated


def test_a_response_that_is_dropped_holds_nothing(unaware, side):
    response = side.open()
    parts = side.parts(response)
    assert side.part(parts) == b"0"
    assert unaware.inflight == 1
    del parts, response
    gc.collect()
    for _ in range(20):  # generators end one after another, each in a turn of the loop
        if side.kind == "async":
            side.run(asyncio.sleep(0))
        gc.collect()
    assert unaware.inflight == 0


def test_a_response_that_fails_holds_nothing(unaware, side):
    with pytest.raises(httpx.RemoteProtocolError):
        side.request(url="http://green/fail")
    assert unaware.inflight == 0
    response = side.open(url="http://green/fail")
    with pytest.raises(httpx.RemoteProtocolError):
        side.read(response)
    assert unaware.inflight == 0


# --- arguments and ends


def test_segments_or_a_router(name, segment, make_side, web):
    web(ok, "B")
    with pytest.raises(ValueError, match="router="):
        make_side()
    with Router(name) as router:
        with pytest.raises(ValueError, match="router="):
            make_side(name, router=router)
        with pytest.raises(TypeError, match="idempotent"):
            make_side(router=router, idempotent="GET")
        with pytest.raises(ValueError, match="max_wait_s"):
            make_side(router=router, max_wait_s=float("nan"))
        with pytest.raises(TypeError, match="group"):
            make_side(router=router, group=None)
        assert not router.closed
        side = make_side(router=router)
        assert side.request().status_code == 200
        side.close_transport()
        assert not router.closed
    own = make_side(name)
    assert own.request().status_code == 200
    own.close_transport()
    assert own.transport._sender.router.closed
    with pytest.raises(ValueError, match="closed"):
        own.request()


def test_closing_closes_what_was_given(segment, make_side):
    closed = []

    class Inner(httpx.BaseTransport, httpx.AsyncBaseTransport):
        def close(self):
            closed.append(self)

        async def aclose(self):
            closed.append(self)

    side = make_side(segment, transport=Inner())
    side.close_transport()
    assert len(closed) == 1


async def test_one_loop_for_a_transport(segment, web):
    web(ok, "B")
    async with httpx.AsyncClient(transport=AsyncTransport(segment, group="GREEN")) as client:
        assert (await client.get(URL)).status_code == 200
        with pytest.raises(RuntimeError, match="event loop"):
            await asyncio.to_thread(asyncio.run, client.get(URL))
        assert (await client.get(URL)).status_code == 200


async def test_a_cancelled_request_holds_nothing(name, segment, web):
    began = asyncio.Event()
    loop = asyncio.get_running_loop()

    async def app(scope, receive, send):
        assert scope["type"] == "http"
        loop.call_soon_threadsafe(began.set)
        while (await receive())["type"] != "http.disconnect":
            pass

    web(app, "B", capacity=1)
    transport = AsyncTransport(segment, group="GREEN")
    async with httpx.AsyncClient(transport=transport) as client:
        task = asyncio.create_task(client.get(URL))
        await began.wait()
        waiting = asyncio.create_task(client.get(URL))  # for capacity
        await asyncio.sleep(0.01)
        waiting.cancel()
        task.cancel()
        for each in (task, waiting):
            with pytest.raises(asyncio.CancelledError):
                await each
        await asyncio.to_thread(nothing_held, name)


# --- in numbers


class Site:
    """Two nodes whose application counts what it executes, and misbehaves as it is asked to."""

    def __init__(self, web):
        self.executed = Counter()
        self.lock = threading.Lock()
        self.nodes = [web(self.app, name, capacity=6).node for name in "AB"]

    async def app(self, scope, receive, send):
        assert scope["type"] == "http"
        with self.lock:
            self.executed[scope["path"]] += 1
        if scope["path"] == "/raise":
            raise LookupError
        if scope["path"] == "/slow":
            await asyncio.sleep(0.01)
        await send({"type": "http.response.start", "status": 200, "headers": TEXT})
        for _ in range(3):
            await send({"type": "http.response.body", "body": b"x" * 100, "more_body": True})
        await send({"type": "http.response.body"})

    def settled(self, name):
        wait_until(lambda: sum(node.inflight for node in self.nodes) == 0)
        nothing_held(name)
        executed = sum(self.executed.values())
        assert sum(node.served for node in self.nodes) == executed
        assert sum(node.failed for node in self.nodes) == self.executed["/raise"]
        return executed


PATHS = ("/", "/", "/raise", "/slow")


async def test_nothing_leaks_from_an_event_loop(name, segment, web):
    site = Site(web)
    rng = random.Random(7)
    outcomes = Counter()
    transport = AsyncTransport(name, group="GREEN")

    async def one(client, number):
        url = "http://green" + rng.choice(PATHS)
        how = rng.choice(("get", "post", "stream", "drop", "cancel", "late"))
        if how == "get":
            outcomes[(await client.get(url)).status_code] += 1
        elif how == "post":

            async def body():
                yield b"abc"
                yield b"def"

            try:
                outcomes[(await client.post(url, content=body())).status_code] += 1
            except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError):
                # The server closes a connection whose application raised, now and then while we
                # begin the next request in it; a body that was begun goes nowhere else.
                outcomes["broken"] += 1
        elif how == "stream":
            async with client.stream("GET", url) as response:
                async for _ in response.aiter_raw(10):
                    break
                outcomes[how] += 1
        elif how == "drop":
            response = await client.send(client.build_request("GET", url), stream=True)
            outcomes[how] += 1
            await response.aclose()
        elif how == "cancel":
            task = asyncio.create_task(client.get(url))
            await asyncio.sleep(rng.random() * 0.01)
            task.cancel()
            await asyncio.wait([task])
            outcomes["cancelled" if task.cancelled() else "not cancelled"] += 1
        else:
            try:
                await client.get(url, timeout=httpx.Timeout(5, read=rng.random() * 0.01))
                outcomes["in time"] += 1
            except httpx.ReadTimeout:
                outcomes["late"] += 1

    async with httpx.AsyncClient(transport=transport) as client:
        gate = asyncio.Semaphore(24)  # twice what the nodes take

        async def gated(number):
            async with gate:
                await one(client, number)

        await asyncio.gather(*(gated(number) for number in range(1500)))
        assert await asyncio.to_thread(site.settled, name) > 1000
        with segment.join("C", group="GREEN", endpoint="e:1", interval_s=3600), Router(name) as r:
            held = r.acquire("GREEN")
            assert Raw(name).taken() == 1  # what would have been seen
            held.release()
    assert outcomes.keys() >= {200, 500, "stream", "drop", "cancelled", "late", "in time"}, outcomes


def test_nothing_leaks_from_threads(name, segment, web):
    site = Site(web)
    outcomes = Counter()
    transport = Transport(name, group="GREEN")

    def one(number):
        rng = random.Random(number)
        url = "http://green" + rng.choice(PATHS)
        how = rng.choice(("get", "stream", "drop", "late"))
        if how == "get":
            return client.get(url).status_code
        if how == "late":
            try:
                client.get(url, timeout=httpx.Timeout(5, read=rng.random() * 0.01))
            except httpx.ReadTimeout:
                return how
            return "in time"
        with client.stream("GET", url) as response:
            if how == "stream":
                next(response.iter_raw(10))
        return how

    with httpx.Client(transport=transport) as client, ThreadPoolExecutor(16) as threads:
        outcomes.update(threads.map(one, range(1000)))
        assert site.settled(name) > 500
    assert outcomes.keys() >= {200, 500, "stream", "drop", "late", "in time"}, outcomes


def test_transports_to_unix_sockets_share_what_is_large(segment):
    transport = Transport(segment, group="GREEN")
    before = tls()
    for number in range(3):
        assert transport._to(f"unix:/nowhere/{number}") is transport._to(f"unix:/nowhere/{number}")
    assert len(transport._unix) == 3
    assert {inner._pool._ssl_context for inner in transport._unix.values()} == {before}
    transport.close()


def test_a_router_is_closed_though_the_inner_transport_fails_to(segment):
    class Failing(httpx.BaseTransport):
        def close(self):
            raise OSError("cannot")

    transport = Transport(segment.name, group="GREEN", transport=Failing())
    with pytest.raises(OSError, match="cannot"):
        transport.close()
    assert transport._sender.router.closed


async def test_so_it_is_on_an_event_loop(segment):
    class Failing(httpx.AsyncBaseTransport):
        async def aclose(self):
            raise OSError("cannot")

    transport = AsyncTransport(segment.name, group="GREEN", transport=Failing())
    with pytest.raises(OSError, match="cannot"):
        await transport.aclose()
    assert transport._sender.router.closed
