"""A threaded `grpc.Server` that is a node of a segment."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from shmcoord.api import Segment
from shmcoord.grpc._closing import LOOK_S, hang_up
from shmcoord.grpc._instrument import Instrument
from shmcoord.grpc._membership import Place
from shmcoord.grpc._plug import Health
from shmcoord.grpc._serving import Serving, with_own_port

__all__ = ["Server", "server"]

_log = logging.getLogger("shmcoord.grpc")


class Server(Serving, grpc.Server):
    """A `grpc.Server` that joins a segment when it starts, and leaves it when it stops.

    Made by `shmcoord.grpc.server`.
    """

    _real: grpc.Server
    _plug: Instrument

    def __init__(
        self,
        real: grpc.Server,
        plug: Instrument,
        endpoint: str | None,
        executor: ThreadPoolExecutor,
    ) -> None:
        super().__init__(real, plug, endpoint)
        self._executor = executor
        self._lock = threading.Condition()
        self._started = False
        self._stopping: threading.Thread | None = None
        self._stop_by = float("inf")
        self._stopped = threading.Event()

    def start(self) -> None:
        """Serve, then join the segment.

        Raises:
            ValueError: It was started before; or it has no port and no endpoint.
            ShmcoordError: As `Segment.open` and `Segment.join`, `NodeExists` for one; the server
                is stopped again.
        """
        with self._lock:
            if self._started:
                raise ValueError("Cannot start already-started server!")
            endpoint = self._endpoint_to_publish()
            self._started = True
            self._real.start()
            try:
                self._plug.start(endpoint)
            except BaseException:
                self._plug.stop()  # who has come already waits for the join no longer
                self._hang_up()
                self._stopped.set()
                raise

    def stop(self, grace: float | None) -> threading.Event:
        """Drain, stop and leave the segment.

        From here on routers send nothing more, the health is NOT_SERVING, and requests without a
        lease are refused with UNAVAILABLE; requests that were sent here before are served. Whoever
        has no answer when the grace period is over is told UNAVAILABLE.

        Args:
            grace: Longest time for what still runs, in seconds; None: stop at once, and wait
                until it is done. A later call may only shorten it.

        Returns:
            An event that is set once the server has stopped and left the segment.

        Raises:
            ForkedHandle: The server was started by the parent of this process.
        """
        self._plug.check_process()
        with self._lock:
            if not self._started:
                self._plug.stop()
                self._stopped.set()
                return self._stopped
            self._stop_by = min(self._stop_by, time.monotonic() + (grace or 0.0))
            self._lock.notify_all()
            if self._stopping is None and not self._stopped.is_set():
                self._stopping = threading.Thread(target=self._stop, name="shmcoord-stop")
                self._stopping.start()
        if grace is None:
            self._stopped.wait()
        return self._stopped

    def wait_for_termination(self, timeout: float | None = None) -> bool:
        """As `grpc.Server`: wait until it has stopped; tell whether the time ran out."""
        return not self._stopped.wait(timeout)

    def _stop(self) -> None:
        try:
            self._plug.drain()
            with self._lock:
                while not self._plug.idle() and (left_s := self._left_s()) > 0.0:
                    self._lock.wait(min(LOOK_S, left_s))
            if not self._plug.idle():
                _log.warning("node %s stops with requests unfinished", self._plug.name)
        except Exception:  # noqa: BLE001 - whatever went wrong, the server stops
            _log.exception("node %s could not drain", self._plug.name)
        finally:
            try:
                self._hang_up()
            finally:
                self._stopped.set()

    def _left_s(self) -> float:
        return self._stop_by - time.monotonic()

    def _hang_up(self) -> None:
        """End every connection, then the server; leave the segment."""
        try:
            for sleep_s in hang_up(self._listeners):
                time.sleep(sleep_s)
        except Exception:  # noqa: BLE001 - whatever went wrong, the server stops
            _log.exception("node %s could not end its connections", self._plug.name)
        try:
            self._real.stop(None).wait()
        finally:
            self._plug.stop()
            self._executor.shutdown(wait=False)


def server(
    executor_workers: int = 8,
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
    interceptors: Sequence[grpc.ServerInterceptor] | None = None,
    options: Sequence[tuple[str, Any]] | None = None,
    maximum_concurrent_rpcs: int | None = None,
    compression: grpc.Compression | None = None,
) -> Server:
    """Return a threaded `grpc.Server` that is a node of a segment.

    Args:
        executor_workers: Threads that run handlers.
        node: Its name, unique in the segment.
        segment: Name of the segment, or an open one, which then stays open.
        group: The nodes that can serve the same requests.
        endpoint: Where clients reach it; None: the first port that is added.
        capacity: Requests that it shall get at once; None: as many as there are workers.
        weight: Its share of the load relative to others.
        interval_s: Heartbeat interval in seconds.
        gauges: Names of the node's gauges; they are named metrics of its load reports as well.
        slow_start_s: For how long routers raise its share from a tenth to all of it, in seconds.
        exclude: Beginnings of full names (`/package.Service/`) of methods whose requests are not
            the load that this node publishes; they run beside the workers, also while it drains.
        health: Is told NOT_SERVING when the server drains.
        handlers: As `grpc.server`.
        interceptors: As `grpc.server`; they run inside of what counts.
        options: As `grpc.server`; a port is not shared unless `grpc.so_reuseport` is given.
        maximum_concurrent_rpcs: As `grpc.server`.
        compression: As `grpc.server`.

    Raises:
        ValueError: A number is out of its range.
    """
    if capacity is None:
        capacity = executor_workers
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
    plug = Instrument(place, health)
    workers = ThreadPoolExecutor(executor_workers, thread_name_prefix="shmcoord-worker")
    executor = plug.executor(workers)
    real = grpc.server(
        executor,
        handlers=[*(handlers or ()), *plug.handlers],
        interceptors=[plug.interceptor, *(interceptors or ())],
        options=with_own_port(options),
        maximum_concurrent_rpcs=maximum_concurrent_rpcs,
        compression=compression,
    )
    return Server(real, plug, endpoint, executor)
