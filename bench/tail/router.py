"""A router's process: sends its part of the trace, each request when it is due, or in a loop.

Open loop: a request never waits for the answers to others, and its latency counts from the time
when it was due, also where this process was late. Closed loop: so many in flight, one after the
other.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from dataclasses import dataclass
from enum import IntEnum
from multiprocessing.connection import Connection

import grpc
import numpy as np
import uvloop
from numpy.typing import NDArray

import shmcoord
from bench.tail.clients import Client, ClientSettings, make_client
from bench.tail.clock import Alarm, exact_timers
from bench.tail.trace import SHAPES, Trace, make_trace
from bench.tail.wire import WORK_ANSWER, WORK_REQUEST

KEYS = 256
"""So many different keys do requests have, where a policy asks for one."""


class Outcome(IntEnum):
    """How a request ended."""

    ANSWERED = 0
    REFUSED = 1
    LATE = 2
    FAILED = 3


RECORD = np.dtype(
    [
        ("index", np.int64),
        ("outcome", np.int8),
        ("node", np.int8),
        ("due_ns", np.int64),
        ("sent_ns", np.int64),
        ("begun_ns", np.int64),
        ("ended_ns", np.int64),
        ("done_ns", np.int64),
    ]
)
"""A request: times by CLOCK_MONOTONIC; sent, begun, ended and node only where it was answered."""


@dataclass(frozen=True)
class RouterSettings:
    """What a router sends.

    Attributes:
        number, routers: which one it is, of how many.
        client: how it sends.
        shape, arrivals, load, seconds, seed: the trace; see `make_trace`.
        deadline_s: how long a request may take, from the time when it was due.
        drain_s: how long it waits for answers after the last arrival.
        in_flight: not 0: closed loop, so many of this router at once, work 0, for `seconds`.
    """

    number: int
    routers: int
    client: ClientSettings
    shape: str
    arrivals: str
    load: float
    seconds: float
    seed: int
    deadline_s: float
    drain_s: float
    in_flight: int = 0


class _Run:
    """One run of one router."""

    def __init__(self, settings: RouterSettings, client: Client, trace: Trace | None) -> None:
        self._settings = settings
        self._client = client
        self._deadline_ns = int(settings.deadline_s * 1e9)
        self._done: list[tuple[int, int, int, int, int, int, int, int]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        if trace is not None:
            self._mine = trace.of_router(settings.number, settings.routers)
            self._due_ns: list[int] = (trace.arrival_s[self._mine] * 1e9).astype(int).tolist()
            works = (trace.work_s[self._mine] * 1e6).round().astype(int).tolist()
            self._requests = [WORK_REQUEST.pack(work) for work in works]
            keys = (trace.draw[self._mine] * settings.routers % 1.0 * KEYS).astype(int)
            self._keys: list[int] = keys.tolist()

    async def open_loop(self, start_ns: int) -> None:
        """Sends everything when it is due; returns when all is answered, or at the drain's end."""
        loop = asyncio.get_running_loop()
        all_sent = loop.create_future()
        count = len(self._due_ns)
        position = 0

        def send_due() -> None:
            nonlocal position
            now_ns = time.monotonic_ns() - start_ns
            while position < count and self._due_ns[position] <= now_ns:
                task = loop.create_task(self._one(position, start_ns))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                position += 1
            if position < count:
                alarm.set(start_ns + self._due_ns[position])
            elif not all_sent.done():
                all_sent.set_result(None)

        alarm = Alarm(loop, send_due)
        alarm.set(start_ns)
        await all_sent
        alarm.close()
        end_ns = start_ns + int((self._settings.seconds + self._settings.drain_s) * 1e9)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=(end_ns - time.monotonic_ns()) / 1e9)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def closed_loop(self, start_ns: int) -> None:
        """Keeps so many requests without work in flight."""
        await asyncio.sleep(max(0.0, (start_ns - time.monotonic_ns()) / 1e9))
        end_ns = start_ns + int(self._settings.seconds * 1e9)
        request = WORK_REQUEST.pack(0)

        async def worker(number: int) -> None:
            while (now_ns := time.monotonic_ns()) < end_ns:
                await self._send(number, request, number, now_ns)

        await asyncio.gather(*(worker(number) for number in range(self._settings.in_flight)))

    async def _one(self, position: int, start_ns: int) -> None:
        index = int(self._mine[position])
        due_ns = start_ns + self._due_ns[position]
        await self._send(index, self._requests[position], self._keys[position], due_ns)

    async def _send(self, index: int, request: bytes, key: int, due_ns: int) -> None:
        left_s = (due_ns + self._deadline_ns - time.monotonic_ns()) / 1e9
        try:
            sent_ns, answer = await self._client.send(request, key, left_s)
        except shmcoord.Saturated:
            outcome = Outcome.REFUSED
        except asyncio.CancelledError:
            outcome = Outcome.LATE
        except grpc.RpcError as error:
            outcome = _outcome(error.code())
        else:
            done_ns = time.monotonic_ns()
            late = done_ns - due_ns > self._deadline_ns
            outcome = Outcome.LATE if late else Outcome.ANSWERED
            work = WORK_ANSWER.unpack(answer)
            self._done.append((index, outcome, work[0], due_ns, sent_ns, *work[1:], done_ns))
            return
        self._done.append((index, outcome, -1, due_ns, 0, 0, 0, time.monotonic_ns()))

    def records(self) -> NDArray[np.void]:
        """All that was sent, as an array of RECORD."""
        return np.array(self._done, dtype=RECORD)


def _outcome(code: grpc.StatusCode) -> Outcome:
    if code in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
        return Outcome.LATE
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED):
        return Outcome.REFUSED  # also HAProxy's and nginx's 502 and 503
    return Outcome.FAILED


async def _run(control: Connection, settings: RouterSettings) -> None:
    trace = None
    if not settings.in_flight:
        shape = SHAPES[settings.shape]
        trace = make_trace(shape, settings.arrivals, settings.load, settings.seconds, settings.seed)
    client = make_client(settings.client)
    run = _Run(settings, client, trace)
    await client.open()
    gc.freeze()
    gc.disable()
    control.send(None)
    start_ns = control.recv()
    await (run.closed_loop(start_ns) if settings.in_flight else run.open_loop(start_ns))
    control.send(run.records())
    control.recv()  # our client, and its leases, live until all routers have ended
    await client.close()


def run_router(control: Connection, settings: RouterSettings) -> None:
    """The life of a router's process.

    Args:
        control: gets None when it is connected; gives the start (monotonic_ns); gets an array of
            RECORD; gives the word to end. The end of the pipe ends the process.
        settings: what it sends.
    """
    exact_timers()
    with contextlib.suppress(EOFError, BrokenPipeError):
        uvloop.run(_run(control, settings))
