"""A request whose method is not idempotent is executed once, whatever server and channel do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from grpc_twice import CHANNELS, HEALTH, SERVERS, Pair, method, unavailable

Make = Callable[..., Pair]

channels = pytest.mark.parametrize("channel", CHANNELS)
servers = pytest.mark.parametrize("kind", SERVERS)
HOWS: list[dict[str, Any]] = [{}, {"blocking": True}, {"stream": True}]


@pytest.fixture
def pair(new_name: Callable[[], str]) -> Iterator[Make]:
    """Makes two nodes, which end with the test."""
    pairs: list[Pair] = []

    def make(servers: str, behavior: Any = unavailable, **options: Any) -> Pair:
        pairs.append(Pair(new_name(), servers, behavior, **options))
        return pairs[-1]

    yield make
    for one in pairs:
        one.close()


@channels
@servers
def test_a_lease_that_comes_is_adopted_whatever_the_method(
    pair: Make, kind: str, channel: str
) -> None:
    nodes = pair(kind, exclude=[method("Ea")])
    for name, stream in (
        (method("Do"), False),
        (method("Each"), True),
        (method("Do", HEALTH), False),
        (method("Each", HEALTH), True),
    ):
        nodes.executed.clear()
        assert nodes.call(channel, [name], stream=stream) == ["UNAVAILABLE"]
        assert len(nodes.executed) == 1, name
