"""The systems that are compared: each a way to get a request to one of the nodes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import shmcoord

BOUND = "bound"
MAIN = "shmcoord"
"""The system whose figures are held against the others'."""


@dataclass(frozen=True)
class System:
    """One way to balance.

    Attributes:
        name: in the command line and in the results.
        title: for people.
        client: a kind of client (clients.py).
        balancer: gRPC's load balancing configuration, for `balanced` clients.
        proxy: "nginx", "haproxy" or "".
        maxconn: of each node in HAProxy.
        shares_port: the nodes share one port.
        reports_load: the nodes report their load.
        joins: the nodes join a segment.
        capacity: with which capacity they join.
        policy: shmcoord's policy.
    """

    name: str
    title: str
    client: str = "balanced"
    balancer: dict[str, Any] = field(default_factory=lambda: {"pick_first": {}})
    proxy: str = ""
    maxconn: int | None = None
    shares_port: bool = False
    reports_load: bool = False
    joins: bool = False
    capacity: int | None = None
    policy: str = ""


_WEIGHTED = {
    "weighted_round_robin": {
        # The shortest that gRPC takes, so that the weights are in effect when measuring begins.
        "blackoutPeriod": "0.3s",
        "weightUpdatePeriod": "0.1s",
        "weightExpirationPeriod": "60s",
    }
}

_OTHERS = (
    System("round-robin", "gRPC round_robin", balancer={"round_robin": {}}),
    System(
        "weighted-round-robin",
        "gRPC weighted_round_robin (ORCA)",
        balancer=_WEIGHTED,
        reports_load=True,
    ),
    System("reuseport", "pick_first, SO_REUSEPORT", shares_port=True),
    System("nginx", "nginx least_conn", proxy="nginx"),
    System("haproxy", "HAProxy leastconn", proxy="haproxy"),
    System("haproxy-maxconn1", "HAProxy leastconn, maxconn 1", proxy="haproxy", maxconn=1),
    System("least-known", "least requests of one client", client="least-known"),
    System("old-status", "least-loaded, status 2 s old", client="old-status", joins=True),
)


def _leased(name: str, title: str, policy: str, capacity: int | None) -> System:
    return System(
        name,
        title,
        client="leased",
        joins=True,
        capacity=capacity,
        policy=policy,
    )


def _ours() -> tuple[System, ...]:
    return (
        _leased(MAIN, "shmcoord, waits for capacity", "least-loaded", 1),
        # A node has the next request when it is done with the one: no time goes by in between.
        _leased("shmcoord-in-hand", "shmcoord, waits, one in hand", "least-loaded", 2),
        *(
            _leased(f"shmcoord-{policy}", f"shmcoord {policy}, does not wait", policy, None)
            for policy in shmcoord.POLICIES
        ),
    )


SYSTEMS = {system.name: system for system in (*_OTHERS, *_ours())}
