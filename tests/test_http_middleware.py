"""The ASGI middleware: what counts, what is refused, and when the node is there."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os

import fastapi
import httpx
import pytest
from helpers import Raw, run, wait_until
from http_helpers import TEXT, bound, call, lifespan, ok, serving, text

import shmcoord
from shmcoord import NoBackend, Router, Saturated, State
from shmcoord.http import Middleware


@pytest.fixture
def wrap(segment):
    """Makes a middleware around an application; it joins at its first request."""

    def make(app, **options):
        options = {"node": "B", "group": "GREEN", "endpoint": "e:1", "interval_s": 3600, **options}
        return Middleware(app, segment=segment, **options)

    return make


@pytest.fixture
def router(segment):
    with Router(segment) as router:
        yield router


@pytest.fixture
def joined(segment, wrap):
    """A middleware around `ok` that has joined."""
    middleware = wrap(ok)
    middleware._join()
    return middleware


# --- what counts


async def test_a_request_is_in_flight_while_the_application_runs(segment, wrap):
    seen = []

    async def app(scope, receive, send):
        node = scope["shmcoord.node"]
        await send({"type": "http.response.start", "status": 200, "headers": TEXT})
        for more in (True, True, False):
            await send({"type": "http.response.body", "body": b"x", "more_body": more})
            seen.append((segment.status("B").queue, node.served))
        seen.append((segment.status("B").queue, node.served))  # as a background task

    middleware = wrap(app)
    assert middleware.node is None
    reply = await call(middleware)
    assert (reply.status, reply.body) == (200, b"xxx")
    assert seen == [(1, 0)] * 4
    node = middleware.node
    assert (node.inflight, node.served, node.failed) == (0, 1, 0)


@pytest.mark.parametrize(("status", "failed"), [(200, 0), (404, 0), (499, 0), (500, 1), (503, 1)])
async def test_a_status_of_500_is_a_failure(wrap, status, failed):
    middleware = wrap(lambda scope, receive, send: text(send, status))
    assert (await call(middleware)).status == status
    assert (middleware.node.served, middleware.node.failed) == (1, failed)


async def test_an_exception_is_a_failure_and_goes_on(wrap):
    async def app(scope, receive, send):
        await text(send)
        raise LookupError("afterwards")

    middleware = wrap(app)
    with pytest.raises(LookupError):
        await call(middleware)
    node = middleware.node
    assert (node.inflight, node.served, node.failed) == (0, 1, 1)


async def test_no_answer_is_a_failure(wrap):
    async def app(scope, receive, send):
        pass

    middleware = wrap(app)
    await call(middleware)
    assert (middleware.node.served, middleware.node.failed) == (1, 1)


@pytest.mark.parametrize(("status", "failed"), [(None, 0), (200, 0), (500, 1)])
async def test_a_cancelled_request_ends(wrap, status, failed):
    begun = asyncio.Event()

    async def app(scope, receive, send):
        if status:
            await send({"type": "http.response.start", "status": status, "headers": TEXT})
        begun.set()
        await asyncio.Event().wait()

    middleware = wrap(app)
    task = asyncio.create_task(call(middleware))
    await begun.wait()
    assert middleware.node.inflight == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    node = middleware.node
    assert (node.inflight, node.served, node.failed) == (0, 1, failed)


async def test_excluded_paths_do_not_count_unless_they_were_reserved(wrap, router):
    middleware = wrap(ok)
    assert (await call(middleware, "/health")).status == 200
    assert middleware.node is None
    assert b"shmcoord-node" in (await call(middleware, "/health/more")).headers
    assert middleware.node.served == 1
    with router.acquire("GREEN") as lease:
        assert b"shmcoord-node" in (await call(middleware, "/health", lease=lease.token)).headers
        assert not lease.release()
        assert middleware.node.served == 2
        with pytest.raises(shmcoord.LeaseReleased):
            lease.release()


async def test_other_scopes_pass(wrap):
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["type"])

    await wrap(app)({"type": "something"}, None, None)
    assert seen == ["something"]


async def test_the_node_is_named_and_what_others_said_of_nodes_is_dropped(wrap):
    async def app(scope, receive, send):
        headers = [
            (b"Shmcoord-Node", b"other"),
            (b"shmcoord-lease-lost", b"1"),
            (b"x-own", b"kept"),
        ]
        message = {"type": "http.response.start", "status": 200, "headers": headers}
        await send(message)
        assert message["headers"] is headers  # not changed under its hands
        assert len(headers) == 3

    reply = await call(wrap(app, node="Bär/1"))
    assert sorted(reply.sent[0]["headers"]) == [
        (b"shmcoord-node", b"B%C3%A4r%2F1"),
        (b"x-own", b"kept"),
    ]


# --- leases


async def test_a_lease_is_adopted_and_counts_once(segment, wrap, router):
    queues = []

    async def app(scope, receive, send):
        queues.append(segment.status("B").queue)
        await text(send)

    middleware = wrap(app)
    middleware._join()
    lease = router.acquire("GREEN", cost=3)
    assert (await call(middleware, lease=lease.token)).status == 200
    assert queues == [3]
    assert lease.release() is False
    assert (middleware.node.inflight, middleware.node.served) == (0, 1)


async def test_a_lost_lease_is_refused_before_anything_is_done(name, segment, wrap, router):
    ran = []

    async def app(scope, receive, send):
        ran.append(scope)
        await text(send)

    middleware = wrap(app)
    node = middleware._join()
    with segment.join("C", group="OTHER", endpoint="e:2", interval_s=3600):
        released = router.acquire("GREEN")
        released.release()
        adopted = router.acquire("GREEN")
        assert (await call(middleware, lease=adopted.token)).status == 200
        ran.clear()
        with router.acquire("OTHER") as other:
            tokens = [released.token, adopted.token, other.token, "no token", "1-2-3-4-5-6"]
            for token in tokens:
                reply = await call(middleware, lease=token)
                assert reply.status == 503
                assert reply.headers[b"shmcoord-lease-lost"] == b"1"
                assert reply.headers[b"shmcoord-lease"] == token.encode()
                assert b"retry-after" not in reply.headers
                assert json.loads(reply.body)["reason"] == "LEASE_LOST"
    adopted.release()
    assert not ran
    assert (node.refused, node.served, node.inflight) == (len(tokens), 1, 0)
    assert Raw(name).taken() == 0


# --- draining


async def test_a_draining_node_serves_what_was_reserved_and_refuses_the_rest(joined, router):
    lease = router.acquire("GREEN")
    joined.drain()
    reply = await call(joined)
    assert reply.status == 503
    assert int(reply.headers[b"retry-after"]) >= 1
    assert reply.headers[b"content-type"] == b"application/problem+json"
    assert int(reply.headers[b"content-length"]) == len(reply.body)
    assert json.loads(reply.body)["reason"] == "DRAINING"
    assert (await call(joined, "/health")).status == 200
    assert (await call(joined, lease=lease.token)).status == 200
    lease.release()
    assert (joined.node.served, joined.node.failed) == (1, 0)
    joined.node.resume()
    assert (await call(joined)).status == 200


async def test_a_node_that_left_refuses(joined, router):
    lease = router.acquire("GREEN")
    joined.node.leave()
    assert (await call(joined)).status == 503
    reply = await call(joined, lease=lease.token)
    assert (reply.status, reply.headers[b"shmcoord-lease-lost"]) == (503, b"1")
    lease.release()


# --- handlers that find no node


@pytest.mark.parametrize(
    ("error", "retry_after", "reason"),
    [
        (Saturated("all full", 2.1), b"3", "SATURATED"),
        (Saturated("all full", 0.001), b"1", "SATURATED"),
        (Saturated("all full"), b"1", "SATURATED"),
        (NoBackend("nobody"), b"1", "NO_BACKEND"),
    ],
)
async def test_no_node_for_a_handler_is_503(segment, wrap, error, retry_after, reason):
    async def app(scope, receive, send):
        raise error

    middleware = wrap(app)
    with segment.join("W", group="WORK", endpoint="e:9", capacity=4, interval_s=3600) as node:
        node.waiting = 3
        reply = await call(middleware)
    assert (reply.status, reply.headers[b"retry-after"]) == (503, retry_after)
    assert reply.headers[b"shmcoord-node"] == b"B"
    problem = json.loads(reply.body)
    nodes = problem.pop("nodes")
    assert problem == {
        "title": "Service Unavailable",
        "status": 503,
        "detail": str(error),
        "reason": reason,
    }
    assert [node for node in nodes if node["node"] == "W"] == [
        {
            "node": "W",
            "group": "WORK",
            "state": "BUSY",
            "health": "ALIVE",
            "queue": 3,
            "capacity": 4,
        }
    ]
    assert (middleware.node.served, middleware.node.failed) == (1, 1)


async def test_strangers_are_not_told_of_the_nodes(wrap):
    async def app(scope, receive, send):
        raise Saturated("all full")

    reply = await call(wrap(app, list_nodes=False))
    assert "nodes" not in json.loads(reply.body)


async def test_an_answer_that_has_begun_cannot_be_replaced(wrap):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": TEXT})
        raise Saturated("all full")

    sent = []
    with pytest.raises(Saturated):
        await call(wrap(app), sent=sent)
    assert len(sent) == 1


class Gone(Exception):
    """As `starlette.requests.ClientDisconnect`."""


@pytest.mark.parametrize(
    ("ending", "failed"),
    [("raises", 0), ("returns", 0), ("raises in send", 0), ("500", 1), ("answered before", 1)],
)
async def test_a_client_that_went_away_is_no_failure(wrap, ending, failed):
    async def app(scope, receive, send):
        if ending == "500":
            await text(send, 500)
        if ending == "answered before":
            await text(send)
        if ending == "raises in send":
            await text(send)
        assert (await receive())["type"] == "http.disconnect"
        if ending != "returns":
            raise Gone

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        if ending == "raises in send":
            raise OSError("the connection has ended")

    middleware = wrap(app)
    scope = {"type": "http", "path": "/", "headers": []}
    with contextlib.suppress(Gone, OSError):
        await middleware(scope, receive, send)
    node = middleware.node
    assert (node.inflight, node.served, node.failed) == (0, 1, failed)


# --- WebSockets


@pytest.mark.parametrize(("last", "failed"), [("disconnect", 0), ("receive", 1)])
async def test_a_websocket_that_its_client_closes_is_no_failure(wrap, last, failed):
    """Handlers that only read end with `WebSocketDisconnect`."""

    async def app(scope, receive, send):
        await receive()
        await send({"type": "websocket.accept"})
        await receive()
        raise Gone

    events = iter(["connect", last])

    async def receive():
        return {"type": f"websocket.{next(events)}"}

    async def send(message):
        pass

    middleware = wrap(app)
    with pytest.raises(Gone):
        await middleware({"type": "websocket", "path": "/", "headers": []}, receive, send)
    node = middleware.node
    assert (node.inflight, node.served, node.failed) == (0, 1, failed)


@pytest.mark.parametrize(("code", "failed"), [(1000, 0), (1011, 1)])
async def test_a_websocket_is_one_request(wrap, code, failed):
    async def app(scope, receive, send):
        await receive()
        await send({"type": "websocket.accept"})
        assert scope["shmcoord.node"].inflight == 1
        await send({"type": "websocket.send", "text": "hi"})
        await send({"type": "websocket.close", "code": code})

    middleware = wrap(app)
    reply = await call(middleware, kind="websocket")
    assert reply.sent[0]["type"] == "websocket.accept"
    assert reply.headers == {b"shmcoord-node": b"B"}
    node = middleware.node
    assert (node.inflight, node.served, node.failed) == (0, 1, failed)


async def test_a_websocket_with_a_lost_lease_is_refused(joined):
    reply = await call(joined, kind="websocket", lease="none")
    assert [m["type"] for m in reply.sent] == ["websocket.close"]
    assert reply.sent[0]["code"] == 1013
    extensions = {"websocket.http.response": {}}
    reply = await call(joined, kind="websocket", lease="none", extensions=extensions)
    assert [m["type"] for m in reply.sent] == [
        "websocket.http.response.start",
        "websocket.http.response.body",
    ]
    assert (reply.status, reply.headers[b"shmcoord-lease-lost"]) == (503, b"1")
    assert joined.node.served == 0


# --- lifespan


def living(log, nodes, fail=None):
    """An application with a lifespan, which notes what nodes it sees."""

    async def app(scope, receive, send):
        if scope["type"] != "lifespan":
            await text(send)
            return
        while True:
            event = (await receive())["type"]
            log.append((event, nodes()))
            if event == fail:
                await send({"type": f"{event}.failed", "message": "no"})
                return
            await send({"type": f"{event}.complete"})
            if event == "lifespan.shutdown":
                return

    return app


async def test_the_node_joins_after_the_start_and_leaves_after_the_end(segment, wrap):
    log = []
    middleware = wrap(living(log, lambda: [(s.node, s.state) for s in segment.snapshot()]))
    for _ in range(2):  # test clients start an application more than once
        log.clear()
        async with lifespan(middleware) as said:
            assert said == ["lifespan.startup.complete"]
            assert segment.status("B").state is State.IDLE
            assert middleware.node.name == "B"
            assert (await call(middleware)).status == 200
        assert log == [
            ("lifespan.startup", []),
            ("lifespan.shutdown", [("B", State.DRAINING)]),
        ]
        assert said == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
        assert segment.snapshot() == ()
        assert middleware.node.left
    assert (await call(middleware)).status == 503  # it does not join again by itself
    assert segment.snapshot() == ()


async def test_who_does_not_start_does_not_join(segment, wrap):
    log = []
    middleware = wrap(living(log, segment.snapshot, fail="lifespan.startup"))
    async with lifespan(middleware) as said:
        pass
    assert said == ["lifespan.startup.failed"]
    assert (middleware.node, segment.snapshot()) == (None, ())


async def test_who_cannot_join_does_not_start_and_cleans_up(segment, wrap, caplog):
    log = []
    middleware = wrap(living(log, lambda: None))
    with segment.join("B", group="GREEN", endpoint="e", interval_s=3600):
        async with lifespan(middleware) as said:
            pass
        assert said == ["lifespan.startup.failed"]
        assert [event for event, _ in log] == ["lifespan.startup", "lifespan.shutdown"]
        assert segment.status("B").endpoint == "e"
    assert "NodeExists" in caplog.text


async def returns(scope, receive, send):
    if scope["type"] == "http":
        await text(send)


async def dies(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        raise OSError("no database")
    await text(send)


@pytest.mark.parametrize("app", [ok, returns, dies])
async def test_an_application_without_lifespan_joins_and_leaves_all_the_same(segment, wrap, app):
    middleware = wrap(app)
    async with lifespan(middleware) as said:
        assert said == ["lifespan.startup.complete"]
        assert segment.status("B").state is State.IDLE
        assert (await call(middleware)).status == 200
    assert said == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert segment.snapshot() == ()


async def test_a_life_that_breaks_off_leaves(segment, wrap):
    async def app(scope, receive, send):
        await receive()
        await send({"type": "lifespan.startup.complete"})
        raise OSError("later")

    events = asyncio.Queue()
    events.put_nowait({"type": "lifespan.startup"})
    said = []

    async def send(message):
        said.append((message["type"], len(segment.snapshot())))

    with pytest.raises(OSError, match="later"):
        await wrap(app)({"type": "lifespan"}, events.get, send)
    assert said == [("lifespan.startup.complete", 1)]
    assert segment.snapshot() == ()


async def test_what_runs_when_the_node_leaves_may_end_later(name, new_name):
    go_on = asyncio.Event()

    async def app(scope, receive, send):
        assert scope["type"] == "http"
        await go_on.wait()
        await text(send)

    middleware = Middleware(app, node="B", segment=name, group="GREEN", endpoint="e:1")
    async with lifespan(middleware):
        task = asyncio.create_task(call(middleware))
        while middleware.node.inflight == 0:
            await asyncio.sleep(0)
    go_on.set()
    assert (await task).status == 200
    assert Raw(name).taken() == 0


async def test_a_segment_of_its_own_is_closed_and_a_given_one_is_not(name, segment, wrap):
    middleware = Middleware(ok, node="A", segment=name, group="GREEN", endpoint="e:1")
    async with lifespan(middleware):
        own = middleware.node.segment
        assert own is not segment
        assert len(own.snapshot()) == 1
    with pytest.raises(ValueError, match="closed"):
        own.snapshot()
    async with lifespan(wrap(ok)):
        pass
    assert segment.snapshot() == ()  # still open


# --- names


async def test_names_may_be_of_the_process(segment, wrap):
    middleware = wrap(ok, node="web-{pid}", endpoint=lambda: "unix:/run/web.sock")
    await call(middleware)
    assert middleware.node.name == f"web-{os.getpid()}"
    assert middleware.node.endpoint == "unix:/run/web.sock"


@pytest.mark.parametrize("what", ["gauges", "exclude"])
def test_several_names_are_not_one_text(wrap, what):
    with pytest.raises(TypeError, match=what):
        wrap(ok, **{what: "abc"})


def test_the_child_of_a_fork_is_a_node_of_its_own(name):
    said = run(
        """
