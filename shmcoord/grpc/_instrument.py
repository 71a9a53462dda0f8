"""The parts of a threaded server's plug-in, for those who build their server themselves."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from concurrent.futures import Executor, ThreadPoolExecutor

import grpc

from shmcoord.api import Segment
from shmcoord.grpc._closing import LOOK_S
from shmcoord.grpc._counting import CountingExecutor, CountingInterceptor, Notes
from shmcoord.grpc._handlers import Handlers
from shmcoord.grpc._membership import Membership, Place
from shmcoord.grpc._orca_service import handler
from shmcoord.grpc._plug import Health, Plug

__all__ = ["Instrument", "instrument"]


class Instrument(Plug):
    """What makes a threaded `grpc.Server` a node of a segment. Made by `instrument`.

    Attributes:
        interceptor: Must be the first interceptor of the server.
        handlers: Generic handlers of the out-of-band load reports, for the server's `handlers`.
    """

    def __init__(self, place: Place, health: Health | None = None) -> None:
        super().__init__(Membership(place), health)
        self._notes = Notes()
        self._lock = threading.Lock()
        self._behaviors = Handlers(self._membership, self._notes)
        self.interceptor: grpc.ServerInterceptor = CountingInterceptor(
            self._membership, self._notes, self._behaviors
        )
        self.handlers: list[grpc.GenericRpcHandler] = [handler(self._membership)]

    @property
    def waiting(self) -> int:
        """Requests in the executor that no worker has begun, without those that hold a lease."""
        return self._membership.waiting.count

    def executor(self, workers: Executor | None = None) -> ThreadPoolExecutor:
        """Return the executor to give to `grpc.server`.

        Args:
            workers: The executor that shall run the handlers; None: a pool of as many threads as
                the node's capacity, or 8.
        """
        if workers is None:
            workers = ThreadPoolExecutor(
                self._membership.place.capacity or 8, thread_name_prefix="shmcoord-worker"
            )
        return CountingExecutor(self._notes, workers)

    def drain(self) -> None:
        """Publish DRAINING, make the health NOT_SERVING, refuse new requests without a lease.

        Requests whose lease was reserved before are still served.
        """
        with self._lock:
            self._membership.drain()
            if self._health is not None and not self._drained:
                self._health.enter_graceful_shutdown()
            self._drained = True

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until every request has its status; tell whether it came so.

        Args:
            timeout_s: Longest wait in seconds.
        """
        ends = time.monotonic() + timeout_s
        while not self.idle():
            if time.monotonic() >= ends:
                return False
            time.sleep(LOOK_S)
        return True

    def idle(self) -> bool:
        """Whether no request waits, runs or is still owed its status, and none is on its way."""
        return not self._behaviors.untold and self._membership.idle()


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
) -> Instrument:
    """Return what makes a server of your own a node of a segment.

        plug = shmcoord.grpc.instrument(node="B", segment="shm_host1", group="GREEN",
                                        endpoint="127.0.0.1:50051", capacity=8)
        server = grpc.server(plug.executor(ThreadPoolExecutor(8)), handlers=plug.handlers,
                             interceptors=[plug.interceptor, *yours])
        server.add_insecure_port("127.0.0.1:50051")
        server.start()
        plug.start()
        ...
        plug.drain()
        plug.wait_idle(5.0)
        server.stop(1.0).wait()
        plug.stop()

    Args:
        node: Its name, unique in the segment.
        segment: Name of the segment, or an open one, which then stays open.
        group: The nodes that can serve the same requests.
        endpoint: Where clients reach the server.
        capacity: Requests that it shall get at once: as a rule the number of its workers; None: as
            many as there are lease cells.
        weight: Its share of the load relative to others.
        interval_s: Heartbeat interval in seconds.
        gauges: Names of the node's gauges; they are named metrics of its load reports as well.
        slow_start_s: For how long routers raise its share from a tenth to all of it, in seconds.
        exclude: Beginnings of full names (`/package.Service/`) of methods whose requests are not
            the load that this node publishes; they run beside the workers, also while it drains.
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
    return Instrument(place, health)
