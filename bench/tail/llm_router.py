"""A router of the language model's shape: open loop, streams of tokens."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection

import grpc
import grpc.aio
import numpy as np

import shmcoord
from bench.tail.clients import OPTIONS
from bench.tail.clock import Alarm, exact_timers
from bench.tail.llm import MESSAGE, RECORD, REQUEST, WAYS, Streams, make_streams
from bench.tail.node import GROUP
from bench.tail.router import Outcome
from bench.tail.wire import STREAM_METHOD
from shmcoord.transport.grpc import LEASE_KEY


@dataclass(frozen=True)
class StreamSettings:
    """What a router sends.

    Attributes:
        number, routers: which one it is, of how many.
        way: a name of WAYS.
        segment: shmcoord's segment.
        targets: addresses of the nodes.
        load, seconds, seed: see `make_streams`.
        drain_s: how long it waits for answers after the last arrival.
    """

    number: int
    routers: int
    way: str
    segment: str
    targets: tuple[str, ...]
    load: float
    seconds: float
    seed: int
    drain_s: float = 20.0


class _Run:
    """One run of one router."""

    def __init__(self, settings: StreamSettings, streams: Streams) -> None:
        self._settings = settings
        self._streams = streams
        self._way = WAYS[settings.way]
        self._router = shmcoord.Router(settings.segment, policy=self._way.policy)
        self._channels = {
            target: grpc.aio.insecure_channel(target, options=OPTIONS)
            for target in settings.targets
        }
        self._calls = {
            target: channel.unary_stream(STREAM_METHOD)
            for target, channel in self._channels.items()
        }
        self._done: list[tuple[int, ...]] = []

    async def connect(self) -> None:
        await asyncio.gather(*(channel.channel_ready() for channel in self._channels.values()))

    async def run(self, start_ns: int) -> None:
        loop = asyncio.get_running_loop()
        settings, streams = self._settings, self._streams
        mine = np.flatnonzero((streams.draw * settings.routers).astype(int) == settings.number)
        tasks = []
        for index in mine.tolist():
            due_ns = start_ns + int(streams.arrival_s[index] * 1e9)
            due = loop.create_future()
            alarm = Alarm(loop, lambda due=due: due.set_result(None))  # type: ignore[misc]
            alarm.set(due_ns)
            await due
            alarm.close()
            tasks.append(loop.create_task(self._one(index, due_ns)))
        ends_ns = start_ns + int((settings.seconds + settings.drain_s) * 1e9)
        if tasks:
            left_s = (ends_ns - time.monotonic_ns()) / 1e9
            _, unfinished = await asyncio.wait(tasks, timeout=max(0.0, left_s))
            for task in unfinished:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(self, index: int, due_ns: int) -> None:
        streams = self._streams
        cost = streams.cost(index) if self._way.costs else 1
        request = REQUEST.pack(int(streams.prompt[index]), int(streams.answer[index]))
        outcome, node, tokens, first_ns = Outcome.LATE, -1, 0, 0
        try:
            lease = await self._router.acquire_async(GROUP, timeout_s=30.0, cost=cost)
            with lease:
                call = self._calls[lease.endpoint]
                async for message in call(request, metadata=((LEASE_KEY, lease.token),)):
                    node, tokens = MESSAGE.unpack(message)
                    first_ns = first_ns or time.monotonic_ns()
            outcome = Outcome.ANSWERED
        except shmcoord.Saturated:
            outcome = Outcome.REFUSED
        except grpc.RpcError:
            outcome = Outcome.FAILED
        finally:
            if outcome is not Outcome.ANSWERED:
                node = -1
            done_ns = time.monotonic_ns()
            self._done.append((index, outcome, node, tokens, due_ns, first_ns, done_ns))

    def records(self) -> np.ndarray[tuple[int], np.dtype[np.void]]:
        return np.array(self._done, dtype=RECORD)

    async def close(self) -> None:
        self._router.close()
        for channel in self._channels.values():
            await channel.close()


async def _run(control: Connection, settings: StreamSettings) -> None:
    run = _Run(settings, make_streams(settings.load, settings.seconds, settings.seed))
    await run.connect()
    control.send(None)
    await run.run(control.recv())
    control.send(run.records())
    control.recv()
    await run.close()


def run_router(control: Connection, settings: StreamSettings) -> None:
    """The life of the process, as `router.run_router`."""
    exact_timers()
    with contextlib.suppress(EOFError, BrokenPipeError):
        asyncio.run(_run(control, settings))
