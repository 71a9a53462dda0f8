"""What both sides of the gRPC plug-ins agree on: metadata keys, and whose calls are counted."""

from __future__ import annotations

from contextvars import ContextVar
from urllib.parse import quote

from shmcoord.transport._grpc_common import LEASE_KEY, LEASE_LOST_KEY, REFUSED

__all__ = [
    "COST_KEY",
    "KEY_KEY",
    "LEASE_KEY",
    "LEASE_LOST_KEY",
    "NODE_KEY",
    "ORCA_KEY",
    "PUSHBACK_KEY",
    "REFUSED",
    "STATUS_KEY",
    "is_infrastructure",
    "node_value",
    "served_by",
]

NODE_KEY = "shmcoord-node"
"""Trailing (and initial) metadata key by which a server names its node, in UTF-8 percent-encoded.

Who sends it adopts leases before it does anything: a client may rely on that from then on.
"""

COST_KEY = "shmcoord-cost"
"""Metadata key that a caller sets to say how many units of capacity the call takes; not sent."""

KEY_KEY = "shmcoord-key"
"""Metadata key that a caller sets to give the policy `affinity` its key; not sent."""

ORCA_KEY = "endpoint-load-metrics-bin"
"""Trailing metadata key of a serialized `xds.data.orca.v3.OrcaLoadReport` (gRFC A51)."""

PUSHBACK_KEY = "grpc-retry-pushback-ms"
"""Trailing metadata key by which a server says when to try again (gRFC A6)."""

STATUS_KEY = "grpc-status-details-bin"
"""Trailing metadata key of a serialized `google.rpc.Status`."""

served_by: ContextVar[str | None] = ContextVar("shmcoord_served_by", default=None)
"""The node that serves: of the last call made in this context, and inside of a handler our own."""

_INFRASTRUCTURE = ("/grpc.", "/xds.", "/envoy.")


def node_value(name: str) -> str:
    """Return a node's name as the value of `NODE_KEY`."""
    return quote(name)


def is_infrastructure(method: str) -> bool:
    """Whether a method (`/package.Service/Method`) is no work: health, reflection, reports."""
    return method.startswith(_INFRASTRUCTURE)
