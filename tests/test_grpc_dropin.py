"""gRPC's example services through shmcoord are what they are through plain gRPC.

Every channel with every server over every kind of link, all four kinds of call, with unmodified
stubs: replies, codes, details and metadata are compared with those of plain gRPC.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
from grpc_sessions import Seen, aio_session, points, sync_session
from grpc_worlds import LINKS, World


def _session(world: World, services: ModuleType, channel: str) -> dict[str, Seen]:
    if channel == "sync":
        return sync_session(services, world.channel())
    return world.with_channel(lambda channel: aio_session(services, channel))


def _nodes(seen: dict[str, Seen]) -> set[str | None]:
    return {one.get("node") for one in seen.values() if "node" in one}


def _but_the_node(seen: dict[str, Seen]) -> dict[str, Seen]:
    """Without what only shmcoord says."""

    def bare(one: Seen) -> Seen:
        kept = {key: value for key, value in one.items() if key != "node"}
        if "raised" in kept:
            kept["raised"] = bare(kept["raised"])
        return kept

    return {name: bare(one) for name, one in seen.items()}


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("server", ["sync", "aio"])
@pytest.mark.parametrize("channel", ["sync", "aio"])
def test_everything_is_as_with_plain_grpc(
    new_world: Callable[..., World],
    example_services: ModuleType,
    channel: str,
    server: str,
    link: str,
):
    seen = {}
    for name in ("plain", "shmcoord"):
        world = new_world(name, link)
        world.serve(server)
        seen[name] = _session(world, example_services, channel)
    plain, routed = seen["plain"], seen["shmcoord"]
    assert _but_the_node(routed) == _but_the_node(plain)
    assert _nodes(plain) == {None}
    assert _nodes(routed) == {"B"}
    # That it was the session that was meant.
    assert routed["unary"]["reply"] == "Hello, you!"
    assert len(routed["stream"]["reply"]) == len(example_services.FEATURES)
    assert routed["both streams"]["reply"] == ["first", "first", "third"]
    assert routed["client stream"]["reply"][:2] == (len(points(example_services)), 2)


def test_the_comparison_finds_another_reply(
    new_world: Callable[..., World], example_services: ModuleType
):
    """Negative control: one feature has another name."""
    seen = {}
    for name in ("plain", "shmcoord"):
        world = new_world(name)
        features = list(example_services.FEATURES)
        if name == "shmcoord":
            location = features[1].location
            features[1] = example_services.place("Mill", location.latitude, location.longitude)
        world.serve("sync", features=features)
        seen[name] = _but_the_node(_session(world, example_services, "sync"))
    differ = {key for key in seen["plain"] if seen["plain"][key] != seen["shmcoord"][key]}
    assert differ == {"feature", "stream"}
