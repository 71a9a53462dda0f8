"""Segments and processes that never outlive their test."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
from helpers import SHM, Child

from shmcoord import Segment

if TYPE_CHECKING:
    from grpc_worlds import Link, World
    from mirror_helpers import Pair

# A shell's background job has SIGINT ignored and hands that on: Ctrl-C is tested all the same.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def served_by_nobody() -> Iterator[None]:
    """All tests of a process run in one context: what a call has told it goes with the test."""
    yield
    common = sys.modules.get("shmcoord.grpc._common")
    if common is not None:
        common.served_by.set(None)


@pytest.fixture
def new_name() -> Iterator[Callable[[], str]]:
    """Makes names of segments that nobody else uses; their segments go with the test."""
    prefix = f"test_core_{os.getpid()}_{secrets.token_hex(4)}"
    count = 0

    def make() -> str:
        nonlocal count
        count += 1
        return f"{prefix}.{count}"

    yield make
    for path in SHM.glob(f"{prefix}*"):
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()
    assert not list(SHM.glob(f"{prefix}*")), "something stayed behind in /dev/shm"


@pytest.fixture
def name(new_name: Callable[[], str]) -> str:
    """The name of a segment that does not exist yet."""
    return new_name()


@pytest.fixture
def segment(name: str) -> Iterator[Segment]:
    """A segment of 8 slots with 16 lease cells each."""
    with Segment.open(name, slots=8, leases=16) as segment:
        yield segment


@pytest.fixture
def spawn() -> Iterator[Callable[..., Child]]:
    """Starts children (see `helpers.Child`) which are ended with the test."""
    with contextlib.ExitStack() as children:

        def start(code: str, *args: object, **options: object) -> Child:
            child = Child(code, *args, **options)  # type: ignore[arg-type]
            children.callback(child.close)
            return child

        yield start


#: A node that lives until its input ends. Arguments: segment, node, further keywords as JSON.
NODE = """
options = {"group": "GREEN", "endpoint": "local", "interval_s": 0.05, **json.loads(sys.argv[3])}
segment = Segment.open(name)
node = segment.join(sys.argv[2], **options)
say("joined")
hear()
node.leave()
"""


@pytest.fixture
def spawn_node(spawn: Callable[..., Child]) -> Callable[..., Child]:
    """Starts a process that joins a segment as a node, and waits until it has."""
    import json

    def start(segment_name: str, node_name: str, **options: object) -> Child:
        child = spawn(NODE, segment_name, node_name, json.dumps(options))
        assert child.hear() == "joined"
        return child

    return start


@pytest.fixture
def pair(new_name: Callable[[], str]) -> Iterator[Pair]:
    """A segment of another host, and its mirror on this one."""
    from mirror_helpers import Pair

    made = Pair(new_name(), new_name())
    yield made
    made.close()


@pytest.fixture(scope="session")
def example_services() -> ModuleType:
    """`grpc_services`, with the code generated for the protos of the examples on the path."""
    pytest.importorskip("grpc", reason="grpcio is not installed (extra `test`)")
    import grpc_protos

    grpc_protos.importable()
    import grpc_services

    return grpc_services


@pytest.fixture(scope="session")
def grpc_links(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Link]:
    """A link of each kind, see `grpc_worlds`."""
    from grpc_worlds import make_links

    return make_links(tmp_path_factory.mktemp("links"))


@pytest.fixture
def new_world(
    example_services: ModuleType, grpc_links: dict[str, Link], new_name: Callable[[], str]
) -> Iterator[Callable[..., World]]:
    """`new_world("plain" or "shmcoord", "tcp")`: see `grpc_worlds`; all end with the test."""
    from grpc_worlds import LoopThread, Routed, World

    with contextlib.ExitStack() as endings:
        loop = LoopThread()
        endings.callback(loop.close)

        def start(name: str, link: str = "tcp") -> World:
            parts = (example_services, loop, grpc_links[link])
            if name == "plain":
                world = World(*parts)
            else:
                segment = endings.enter_context(Segment.open(new_name(), slots=8, leases=64))
                world = Routed(*parts, segment)
            endings.callback(world.close)
            return world

        yield start


@pytest.fixture(params=["plain", "shmcoord"])
def world(new_world: Callable[..., World], request: pytest.FixtureRequest) -> World:
    """Plain gRPC, and the same through shmcoord."""
    return new_world(request.param)
