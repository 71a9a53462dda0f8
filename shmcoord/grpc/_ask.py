"""What one call asks of the router, taken out of its metadata."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from shmcoord.grpc._common import COST_KEY, KEY_KEY, LEASE_KEY

__all__ = ["PLAIN", "Ask", "ask_of"]


class Ask(NamedTuple):
    """What a call needs, and what is sent with it.

    Attributes:
        cost: Units of capacity.
        key: For the policy `affinity`; None without one.
        metadata: The caller's, without what was for us.
    """

    cost: int = 1
    key: str | bytes | None = None
    metadata: tuple[Any, ...] = ()


PLAIN = Ask()
"""Of a call without metadata."""


def ask_of(metadata: Iterable[Any]) -> Ask:
    """Read `shmcoord-cost` and `shmcoord-key`.

    A lease among it, of a gateway that passes on what it got, is another call's, and goes out.

    Raises:
        ValueError: The cost is no whole number.
    """
    cost = 1
    key: str | bytes | None = None
    sent = []
    for pair in metadata:
        name = pair[0]
        if name == COST_KEY:
            try:
                cost = int(pair[1])
            except ValueError:
                raise ValueError(
                    f"metadata {COST_KEY} must be a whole number, not {pair[1]!r}"
                ) from None
        elif name == KEY_KEY:
            key = pair[1]
        elif name != LEASE_KEY:
            sent.append(pair)
    return Ask(cost, key, tuple(sent))
