"""What an HTTP caller is told when he is refused: 503, and why, as problem details (RFC 9457)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from shmcoord.errors import NoBackend, Saturated, ShmcoordError
from shmcoord.http._common import LEASE_HEADER, LEASE_LOST_HEADER, REFUSED_STATUS

if TYPE_CHECKING:
    from shmcoord.api import Segment
    from shmcoord.decision import Candidate
    from shmcoord.status import Status

__all__ = ["Problem", "draining", "lease_lost", "no_node"]

# Where nobody can say when there will be capacity.
_RETRY_AFTER_S = 1
_NODES_LISTED = 32


class Problem(NamedTuple):
    """A refusal.

    Attributes:
        reason: One word for programs: DRAINING, LEASE_LOST, NO_BACKEND, SATURATED.
        detail: A sentence for people.
        retry_after_s: When to try again, in whole seconds; None: not said.
        nodes: What each node is doing.
        lease: The lease that was refused, as it came; repeated in the answer.
    """

    reason: str
    detail: str
    retry_after_s: int | None = None
    nodes: tuple[dict[str, Any], ...] = ()
    lease: bytes | None = None

    def body(self) -> bytes:
        """Return the `application/problem+json` document."""
        document: dict[str, Any] = {
            # No "type": about:blank, "no additional semantics beyond that of the HTTP status
            # code", and the title is then the status's own (RFC 9457, section 4.2.1).
            "title": "Service Unavailable",
            "status": REFUSED_STATUS,
            "detail": self.detail,
            "reason": self.reason,
        }
        if self.nodes:
            document["nodes"] = self.nodes
        return json.dumps(document).encode()

    def headers(self, body: bytes) -> list[tuple[bytes, bytes]]:
        """Return the response's headers."""
        headers = [
            (b"content-type", b"application/problem+json"),
            (b"content-length", b"%d" % len(body)),
        ]
        if self.retry_after_s is not None:  # RFC 9110, section 10.2.3: whole seconds
            headers.append((b"retry-after", b"%d" % self.retry_after_s))
        if self.lease is not None:
            headers += [(LEASE_LOST_HEADER, b"1"), (LEASE_HEADER, self.lease)]
        return headers


def draining(node: str) -> Problem:
    """Refuse new work."""
    return Problem("DRAINING", f"node {node} takes no new requests", _RETRY_AFTER_S)


def lease_lost(error: Exception, lease: bytes) -> Problem:
    """Refuse a lease; when to come again with it has no answer."""
    return Problem("LEASE_LOST", str(error), lease=lease)


def no_node(error: NoBackend | Saturated, segment: Segment | None) -> Problem:
    """Tell that there is no node for a request that a handler wanted to send.

    Args:
        error: As the handler raised it. If it can tell the nodes that were looked at (those of
            the transports can), these are listed.
        segment: Whose nodes are listed otherwise; None: no node is listed.
    """
    retry_after_s = _RETRY_AFTER_S
    reason = "NO_BACKEND"
    if isinstance(error, Saturated):
        reason = "SATURATED"
        if error.retry_after_s is not None:
            retry_after_s = max(1, math.ceil(error.retry_after_s))
    return Problem(reason, str(error), retry_after_s, _nodes(error, segment))


def _nodes(error: Exception, segment: Segment | None) -> tuple[dict[str, Any], ...]:
    if segment is None:
        return ()
    known: Iterable[Candidate | Status] = getattr(error, "candidates", ())
    if not known:
        try:
            known = segment.snapshot()
        except (ShmcoordError, ValueError):  # closed meanwhile
            return ()
    return tuple(
        {
            "node": node.node,
            "group": node.group,
            "state": node.state.name,
            "health": node.health.name,
            "queue": node.queue,
            "capacity": node.capacity,
        }
        for node in tuple(known)[:_NODES_LISTED]
    )
