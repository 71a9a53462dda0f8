"""LMDB: one key per node, a read transaction for each look, nothing synced to disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.stores import Reading, UnavailableError, Write
from bench.stores.record import HELD, NODES, QUEUE

try:
    import lmdb
except ImportError as error:  # pragma: no cover - depends on the machine
    raise UnavailableError(f"the package lmdb does not import: {error}") from error

KEYS = tuple(name.encode() for name in NODES)


def _open(place: Path, *, readonly: bool) -> Any:
    return lmdb.open(str(place / "lmdb"), readonly=readonly, sync=False, map_size=1 << 20)


@contextmanager
def writing(place: Path) -> Iterator[Write]:
    """Creates the database."""
    with _open(place, readonly=False) as env:

        def write(i: int, data: bytes) -> None:
            with env.begin(write=True) as transaction:
                transaction.put(KEYS[i], data)

        yield write


@contextmanager
def reading(place: Path) -> Iterator[Reading]:
    """Opens it; the six are read in one transaction, as views rather than copies."""
    unpack = QUEUE.unpack_from
    with _open(place, readonly=True) as env:

        def queue(key: bytes = KEYS[HELD]) -> int:
            with env.begin(buffers=True) as transaction:
                return unpack(transaction.get(key))[0]  # type: ignore[no-any-return]

        def least() -> int:
            with env.begin(buffers=True) as transaction:
                queues = [unpack(transaction.get(key))[0] for key in KEYS]
            return queues.index(min(queues))

        yield Reading("queue()", {"queue": queue}, least)
