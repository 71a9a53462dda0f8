"""What both sides of the HTTP plug-ins agree on: headers, and the status of a refused lease.

Theory of operation. The lease travels in a request header. The node adopts it before it does
anything; if it cannot, it answers 503 with a header that says so, and the sender goes elsewhere.

Why 503 (Service Unavailable, RFC 9110, section 15.6.4) and not another status for "nothing was
done": 425 (RFC 8470, section 5.2) speaks of requests in TLS early data, and gives who sent none
nothing to do; 421 (RFC 9110, section 15.5.20) denies the target URI, not the moment. Proxies and
clients that know nothing of leases take 503 for what it is: not here, not now. For a sender that
knows leases the header decides, not the status alone.
"""

from __future__ import annotations

from urllib.parse import quote

__all__ = [
    "LEASE_HEADER",
    "LEASE_LOST_HEADER",
    "NODE_HEADER",
    "OWN_PREFIX",
    "REFUSED_STATUS",
    "node_value",
]

OWN_PREFIX = b"shmcoord-"
"""Begins every header of ours. What an application sends under it is dropped: it would be another
hop's, and a copied refusal would make the sender repeat what was executed."""

LEASE_HEADER = b"shmcoord-lease"
"""Request header: the lease's token. A refusal repeats it."""

NODE_HEADER = b"shmcoord-node"
"""Response header by which a node names itself, in percent-encoded UTF-8.

Who sends it adopts leases before it does anything: a sender may rely on that from then on.
"""

LEASE_LOST_HEADER = b"shmcoord-lease-lost"
"""Response header, "1": the lease could not be adopted, and nothing was done."""

REFUSED_STATUS = 503
"""Status of every answer that refuses."""


def node_value(name: str) -> str:
    """Return a node's name as the value of `NODE_HEADER`."""
    return quote(name, safe="")
