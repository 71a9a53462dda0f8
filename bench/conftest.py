"""What the benchmarks share: rows to report to, real nodes to look at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import shmcoord
from bench.children import new_folder
from bench.nodes import GROUP, SIX, segment_of
from bench.paired import Statement
from bench.plugin import Collector, Rows
from bench.stores.record import HELD, NODES, QUEUES

ROUNDS = 200


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds --bench-rounds."""
    parser.addoption(
        "--bench-rounds", type=int, default=ROUNDS, help=f"rounds of each row (default: {ROUNDS})"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Gathers the rows also when pytest was not started by `python -m bench`."""
    if not any(isinstance(plugin, Collector) for plugin in config.pluginmanager.get_plugins()):
        config.pluginmanager.register(Collector())


@pytest.fixture
def rows(request: pytest.FixtureRequest, benchmark: Any) -> Rows:
    """Where a benchmark reports to."""
    (collector,) = (
        plugin
        for plugin in request.config.pluginmanager.get_plugins()
        if isinstance(plugin, Collector)
    )
    return Rows(collector, benchmark, request.config.getoption("--bench-rounds"))


def _empty() -> None:
    pass


@pytest.fixture(scope="session")
def unit() -> Statement:
    """The unit: one call of an empty Python function."""
    return Statement("empty()", {"empty": _empty})


@pytest.fixture
def place() -> Iterator[Path]:
    """An empty folder of a name that nothing else on the machine has; gone afterwards."""
    with new_folder() as folder:
        yield folder


@pytest.fixture(scope="session")
def six() -> Iterator[shmcoord.Segment]:
    """A segment with six nodes, each in its own process."""
    with segment_of([(word,) for word in SIX]) as segment:
        yield segment


@pytest.fixture(scope="session")
def router(six: shmcoord.Segment) -> Iterator[shmcoord.Router]:
    """A router over the six."""
    with closing(shmcoord.Router(six.name)) as router:
        yield router


@pytest.fixture(scope="session")
def queue(six: shmcoord.Segment) -> Statement:
    """Reads the queue of one of the six."""
    backend = six.backend(NODES[HELD])
    assert backend.queue == QUEUES[HELD]
    return Statement("backend.queue", {"backend": backend})


@pytest.fixture(scope="session")
def pick(router: shmcoord.Router) -> Statement:
    """Picks one of the six."""
    assert QUEUES[NODES.index(router.pick(GROUP).node)] == min(QUEUES)
    return Statement("router.pick(group)", {"router": router, "group": GROUP})
