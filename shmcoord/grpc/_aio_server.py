"""A `grpc.aio.Server` that is a node of a segment."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from typing import Any

import grpc
import grpc.aio

from shmcoord.api import Segment
from shmcoord.grpc._aio_instrument import AioInstrument
from shmcoord.grpc._closing import LOOK_S, hang_up
from shmcoord.grpc._membership import Place
from shmcoord.grpc._plug import Health
from shmcoord.grpc._serving import Serving, with_own_port

__all__ = ["AioServer", "server"]

_log = logging.getLogger("shmcoord.grpc")


class AioServer(Serving, grpc.aio.Server):
    """A `grpc.aio.Server` that joins a segment when it starts, and leaves it when it stops.

    Made by `shmcoord.grpc.aio.server`.
    """

    _real: grpc.aio.Server
    _plug: AioInstrument

    def __init__(
        self,
        real: grpc.aio.Server,
        plug: AioInstrument,
        endpoint: str | None,
        own_pool: Executor | None,
    ) -> None:
        super().__init__(real, plug, endpoint)
        self._own_pool = own_pool
        self._started = False
        self._stopping: asyncio.Task[None] | None = None
        self._stop_by = float("inf")

    async def start(self) -> None:
        """Serve, then join the segment.

        Raises:
            ValueError: It was started before; or it has no port and no endpoint.
            ShmcoordError: As `Segment.open` and `Segment.join`, `NodeExists` for one; the server
                is stopped again.
        """
        if self._started:
            raise ValueError("Cannot start already-started server!")
        endpoint = self._endpoint_to_publish()
        self._started = True
        await self._real.start()
        try:
            self._plug.start(endpoint)
        except BaseException:
            self._plug.stop()  # who has come already waits for the join no longer
            await self._hang_up()
            raise

    async def stop(self, grace: float | None) -> None:
        """Drain, stop and leave the segment; returns when that is done.

        From here on routers send nothing more, the health is NOT_SERVING, and requests without a
        lease are refused with UNAVAILABLE; requests that were sent here before are served. Whoever
        has no answer when the grace period is over is told UNAVAILABLE.

        Args:
            grace: Longest time for what still runs, in seconds; None: stop at once. A later call
                may only shorten it.

        Raises:
            ForkedHandle: The server was started by the parent of this process.
        """
        self._plug.check_process()
        if not self._started:
            self._plug.stop()
            return
        self._stop_by = min(self._stop_by, time.monotonic() + (grace or 0.0))
        if self._stopping is None:
            self._stopping = asyncio.get_running_loop().create_task(self._stop())
        await asyncio.shield(self._stopping)

    async def wait_for_termination(self, timeout: float | None = None) -> bool:
        """As `grpc.aio.Server`: wait until it has stopped; tell whether the time ran out."""
        ends = None if timeout is None else time.monotonic() + timeout
        if await self._real.wait_for_termination(timeout):
            return True
        if self._stopping is None:
            return False
        left_s = None if ends is None else max(0.0, ends - time.monotonic())
        done, _ = await asyncio.wait((self._stopping,), timeout=left_s)
        return not done

    async def _stop(self) -> None:
        try:
            await self._plug.drain()
            while not self._plug.idle() and (left_s := self._stop_by - time.monotonic()) > 0.0:
                await asyncio.sleep(min(LOOK_S, left_s))
            if not self._plug.idle():
                _log.warning("node %s stops with requests unfinished", self._plug.name)
                await self._plug.abort_running()
        except Exception:  # noqa: BLE001 - whatever went wrong, the server stops
            _log.exception("node %s could not drain", self._plug.name)
        finally:
            await self._hang_up()

    async def _hang_up(self) -> None:
        """End every connection, then the server; leave the segment."""
        try:
            try:
                for sleep_s in hang_up(self._listeners):
                    await asyncio.sleep(sleep_s)
            except Exception:  # noqa: BLE001 - whatever went wrong, the server stops
                _log.exception("node %s could not end its connections", self._plug.name)
            finally:
                await self._real.stop(None)
        finally:
            self._plug.stop()
            if self._own_pool is not None:
                self._own_pool.shutdown(wait=False)


def server(
    migration_thread_pool: Executor | None = None,
    *,
    node: str,
    segment: str | Segment,
    group: str,
    endpoint: str | None = None,
    capacity: int | None = None,
    weight: float = 1.0,
    interval_s: float = 2.0,
    gauges: Iterable[str] = (),
    slow_start_s: float = 0.0,
    exclude: Iterable[str] = (),
    health: Health | None = None,
    handlers: Sequence[grpc.GenericRpcHandler] | None = None,
    interceptors: Sequence[grpc.aio.ServerInterceptor] | None = None,
    options: Sequence[tuple[str, Any]] | None = None,
    maximum_concurrent_rpcs: int | None = None,
    compression: grpc.Compression | None = None,
) -> AioServer:
    """Return a `grpc.aio.Server` that is a node of a segment.

    Args:
        migration_thread_pool: As `grpc.aio.server`: runs handlers that are plain functions.
        node: Its name, unique in the segment.
        segment: Name of the segment, or an open one, which then stays open.
        group: The nodes that can serve the same requests.
        endpoint: Where clients reach it; None: the first port that is added.
        capacity: Requests that it shall get at once; None: as many as there are lease cells.
        weight: Its share of the load relative to others.
        interval_s: Heartbeat interval in seconds.
        gauges: Names of the node's gauges; they are named metrics of its load reports as well.
        slow_start_s: For how long routers raise its share from a tenth to all of it, in seconds.
        exclude: Beginnings of full names (`/package.Service/`) of methods whose requests are not
            the load that this node publishes; they are also served while it drains.
        health: Is told NOT_SERVING when the server drains.
        handlers: As `grpc.aio.server`.
        interceptors: As `grpc.aio.server`; they run inside of what counts.
        options: As `grpc.aio.server`; a port is not shared unless `grpc.so_reuseport` is given.
        maximum_concurrent_rpcs: As `grpc.aio.server`.
        compression: As `grpc.aio.server`.

    Raises:
        ValueError: A number is out of its range.
    """
    place = Place(
        node,
        segment,
        group,
        endpoint,
        capacity,
        weight,
        interval_s,
        gauges,
        slow_start_s,
        exclude,
    )
    plug = AioInstrument(place, health)
    pool = plug.executor(migration_thread_pool)
    real = grpc.aio.server(
        pool,
        handlers=[*(handlers or ()), *plug.handlers],
        interceptors=[plug.interceptor, *(interceptors or ())],
        options=with_own_port(options),
        maximum_concurrent_rpcs=maximum_concurrent_rpcs,
        compression=compression,
    )
    return AioServer(real, plug, endpoint, pool if migration_thread_pool is None else None)
