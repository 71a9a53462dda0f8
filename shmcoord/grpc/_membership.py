"""A server's place in a segment: it joins, counts its requests there, drains and leaves."""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc

from shmcoord.api import Segment
from shmcoord.errors import ForkedHandle, LeaseLost, ShmcoordError
from shmcoord.grpc._common import LEASE_LOST_KEY, NODE_KEY, ORCA_KEY, REFUSED, node_value
from shmcoord.grpc._orca import LoadReporter
from shmcoord.grpc._refusal import Refusal
from shmcoord.grpc._served import TRACE, tell_span
from shmcoord.grpc._waiting import Waiting
from shmcoord.transport._grpc_common import is_retry

if TYPE_CHECKING:
    from shmcoord.node import Node, Request

__all__ = ["Membership", "Place", "Refused", "foreign", "note_span"]

_log = logging.getLogger("shmcoord.grpc")

# `Lease.token`: a version, and five numbers in hexadecimal.
_TOKEN = re.compile(r"[12](?:-[0-9A-Fa-f]{1,16}){5}")
_OF_ANOTHER_HOST = "2-"
# A lease of another host's router stands in that host's memory alone. Until the routers there have
# heard that the node drains, and what they sent before has come, it may not hang up. The news are
# out within 10 ms, and again with each tick (50 ms by default), should some be lost.
_HEARD_S = 0.25

_OWN_PREFIXES = ("shmcoord-", b"shmcoord-")  # gRPC takes a key as either
_OWN_LENGTH = len("shmcoord-")


class Place(NamedTuple):
    """Where a server joins, and as what; see `Segment.join`."""

    node: str
    segment: str | Segment
    group: str
    endpoint: str | None = None
    capacity: int | None = None
    weight: float = 1.0
    interval_s: float = 2.0
    gauges: Iterable[str] = ()
    slow_start_s: float = 0.0
    exclude: Iterable[str] = ()


