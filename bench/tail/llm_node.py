"""A node of the language model's shape: serves many streams at once, in steps."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import grpc
import grpc.aio

import shmcoord
from bench.tail.clock import Alarm, exact_timers
from bench.tail.llm import (
    MESSAGE,
    PREFILL_PER_TOKEN_S,
    REQUEST,
    STEP_PER_TOKEN_S,
    STEP_S,
    TOKENS_PER_MESSAGE,
)
from bench.tail.node import GROUP, NodeSettings
from bench.tail.wire import STREAM_METHOD
from shmcoord.transport.grpc import lease_token, refuse_lost_lease_async


@dataclass
class _Stream:
    """A request that is being answered."""

    prompt: int
    answer: int
    made: int = 0
    told: asyncio.Event = field(default_factory=asyncio.Event)


class _Engine:
    """Goes on in steps as long as there is something to answer."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.node: shmcoord.Node | None = None
        self._alarm = Alarm(loop, self._step_done)
        self._streams: list[_Stream] = []  # of the step that is under way
        self._joining: list[_Stream] = []
        self._ends_ns = 0

    @property
    def _held(self) -> int:
        return sum(stream.prompt + stream.made for stream in self._streams)

    def join(self, stream: _Stream) -> None:
        """The stream takes part from the next step on."""
        self._joining.append(stream)
        if not self._streams:
            self._ends_ns = time.monotonic_ns()
            self._begin_step()

    def leave(self, stream: _Stream) -> None:
        """Its client has gone."""
        for streams in (self._streams, self._joining):
            if stream in streams:
                streams.remove(stream)

    def _begin_step(self) -> None:
        read = sum(stream.prompt for stream in self._joining)
        self._streams += self._joining
        self._joining = []
        held = self._held
        if self.node is not None:
            self.node.publish(kv_used=float(held))
        if self._streams:
            step_s = STEP_S + held * STEP_PER_TOKEN_S + read * PREFILL_PER_TOKEN_S
            self._ends_ns += int(step_s * 1e9)
            self._alarm.set(self._ends_ns)

    def _step_done(self) -> None:
        for stream in self._streams:
            stream.made += 1
            if stream.made in (1, stream.answer) or stream.made % TOKENS_PER_MESSAGE == 0:
                stream.told.set()
        self._streams = [stream for stream in self._streams if stream.made < stream.answer]
        self._begin_step()


class _Service(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Streams of tokens, each under the lease that came with the request."""

    def __init__(self, settings: NodeSettings, engine: _Engine) -> None:
        self._number = settings.number
        self._engine = engine
        self._handler = grpc.unary_stream_rpc_method_handler(self._answer)

    def service(self, details: Any) -> Any:
        """As gRPC asks."""
        return self._handler if details.method == STREAM_METHOD else None

    async def _answer(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        node = self._engine.node
        assert node is not None
        token = lease_token(context)
        try:
            work = node.adopt(token) if token else node.request()
        except shmcoord.LeaseLost:
            await refuse_lost_lease_async(context)
        stream = _Stream(*REQUEST.unpack(request))
        with work:
            self._engine.join(stream)
            try:
                sent = 0
                while sent < stream.answer:
                    await stream.told.wait()
                    stream.told.clear()
                    sent = stream.made  # while this is on its way, the engine goes on
                    yield MESSAGE.pack(self._number, sent)
            finally:
                self._engine.leave(stream)


async def _serve(control: Connection, settings: NodeSettings) -> None:
    loop = asyncio.get_running_loop()
    engine = _Engine(loop)
    server = grpc.aio.server(
        handlers=(_Service(settings, engine),), options=[("grpc.so_reuseport", 0)]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    with (
        shmcoord.Segment.open(settings.segment) as segment,
        segment.join(
            f"node-{settings.number}",
            group=GROUP,
            endpoint=f"127.0.0.1:{port}",
            gauges=("kv_used",),
        ) as node,
    ):
        engine.node = node
        await server.start()
        stopped = asyncio.Event()
        loop.add_reader(control.fileno(), stopped.set)
        control.send(port)
        await stopped.wait()
        loop.remove_reader(control.fileno())
        await server.stop(None)
        with contextlib.suppress(BrokenPipeError):
            control.send([])


def run_node(control: Connection, settings: NodeSettings) -> None:
    """The life of the process, as `node.run_node`."""
    exact_timers()
    asyncio.run(_serve(control, settings))
