"""What the tests of the HTTP plug-ins share: bare ASGI calls, and uvicorn in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import uvicorn
from helpers import wait_until

from shmcoord import Segment
from shmcoord.http import Middleware

TEXT = [(b"content-type", b"text/plain")]


async def text(send: Callable[..., Any], status: int = 200, body: bytes = b"ok") -> None:
    """Answer with a short text."""
    await send({"type": "http.response.start", "status": status, "headers": TEXT})
    await send({"type": "http.response.body", "body": body})


async def ok(scope: Any, receive: Any, send: Any) -> None:
    """An application that speaks HTTP only."""
    assert scope["type"] == "http"
    await text(send)


class Reply:
    """What came back from a bare call."""

    def __init__(self, sent: list[Any]) -> None:
        self.sent = sent

    @property
    def status(self) -> int:
        return self.sent[0]["status"]

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.sent[0]["headers"])

    @property
    def body(self) -> bytes:
        return b"".join(m.get("body", b"") for m in self.sent[1:])


async def call(
    app: Any,
    path: str = "/",
    *,
    lease: str | None = None,
    kind: str = "http",
    sent: list[Any] | None = None,
    **scope: Any,
) -> Reply:
    """Call an application as a server would; `sent` sees the messages as they come."""
    sent = [] if sent is None else sent
    headers = [(b"host", b"green")]
    if lease is not None:
        headers.append((b"shmcoord-lease", lease.encode()))
    events = [{"type": "websocket.connect"}] if kind == "websocket" else []

    async def receive() -> Any:
        if events:
            return events.pop()
        return {"type": f"{kind}.request" if kind == "http" else "websocket.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    whole = {"type": kind, "path": path, "headers": headers, "http_version": "1.1", **scope}
    await app(whole, receive, send)
    return Reply(sent)


@contextlib.asynccontextmanager
async def lifespan(app: Any) -> AsyncIterator[list[str]]:
    """Run an application's life around a block; yields the types of what it sends."""
    said: list[str] = []
    events: asyncio.Queue[Any] = asyncio.Queue()
    told = asyncio.Event()

    async def send(message: Any) -> None:
        said.append(message["type"])
        told.set()

    events.put_nowait({"type": "lifespan.startup"})
    task = asyncio.create_task(app({"type": "lifespan", "state": {}}, events.get, send))
    telling = asyncio.create_task(told.wait())
    await asyncio.wait({task, telling}, return_when=asyncio.FIRST_COMPLETED)
    telling.cancel()
    try:
        yield said
    finally:
        if not task.done():
            events.put_nowait({"type": "lifespan.shutdown"})
        await asyncio.wait_for(task, 10)


@contextlib.contextmanager
def serving(app: Any, sock: socket.socket, **options: Any) -> Iterator[uvicorn.Server]:
    """Serve an application with uvicorn in a thread, on a socket that is bound."""
    config = uvicorn.Config(app, log_level="critical", access_log=False, ws="none", **options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        yield server
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def bound() -> tuple[socket.socket, str]:
    """A socket on a free port of loopback, and its endpoint."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    return sock, f"127.0.0.1:{sock.getsockname()[1]}"


class Servers:
    """Servers of uvicorn that outlive a test, since it takes them long to stop.

    Each serves the application that a test gives to it.
    """

    def __init__(self) -> None:
        self._free: list[Server] = []
        self._stack = contextlib.ExitStack()

    @contextlib.contextmanager
    def node(
        self, app: Any, segment: Segment | str, name: str, **options: Any
    ) -> Iterator[Middleware]:
        """A node of group GREEN on one of the servers; the server's own life is not its own."""
        server = self._free.pop() if self._free else Server(self._stack)
        options = {
            "endpoint": server.endpoint,
            "group": "GREEN",
            "interval_s": 0.1,
            **options,
        }
        middleware = Middleware(app, node=name, segment=segment, **options)
        middleware._join()
        server.app = middleware
        try:
            yield middleware
        finally:
            middleware._leave()
            self._free.append(server)

    def close(self) -> None:
        """Stop them all."""
        self._stack.close()


class Server:
    """One of them."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        sock, self.endpoint = bound()
        self.app: Any = None
        stack.enter_context(serving(self._serve, sock, lifespan="off", interface="asgi3"))

    async def _serve(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)
