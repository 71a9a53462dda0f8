"""The parts of an event loop's plug-in, for those who build their server themselves."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Iterable
from concurrent.futures import Executor, ThreadPoolExecutor

import grpc
import grpc.aio

from shmcoord.api import Segment
from shmcoord.grpc._aio_handlers import AioHandlers, AioInterceptor
from shmcoord.grpc._aio_plain import PlainExecutor
from shmcoord.grpc._closing import LOOK_S
from shmcoord.grpc._membership import Membership, Place
from shmcoord.grpc._orca_service import aio_handler
from shmcoord.grpc._plug import Health, Plug

__all__ = ["AioInstrument", "instrument"]


class AioInstrument(Plug):
    """What makes a `grpc.aio.Server` a node of a segment. Made by `instrument`.

    Attributes:
        interceptor: Must be the first interceptor of the server.
        handlers: Generic handlers of the out-of-band load reports, for the server's `handlers`.
    """

    def __init__(self, place: Place, health: Health | None = None) -> None:
        # The loop cannot wait for the joining, which takes a moment of its own.
        super().__init__(Membership(place, join_wait_s=0.0), health)
        self._behaviors = AioHandlers(self._membership)
        self.interceptor: grpc.aio.ServerInterceptor = AioInterceptor(self._behaviors)
        self.handlers: list[grpc.GenericRpcHandler] = [aio_handler(self._membership)]

    def executor(self, workers: Executor | None = None) -> Executor:
        """Return the executor to give to `grpc.aio.server` as `migration_thread_pool`.

        Only handlers that are plain functions run there.

        Args:
            workers: The executor that shall run them; None: a pool like asyncio's own.
        """
        if workers is None:
            workers = ThreadPoolExecutor(thread_name_prefix="shmcoord-worker")
        return PlainExecutor(workers)

    async def drain(self) -> None:
        """Publish DRAINING, make the health NOT_SERVING, refuse new requests without a lease.

        Requests whose lease was reserved before are still served.
        """
        self._membership.drain()
        if self._health is not None and not self._drained:
            self._drained = True
            told = self._health.enter_graceful_shutdown()
            if inspect.isawaitable(told):
                await told

    def idle(self) -> bool:
        """Whether no request waits, runs or is still owed its status, and none is on its way."""
        return self._behaviors.idle() and self._membership.idle()

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until every request has its status; tell whether it came so.

        Args:
            timeout_s: Longest wait in seconds.
        """
        ends = time.monotonic() + timeout_s
        while not self.idle():
            if time.monotonic() >= ends:
                return False
            await asyncio.sleep(LOOK_S)
        return True

    async def abort_running(self, timeout_s: float = 0.2) -> bool:
        """End with UNAVAILABLE what runs on the loop; tell whether all have their status.

        Args:
            timeout_s: How long clients have to take in their status, in seconds.
        """
        self._behaviors.stop_all()
        ends = time.monotonic() + timeout_s
        while not self._behaviors.idle() and time.monotonic() < ends:
            await asyncio.sleep(LOOK_S)
        return self._behaviors.idle()


def instrument(
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
) -> AioInstrument:
    """Return what makes a `grpc.aio.Server` of your own a node of a segment.

        plug = shmcoord.grpc.aio.instrument(node="B", segment="shm_host1", group="GREEN",
                                            endpoint="127.0.0.1:50051")
        server = grpc.aio.server(plug.executor(), handlers=plug.handlers,
                                 interceptors=[plug.interceptor, *yours])
        server.add_insecure_port("127.0.0.1:50051")
        await server.start()
        plug.start()
        ...
        await plug.drain()
        await plug.wait_idle(5.0)
        await plug.abort_running()
        await server.stop(None)
        plug.stop()

    Args:
        node: Its name, unique in the segment.
        segment: Name of the segment, or an open one, which then stays open.
        group: The nodes that can serve the same requests.
        endpoint: Where clients reach the server.
        capacity: Requests that it shall get at once; None: as many as there are lease cells.
        weight: Its share of the load relative to others.
        interval_s: Heartbeat interval in seconds.
        gauges: Names of the node's gauges; they are named metrics of its load reports as well.
        slow_start_s: For how long routers raise its share from a tenth to all of it, in seconds.
        exclude: Beginnings of full names (`/package.Service/`) of methods whose requests are not
            the load that this node publishes; they are also served while it drains.
        health: Is told when the server drains.
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
    return AioInstrument(place, health)
