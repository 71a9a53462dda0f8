"""What the metadata of one call says to the router, and what of it is sent."""

from __future__ import annotations

from typing import Any, NamedTuple

from shmcoord.grpc._common import COST_KEY, KEY_KEY, LEASE_KEY

__all__ = ["Wishes", "now", "parse"]


class Wishes(NamedTuple):
    """What a caller asks for.

    Attributes:
        sent: The pairs that go to the node, the lease not among them.
        cost: Units of capacity that the call takes.
        key: For the policy `affinity`; None without one.
    """

    sent: tuple[tuple[str, Any], ...]
    cost: int
    key: str | None


def parse(metadata: Any) -> Wishes:
    """Split the metadata of a call.

    A lease among it (of a gateway that passes on what it got) is another call's, and goes out.

    Args:
        metadata: Pairs of key and value, or a `grpc.aio.Metadata`.

    Raises:
        ValueError: The cost is no number.
    """
    sent = []
    cost = 1
    key = None
    for pair in metadata:
        name, value = pair
        if name == COST_KEY:
            cost = int(value)
        elif name == KEY_KEY:
            key = value if isinstance(value, str) else value.decode("utf-8", "surrogateescape")
        elif name != LEASE_KEY:
            sent.append((name, value))
    return Wishes(tuple(sent), cost, key)


def now(coroutine: Any) -> Any:
    """Return the result of a coroutine that need not wait, such as `call.code()` after its end.

    Raises:
        RuntimeError: It would have to wait.
    """
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    coroutine.close()
    raise RuntimeError("the call has not ended")