class Refused(Exception):
    """A request ends with this status before anything of it was done."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(f"{refusal.code.name}: {refusal.details}")
        self.refusal = refusal


class Membership:
    """What the handlers of a server need of the node that it is.

    Args:
        place: Where it joins.
        join_wait_s: How long a request that comes before that waits for it, in seconds.
    """

    def __init__(self, place: Place, *, join_wait_s: float = 10.0) -> None:
        if isinstance(place.gauges, str):
            raise TypeError("gauges must be several names, not one str")
        if isinstance(place.exclude, str):
            raise TypeError("exclude must be several beginnings of methods, not one str")
        self.place = place._replace(gauges=tuple(place.gauges))
        self._excluded = tuple(place.exclude)
        self.waiting = Waiting()
        self.draining = False
        self._has_remote = False  # requests have come from other hosts
        self._drained_s = float("-inf")
        self._join_wait_s = join_wait_s
        self._node: Node | None = None
        self._joined = threading.Event()
        self._left = False
        self._pid = os.getpid()
        self._segment: Segment | None = None
        self._reporter: LoadReporter | None = None
        self._name_pair = (NODE_KEY, node_value(place.node))
        self._own: tuple[tuple[str, str | bytes], ...] = (self._name_pair,)
        self._own_report: bytes | None = None

    @property
    def node(self) -> Node:
        """The node, once the server has joined.

        Raises:
            RuntimeError: It has not.
        """
        if self._node is None:
            raise RuntimeError("the server has not joined its segment: start it first")
        return self._node

    @property
    def joined(self) -> bool:
        """Whether it has joined, and not left."""
        return self._node is not None and not self._left

    @property
    def left(self) -> bool:
        """Whether it has left, or was told to before it joined."""
        return self._left

    @property
    def reporter(self) -> LoadReporter | None:
        """Its load reports, once it has joined."""
        return self._reporter

    def counts(self, method: str) -> bool:
        """Whether requests of a method (`/package.Service/Method`) are the node's load."""
        return not method.startswith(self._excluded)

    def join(self, endpoint: str) -> None:
        """Join the segment.

        Raises:
            ShmcoordError: As `Segment.open` and `Segment.join`: `NodeExists` and others. All is
                as before then.
        """
        place = self.place
        segment = place.segment
        if isinstance(segment, str):
            self._segment = segment = Segment.open(segment)
        try:
            node = segment.join(
                place.node,
                group=place.group,
                endpoint=endpoint,
                capacity=place.capacity,
                weight=place.weight,
                interval_s=place.interval_s,
                gauges=place.gauges,
                slow_start_s=place.slow_start_s,
            )
        except BaseException:
            opened, self._segment = self._segment, None
            if opened is not None:
                opened.close()
            raise
        self._pid = os.getpid()
        self._reporter = LoadReporter(segment, node)
        self.waiting.show_by(node)
        self._node = node
        self._joined.set()
        _log.info("node %s serves group %s on %s", place.node, place.group, endpoint)

    def drain(self) -> None:
        """Publish DRAINING, and refuse requests without a lease from here on."""
        self.check_process()
        if self._node is not None and not self._left:
            self._node.drain()
        if not self.draining:
            self._drained_s = time.monotonic()
        self.draining = True

    def leave(self) -> None:
        """Show SHUTDOWN and give the slot back; does nothing the second time."""
        if self._left:
            return
        self._left = True
        self.draining = True
        self._joined.set()
        self.waiting.show_by(None)
        if self._node is not None:
            if not self._node.left:
                self._node.shutdown()
            self._node.leave()
        if self._segment is not None:
            self._segment.close()

    def check_process(self) -> None:
        """Refuse to be used by the child of a fork.

        Raises:
            ForkedHandle: The server was started by the parent.
        """
        if os.getpid() != self._pid:
            raise ForkedHandle("the server was started by the parent of this process")

    def idle(self) -> bool:
        """Whether nothing runs, nothing waits, and no lease is reserved that may still come."""
        return (
            self.waiting.count == 0
            and (not self.joined or self.node.inflight == 0)
            and (not self._has_remote or time.monotonic() - self._drained_s >= _HEARD_S)
        )

    def take(self, token: str | None, context: Any) -> Request:
        """Count a request that begins now: adopt its lease, or begin one of our own.

        One that gRPC's own retries have repeated is begun as without a lease if that is lost: the
        attempt before it has adopted it.

        Args:
            token: Of its lease.
            context: Of the request.

        Raises:
            Refused: The lease was lost, or is none; or the server has left.
        """
        if self._node is None:
            self._joined.wait(self._join_wait_s)
        node = self._node
        if node is None or self._left:
            raise Refused(self._unavailable("is not there"))
        if token is not None and not self._has_remote and token.startswith(_OF_ANOTHER_HOST):
            self._has_remote = True
        try:
            return node.begin() if token is None else node.adopt(token)
        except LeaseLost as error:
            if token is not None and _TOKEN.fullmatch(token) is None:
                raise Refused(Refusal(grpc.StatusCode.INVALID_ARGUMENT, str(error))) from None
            if is_retry(context.invocation_metadata()):
                if self.draining:
                    raise Refused(self.refusal()) from None
                return self.take(None, context)
            trailing = ((LEASE_LOST_KEY, token or ""),)
            lost = Refusal(grpc.StatusCode.FAILED_PRECONDITION, REFUSED, trailing)
            raise Refused(lost) from None
        except (ShmcoordError, ValueError) as error:  # it has left meanwhile
            raise Refused(Refusal(grpc.StatusCode.UNAVAILABLE, str(error))) from None

    def refusal(self) -> Refusal:
        """The status for a request without lease while the server drains."""
        return self._unavailable("is draining")

    def stopping(self) -> Refusal:
        """The status for a request that the end of the server ends."""
        return self._unavailable("is stopping")

    def _unavailable(self, what: str) -> Refusal:
        return Refusal(grpc.StatusCode.UNAVAILABLE, f"node {self.place.node} {what}")

    def trailing(self) -> tuple[tuple[str, str | bytes], ...]:
        """What every response carries at its end: the node's name, and its load report."""
        if self._reporter is None:
            return (self._name_pair,)
        report = self._reporter.serialized()
        if report is not self._own_report:
            # Threads may race here: each writes a pair that is right.
            self._own = (self._name_pair, (ORCA_KEY, report))
            self._own_report = report
        return self._own

    def merged(self, theirs: Any) -> tuple[tuple[str, str | bytes], ...]:
        """Return `trailing` behind what the handler has set, of which nothing is ours."""
        return (*foreign(theirs), *self.trailing()) if theirs else self.trailing()


def foreign(metadata: Iterable[Any]) -> tuple[Any, ...]:
    """Return metadata that a handler sends without what is ours to say.

    What a handler sends under our keys is that of another hop: a copied refusal would make the
    client repeat what was executed here.
    """
    return tuple(pair for pair in metadata if pair[0][:_OWN_LENGTH] not in _OWN_PREFIXES)


def note_span(place: Place) -> None:
    """Tell OpenTelemetry's current span which node serves, if anybody uses OpenTelemetry here."""
    if TRACE in sys.modules:
        tell_span(place.node, place.group)
