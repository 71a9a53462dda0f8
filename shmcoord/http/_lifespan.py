"""The lifespan protocol of ASGI, between a server and an application that may not speak it.

The node joins when the application has started, just before the server hears of it: a router
sends from the moment in which a node is there, and an application that still loads its model
would let the first requests wait. The server may begin to listen a moment later; a router that
is faster is refused the connection, so that nothing was sent, and goes elsewhere.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from shmcoord.http._asgi import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Lifespan"]

_log = logging.getLogger("shmcoord.http")


class Lifespan:
    """One run of the protocol."""

    __slots__ = (
        "_answered",
        "_drain",
        "_failed",
        "_heard",
        "_join",
        "_leave",
        "_over",
        "_receive",
        "_send",
    )

    def __init__(
        self,
        receive: Receive,
        send: Send,
        join: Callable[[], object],
        drain: Callable[[], None],
        leave: Callable[[], None],
    ) -> None:
        self._receive = receive
        self._send = send
        self._join = join
        self._drain = drain
        self._leave = leave
        self._heard: str = ""  # the last event that came from the server
        self._answered = False  # whether the server has been told of the start
        self._failed = False  # whether that was a failure of ours
        self._over = False

    async def run(self, app: ASGIApp, scope: Scope) -> None:
        """Run the application's part, and ours around it."""
        try:
            try:
                await app(scope, self.receive, self.send)
            except Exception as error:
                if self._answered:
                    raise
                # The specification lets an application that has no lifespan raise anything.
                _log.log(
                    logging.WARNING if self._heard else logging.DEBUG,
                    "the application has no lifespan, or its start failed: %r",
                    error,
                )
            if not self._over and not self._failed:
                await self._go_on_alone()
        finally:
            self._leave()

    async def receive(self) -> Message:
        """Give the application the next event."""
        if self._failed:  # it has started in vain, and shall clean up
            return {"type": "lifespan.shutdown"}
        message = await self._receive()
        self._heard = message["type"]
        if self._heard == "lifespan.shutdown":
            self._drain()
        return message

    async def send(self, message: Message) -> None:
        """Pass on an event of the application."""
        kind = message["type"]
        if self._failed:
            return  # the server has heard of it
        if kind == "lifespan.startup.complete":
            await self._start(message)
            return
        if kind == "lifespan.startup.failed":
            self._answered = self._over = True
        elif kind in ("lifespan.shutdown.complete", "lifespan.shutdown.failed"):
            self._over = True
            self._leave()
        await self._send(message)

    async def _start(self, message: Message) -> None:
        self._answered = True
        try:
            self._join()
        except Exception as error:  # noqa: BLE001 (the server reports it)
            self._failed = True
            _log.exception("the node could not join")
            text = f"{type(error).__name__}: {error}"
            await self._send({"type": "lifespan.startup.failed", "message": text})
        else:
            await self._send(message)

    async def _go_on_alone(self) -> None:
        """Do what the application does not, to the end."""
        if not self._heard:
            await self.receive()
        if not self._answered:
            await self._start({"type": "lifespan.startup.complete"})
        if self._failed:
            return
        while self._heard != "lifespan.shutdown":
            await self.receive()
        self._leave()
        await self._send({"type": "lifespan.shutdown.complete"})