import asyncio
from shmcoord.http import Middleware

async def ok(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body"})

async def receive():
    return {"type": "http.request"}

def request(headers=()):
    sent = []
    async def send(message):
        sent.append(message)
    asyncio.run(app({"type": "http", "path": "/", "headers": list(headers)}, receive, send))
    return dict(sent[0]["headers"])[b"shmcoord-node"].decode()

app = Middleware(ok, node="web-{pid}", segment=name, group="GREEN", endpoint="e:{pid}")
assert request() == f"web-{os.getpid()}"

def child():
    assert request() == f"web-{os.getpid()}"
    with Segment.attach(name) as segment:
        say(len(segment.snapshot()), app.node.endpoint == f"e:{os.getpid()}", app.node.served)

pid = forked(child)
os.waitpid(pid, 0)
assert request() == f"web-{os.getpid()}"
say(app.node.served)
""",
        name,
    )
    assert said.split("\n")[:2] == ["2 True 1", "2"]


# --- without httpx


def test_the_middleware_needs_no_httpx(name):
    said = run(
        """
sys.modules["httpx"] = None  # as if it were not installed
import shmcoord.http
say(shmcoord.http.Middleware.__name__)
for word in ("Transport", "AsyncTransport", "Saturated", "NoBackend", "NoneReachable"):
    try:
        getattr(shmcoord.http, word)
    except ModuleNotFoundError as error:
        say(error.name, "pip install shmcoord[http]" in str(error), word in str(error))
try:
    shmcoord.http.nothing
except AttributeError:
    say("no such name")
""",
        name,
    )
    assert said == "Middleware\n" + "httpx True True\n" * 5 + "no such name\n"


def test_every_public_name_can_be_had():
    for word in shmcoord.http.__all__:
        assert getattr(shmcoord.http, word).__name__ == word


# --- real servers


def test_fastapi_under_uvicorn(name, segment):
    events = []

    @contextlib.asynccontextmanager
    async def life(app):
        events.append(("up", len(segment.snapshot())))
        yield
        events.append(("down", segment.status("B").state))

    app = fastapi.FastAPI(lifespan=life)
    sock, endpoint = bound()
    app.add_middleware(
        Middleware,
        node="B",
        segment=name,
        group="GREEN",
        endpoint=endpoint,
        gauges=("cached",),
    )
    seen = []

    @app.get("/hello")
    async def hello(request: fastapi.Request, tasks: fastapi.BackgroundTasks) -> str:
        request.scope["shmcoord.node"].publish(cached=0.5)
        tasks.add_task(lambda: seen.append(segment.status("B").queue))
        return "hi"

    @app.get("/broken")
    async def broken() -> str:
        raise LookupError

    @app.get("/full")
    async def full() -> str:
        raise Saturated("all full", 5.0)

    def get(path):
        # Over a new connection: uvicorn closes one whose application has raised.
        return httpx.get(f"http://{endpoint}{path}")

    with serving(app, sock):
        reply = get("/hello")
        assert (reply.json(), reply.headers["shmcoord-node"]) == ("hi", "B")
        assert get("/broken").status_code == 500
        full = get("/full")
        assert (full.status_code, full.headers["retry-after"]) == (503, "5")
        assert full.json()["nodes"][0]["node"] == "B"
        assert get("/nowhere").status_code == 404
        status = segment.status("B")
        assert (status.served, status.failed, status.queue) == (4, 2, 0)
        assert status.gauges == {"cached": 0.5}
    assert seen == [1]  # the background task belongs to the request
    assert events == [("up", 0), ("down", State.DRAINING)]
    assert segment.snapshot() == ()


def test_a_server_without_lifespan_joins_at_the_first_request(segment):
    sock, endpoint = bound()
    app = Middleware(ok, node="B", segment=segment, group="GREEN", endpoint=endpoint)
    with serving(app, sock, lifespan="off"):
        assert segment.snapshot() == ()
        assert httpx.get(f"http://{endpoint}/").headers["shmcoord-node"] == "B"
        assert segment.status("B").served == 1


def test_a_client_that_goes_away_ends_its_request(segment):
    began = asyncio.Event()

    async def app(scope, receive, send):
        assert scope["type"] == "http"
        began.set()
        while (await receive())["type"] != "http.disconnect":
            pass
        await text(send)

    sock, endpoint = bound()
    middleware = Middleware(app, node="B", segment=segment, group="GREEN", endpoint=endpoint)
    with serving(middleware, sock):
        with pytest.raises(httpx.ReadTimeout):
            httpx.get(f"http://{endpoint}/", timeout=0.1)
        wait_until(lambda: middleware.node.served == 1)
        assert (middleware.node.inflight, middleware.node.failed) == (0, 0)
