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


class Answer:
    """The application's `send`: names the node in the response, and notes how it turned out.

    Attributes:
        began: Whether anything of the response was sent.
        failed: Whether it is a failure so far; one that has not begun is.
    """

    __slots__ = ("_node", "_send", "began", "failed")

    def __init__(self, send: Send, node: bytes) -> None:
        self._send = send
        self._node = node
        self.began = False
        self.failed = True

    async def send(self, message: Message) -> None:
        """Pass on one event of the application."""
        kind = message["type"]
        if kind in ("http.response.start", "websocket.http.response.start"):
            self.began = True
            self.failed = message["status"] >= 500
            message = self._named(message)
        elif kind == "websocket.accept":
            self.began = True
            self.failed = False
            message = self._named(message)
        elif kind == "websocket.close":
            self.began = True
            self.failed = message.get("code") == _INTERNAL_ERROR
        await self._send(message)

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
