"""What the plug-ins of both kinds of server have in common: the place in the segment."""

from __future__ import annotations

from typing import Protocol

from shmcoord.grpc._membership import Membership
from shmcoord.node import Node

__all__ = ["Health", "Plug"]


class Health(Protocol):
    """What is told that the server drains: `grpc_health.v1.health.HealthServicer` has it."""

    def enter_graceful_shutdown(self) -> object:
        """Say NOT_SERVING from here on."""


class Plug:
    """A server's membership, from its start to its stop; and whom it tells of the drain."""

    def __init__(self, membership: Membership, health: Health | None) -> None:
        self._membership = membership
        self._health = health
        self._drained = False

    @property
    def node(self) -> Node:
        """The node that the server is, once it has started.

        Raises:
            RuntimeError: It has not.
        """
        return self._membership.node

    @property
    def name(self) -> str:
        """The node's name."""
        return self._membership.place.node

    @property
    def joined(self) -> bool:
        """Whether it has started, and not stopped."""
        return self._membership.joined

    def start(self, endpoint: str | None = None) -> None:
        """Join the segment; call it once the server has started.

        Args:
            endpoint: Where clients reach the server; None: as it was given to `instrument`.

        Raises:
            ValueError: No endpoint was given, or it was started or stopped before.
            ShmcoordError: As `Segment.join`; it may be tried again.
        """
        endpoint = endpoint or self._membership.place.endpoint
        if endpoint is None:
            raise ValueError("say by endpoint= where clients reach the server")
        if self._membership.joined:
            raise ValueError("it was started before")
        if self._membership.left:
            raise ValueError("it was stopped before")
        self._membership.join(endpoint)

    def check_process(self) -> None:
        """Refuse to be used by the child of a fork.

        Raises:
            ForkedHandle: It was started by the parent.
        """
        self._membership.check_process()

    def stop(self) -> None:
        """Show SHUTDOWN and leave the segment; call it once the server has stopped."""
        self._membership.leave()
