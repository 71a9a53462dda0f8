"""Nodes that serve gRPC on an event loop and adopt leases, for the tests of the aio channel.

Messages are strings. What a node does, the request says:

- `fail CODE`: aborts with that code
- `hold`: waits until `node.let_go` is set; `hold before`: before it adopts; `greet`: after it has
  sent the initial metadata
- `lose`: refuses the lease as if it had been reaped; `refuse when let go`: after `node.let_go`
- anything else: is answered

Count takes a number behind that; with `then hold` or `then fail` it does that after the last
response. Gather and Chat find the word in the metadata `words`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio

from shmcoord import LeaseLost, Segment
from shmcoord.grpc._common import NODE_KEY
from shmcoord.transport.grpc import lease_token, refuse_lost_lease_async

CODEC = {"request_serializer": str.encode, "response_deserializer": bytes.decode}
SERVICE = "test.Work"


def _encoded(message: str | bytes) -> bytes:
    """grpcio encodes strings that are streamed, and then calls the serializer all the same."""
    return message if isinstance(message, bytes) else message.encode()


class Stub:
    """What generated code would hold."""

    def __init__(self, channel: Any, **options: Any) -> None:
        self.Say = channel.unary_unary(f"/{SERVICE}/Say", **CODEC, **options)
        self.Count = channel.unary_stream(f"/{SERVICE}/Count", **CODEC, **options)
        self.Gather = channel.stream_unary(f"/{SERVICE}/Gather", **CODEC, **options)
        self.Chat = channel.stream_stream(f"/{SERVICE}/Chat", **CODEC, **options)


class Node:
    """A server with its node; `async with` starts and stops both."""

    def __init__(
        self,
        segment: Segment,
        name: str = "A",
        *,
        capacity: int = 4,
        tells: bool = True,
        address: str = "127.0.0.1:0",
        credentials: grpc.ServerCredentials | None = None,
        **joins: Any,
    ) -> None:
        self.segment = segment
        self.name = name
        self.capacity = capacity
        self.joins = joins
        self.tells = tells
        self.seen: Counter[str] = Counter()  # requests that came, by method
        self.done: Counter[str] = Counter()  # those whose lease was adopted
        self.metadata: list[dict[str, Any]] = []
        self.arrived = asyncio.Event()
        self.let_go = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        codec = {"request_deserializer": bytes.decode, "response_serializer": _encoded}
        handlers = {
            "Say": grpc.unary_unary_rpc_method_handler(self._say, **codec),
            "Count": grpc.unary_stream_rpc_method_handler(self._count, **codec),
            "Gather": grpc.stream_unary_rpc_method_handler(self._gather, **codec),
            "Chat": grpc.stream_stream_rpc_method_handler(self._chat, **codec),
        }
        self.server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, handlers),)
        )
        if credentials is None:
            port = self.server.add_insecure_port(address)
        else:
            port = self.server.add_secure_port(address, credentials)
        self.endpoint = address if address.startswith("unix:") else f"127.0.0.1:{port}"
        self.node: Any = None

    async def start(self, *, join: bool = True) -> Node:
        await self.server.start()
        if join:
            self.join()
        return self

    def join(self) -> None:
        self.node = self.segment.join(
            self.name,
            group="GREEN",
            endpoint=self.endpoint,
            capacity=self.capacity,
            interval_s=0.05,
            **self.joins,
        )

    async def stop(self) -> None:
        self.let_go.set()
        if self.node is not None:
            self.node.leave()
        await self.server.stop(None)

    async def __aenter__(self) -> Node:
        return await self.start()

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    @contextlib.asynccontextmanager
    async def _work(self, method: str, words: str, context: Any) -> AsyncIterator[None]:
        self.seen[method] += 1
        self.metadata.append(dict(context.invocation_metadata()))
        self.arrived.set()
        if words == "refuse when let go":
            await self.let_go.wait()
            words = "lose"
        if words == "lose":
            await refuse_lost_lease_async(context)
        try:
            if words == "hold before":
                await self.let_go.wait()
            token = lease_token(context)
            try:
                work = self.node.request() if token is None else self.node.adopt(token)
            except LeaseLost:
                await refuse_lost_lease_async(context)
            with work:
                self.done[method] += 1
                if self.tells:
                    context.set_trailing_metadata(((NODE_KEY, self.name),))
                if words == "greet":
                    await context.send_initial_metadata(())
                if words in ("hold", "greet"):
                    await self.let_go.wait()
                if words.startswith("fail "):
                    code = grpc.StatusCode[words.split()[1]]
                    await context.abort(code, f"said {code.name}", ((NODE_KEY, self.name),))
                yield
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def _say(self, request: str, context: Any) -> str:
        async with self._work("Say", request, context):
            return f"{self.name}: {request}"

    async def _count(self, request: str, context: Any) -> AsyncIterator[str]:
        words, _, number = request.rpartition(" ")
        async with self._work("Count", words, context):
            for index in range(int(number)):
                yield f"{self.name} {index}"
            if words == "then hold":
                await self.let_go.wait()
            if words == "then fail":
                await context.abort(grpc.StatusCode.UNAVAILABLE, "in the middle")

    async def _gather(self, requests: AsyncIterator[str], context: Any) -> str:
        words = dict(context.invocation_metadata()).get("words", "")
        async with self._work("Gather", words, context):
            return f"{self.name}: " + "+".join([request async for request in requests])

    async def _chat(self, requests: AsyncIterator[str], context: Any) -> AsyncIterator[str]:
        words = dict(context.invocation_metadata()).get("words", "")
        async with self._work("Chat", words, context):
            async for request in requests:
                yield f"{self.name}: {request}"


def held(segment: Segment) -> int:
    """Leases that are held on all nodes of a segment."""
    return sum(status.inflight for status in segment.snapshot())


async def nothing_held(segment: Segment, timeout_s: float = 5.0) -> None:
    """Wait until no lease is held."""
    loop = asyncio.get_running_loop()
    ends = loop.time() + timeout_s
    while held(segment):
        assert loop.time() < ends, f"still held: {held(segment)}"
        await asyncio.sleep(0.005)
