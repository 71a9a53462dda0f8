"""Types of ASGI 3, and what we send by it ourselves."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from shmcoord.http._common import NODE_HEADER, OWN_PREFIX, REFUSED_STATUS
from shmcoord.http._problem import Problem

__all__ = ["ASGIApp", "Answer", "Message", "Receive", "Scope", "Send", "refuse"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

# Close codes of WebSockets, registered with RFC 6455 (sections 7.4.1 and 11.7).
_INTERNAL_ERROR = 1011
_TRY_AGAIN_LATER = 1013


_LAST = ("http.response.body", "websocket.http.response.body")


class Answer:
    """The application's `receive` and `send`: names the node, and notes how it turned out.

    Attributes:
        began: Whether anything of the response was sent.
        gone: Whether the application was told that the client went away before its end.
    """

    __slots__ = ("_bad", "_complete", "_node", "_receive", "_send", "began", "gone")

    def __init__(self, receive: Receive, send: Send, node: bytes) -> None:
        self._receive = receive
        self._send = send
        self._node = node
        self._bad = False
        self._complete = False
        self.began = False
        self.gone = False

    def failed(self, error: BaseException | None) -> bool:
        """Whether the request is a failure of the node.

        Args:
            error: What the application raised. A cancellation is no Exception, under no event
                loop, and counts as little as what is raised since the client has gone.
        """
        if self._bad:
            return True
        if self.gone:
            return False
        if error is not None:
            return isinstance(error, Exception)
        return not self.began

    async def receive(self) -> Message:
        """Pass on one event of the server."""
        message = await self._receive()
        # Behind the end of the response, too, servers say that the client is gone.
        if not self._complete and message["type"] in ("http.disconnect", "websocket.disconnect"):
            self.gone = True
        return message

    async def send(self, message: Message) -> None:
        """Pass on one event of the application."""
        kind = message["type"]
        if kind in ("http.response.start", "websocket.http.response.start"):
            self.began = True
            self._bad = message["status"] >= 500
            message = self._named(message)
        elif kind == "websocket.accept":
            self.began = True
            message = self._named(message)
        elif kind == "websocket.close":
            self.began = self._complete = True
            self._bad = message.get("code") == _INTERNAL_ERROR
        elif kind in _LAST and not message.get("more_body"):
            self._complete = True
        try:
            await self._send(message)
        except OSError:  # so servers tell, from version 2.4 of the specification on
            self.gone = True
            raise

    def _named(self, message: Message) -> Message:
        headers = [
            header
            for header in message.get("headers") or ()
            if not header[0].lower().startswith(OWN_PREFIX)
        ]
        headers.append((NODE_HEADER, self._node))
        return {**message, "headers": headers}


async def refuse(
    problem: Problem, node: bytes, scope: Scope, receive: Receive, send: Send, *, fresh: bool = True
) -> None:
    """Answer with a problem instead of the application.

    Args:
        problem: What is wrong.
        node: Value of the header that names the node.
        scope: Of the connection.
        receive: Of the connection.
        send: Of the connection.
        fresh: Whether the application has not seen the connection yet.
    """
    body = problem.body()
    headers = [*problem.headers(body), (NODE_HEADER, node)]
    kind = "http.response"
    if scope["type"] == "websocket":
        if fresh:
            await receive()  # websocket.connect, which comes before any answer
        if "websocket.http.response" not in (scope.get("extensions") or {}):
            # The server makes a plain 403 of it, as long as the handshake is not over.
            code = _TRY_AGAIN_LATER
            await send({"type": "websocket.close", "code": code, "reason": problem.reason})
            return
        kind = "websocket.http.response"
    # No "connection: close": a server that closes before it has read the body resets the
    # connection, and the refusal would be lost on its way.
    await send({"type": f"{kind}.start", "status": REFUSED_STATUS, "headers": headers})
    await send({"type": f"{kind}.body", "body": body})
