"""`Middleware`: an ASGI application becomes a node that publishes its load and adopts leases."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

from shmcoord.api import Segment
from shmcoord.errors import ForkedHandle, LeaseLost, NoBackend, Saturated
from shmcoord.http._asgi import Answer, ASGIApp, Receive, Scope, Send, refuse
from shmcoord.http._common import LEASE_HEADER, node_value
from shmcoord.http._lifespan import Lifespan
from shmcoord.http._problem import Problem, draining, lease_lost, no_node
from shmcoord.status import State

if TYPE_CHECKING:
    from shmcoord.node import Node, Request

__all__ = ["Middleware"]

_log = logging.getLogger("shmcoord.http")


class Middleware:
    """Counts each request of an application, and adopts the lease that came with it.

    An ASGI 3 middleware around any application, under any ASGI server:

        app = shmcoord.http.Middleware(app, node="web-1", segment="shm_host1", group="GREEN",
                                       endpoint="127.0.0.1:8001")
        fastapi_app.add_middleware(shmcoord.http.Middleware, node="web-1", ...)

    The node joins when the application has started, drains when the server asks it to shut down,
    and leaves when it has; under a server without lifespan it joins at the first request. A
    request is an `http` or `websocket` connection, from the first look at its headers until the
    application returns, background tasks included. It has failed if the application raised,
    answered with a status of 500 or more or closed a WebSocket with 1011, or returned without an
    answer. A cancelled one has not failed by that alone: who cancels is the client or the server.
    Neither has one whose client went away before, whatever the application then raises: Starlette
    raises `WebSocketDisconnect` and `ClientDisconnect` for nothing else.

    Handlers find the node in `scope["shmcoord.node"]` (in Starlette and FastAPI
    `request.scope["shmcoord.node"]`), to publish gauges for instance.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        node: str | Callable[[], str],
        segment: str | Segment,
        group: str,
        endpoint: str | Callable[[], str],
        capacity: int | None = None,
        weight: float = 1.0,
        interval_s: float = 2.0,
        gauges: Iterable[str] = (),
        slow_start_s: float = 0.0,
        exclude: Iterable[str] = ("/health", "/healthz", "/livez", "/readyz", "/metrics"),
        list_nodes: bool = True,
    ) -> None:
        """Wrap an application; nothing is opened or joined before the server starts it.

        Args:
            app: The application.
            node: Name of the node. Several processes of one application need several names: in a
                text, `{pid}` stands for the process; a callable is asked when the node joins.
            segment: Name of the segment, or an open one, which is left open.
            group: The nodes that can serve the same requests.
            endpoint: Where routers reach this process, "host:port" or "unix:path"; as `node`, a
                text with `{pid}` or a callable. It must lead to this very process: a port that
                several processes share does not.
            capacity: Requests that routers may send it at once; None: as many as there are cells.
            weight: Its share of the load relative to others.
            interval_s: Heartbeat interval in seconds.
            gauges: Names of user gauges for `node.publish`.
            slow_start_s: For how long its share of the traffic rises after it has joined, in
                seconds.
            exclude: Paths, whole as in `scope["path"]`, whose requests are no load and are
                answered while the node drains. One that comes with a lease counts all the same:
                it was reserved.
            list_nodes: Whether the answer to a handler's `Saturated` or `NoBackend` lists the
                nodes and their states. Say False where the callers are strangers.

        Raises:
            TypeError: `exclude` or `gauges` is one text, not several.
        """
        for what, names in (("exclude", exclude), ("gauges", gauges)):
            if isinstance(names, str):
                raise TypeError(f"{what} must be several names, not one str")
        self._app = app
        self._name = node
        self._segment = segment
        self._endpoint = endpoint
        self._enter = partial(
            Segment.join,
            group=group,
            capacity=capacity,
            weight=weight,
            interval_s=interval_s,
            gauges=tuple(gauges),
            slow_start_s=slow_start_s,
        )
        self._exclude = frozenset(exclude)
        self._list_nodes = list_nodes
        self._joining = threading.Lock()  # one application may serve on several loops
        self._opened: Segment | None = None
        self._node: Node | None = None
        self._value = b""
        self._stopped = False

    @property
    def node(self) -> Node | None:
        """The node; None before it joined."""
        return self._node

    def drain(self) -> None:
        """Take no new work and finish the old: routers pass the node over from here on.

        The server's shutdown does it too, but many servers (uvicorn) tell an application of that
        when they have stopped listening and all requests are over.
        """
        if self._node is not None and not self._node.left:
            self._node.drain()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, or the life of the server."""
        kind = scope["type"]
        if kind == "http" or kind == "websocket":
            token = None
            for name, value in scope["headers"]:
                if name == LEASE_HEADER:
                    token = value
                    break
            if token is None and scope["path"] in self._exclude:
                await self._app(scope, receive, send)
            else:
                await self._serve(token, scope, receive, send)
        elif kind == "lifespan":
            self._stopped = False
            await Lifespan(receive, send, self._join, self._shut, self._leave).run(self._app, scope)
        else:
            await self._app(scope, receive, send)

    async def _serve(self, token: bytes | None, scope: Scope, receive: Receive, send: Send) -> None:
        request = self._begin(token)
        if isinstance(request, Problem):
            await refuse(request, self._value, scope, receive, send)
            return
        scope["shmcoord.node"] = self._node
        answer = Answer(receive, send, self._value)
        failed = True
        try:
            await self._app(scope, answer.receive, answer.send)
            failed = answer.failed(None)
        except (NoBackend, Saturated) as error:
            if answer.began:
                raise
            _log.debug("refused, since a handler found no node: %s", error)
            problem = no_node(error, self._opened if self._list_nodes else None)
            await refuse(problem, self._value, scope, receive, send, fresh=False)
        except BaseException as error:
            failed = answer.failed(error)
            raise
        finally:
            request.end(failed)

    def _begin(self, token: bytes | None) -> Request | Problem:
        """Count a request before anything is done for it, or say why not."""
        node = self._node
        if node is None:
            if self._stopped:
                return self._refusal(token)
            node = self._join()
        try:
            return self._take(node, token)
        except ForkedHandle:  # of the process that forked this one
            with self._joining:
                if self._node is node:
                    self._node = self._opened = None
            return self._take(self._join(), token)

    def _take(self, node: Node, token: bytes | None) -> Request | Problem:
        if token is not None:
            try:
                return node.adopt(token.decode("latin-1"))
            except LeaseLost as error:
                _log.debug("refused: %s", error)
                return lease_lost(error, token)
            except ValueError:
                if not node.left:
                    raise
                return self._refusal(token)
        if node.left or node.state in (State.DRAINING, State.SHUTDOWN):
            return self._refusal(token)
        return node.begin()

    def _refusal(self, token: bytes | None) -> Problem:
        """Of a node that takes nothing any more."""
        if token is not None:
            return lease_lost(LeaseLost("the node has left"), token)
        return draining("" if self._node is None else self._node.name)

    def _join(self) -> Node:
        with self._joining:
            if self._node is not None and not self._node.left:
                return self._node
            segment = self._segment
            opened = segment if isinstance(segment, Segment) else Segment.open(segment)
            try:
                node = self._enter(opened, _told(self._name), endpoint=_told(self._endpoint))
            except BaseException:
                if opened is not segment:
                    opened.close()
                raise
            self._opened = opened
            self._value = node_value(node.name).encode()
            self._node = node
            return node

    def _shut(self) -> None:
        self._stopped = True
        self.drain()

    def _leave(self) -> None:
        """Leave; does nothing the second time."""
        self._stopped = True
        opened, self._opened = self._opened, None
        if self._node is not None:
            self._node.leave()
        if opened is not None and opened is not self._segment:
            opened.close()


def _told(text: str | Callable[[], str]) -> str:
    """A text in which `{pid}` stands for the process, or what a callable returns."""
    if callable(text):
        return text()
    return text.replace("{pid}", str(os.getpid()))
