"""multiprocessing.Manager: a dict of records in a server process, reached through a proxy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.managers import BaseManager, DictProxy
from pathlib import Path

from bench.stores import Reading, Write
from bench.stores.record import HELD, QUEUE

_records: dict[str, bytes] = {}


class _Manager(BaseManager):
    """What `multiprocessing.Manager()` is, but on a socket that another process can find."""


_Manager.register("records", callable=lambda: _records, proxytype=DictProxy)


def _address(place: Path) -> str:
    return str(place / "manager.sock")


@contextmanager
def writing(place: Path) -> Iterator[Write]:
    """Serves the dict from a thread of this process, which is the writer."""
    import threading

    server = _Manager(address=_address(place), authkey=b"bench").get_server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield _records.__setitem__  # type: ignore[misc]


@contextmanager
def reading(place: Path) -> Iterator[Reading]:
    """Connects; the six are asked for in one round trip."""
    manager = _Manager(address=_address(place), authkey=b"bench")
    manager.connect()
    records = manager.records()  # type: ignore[attr-defined]
    unpack = QUEUE.unpack_from

    def least() -> int:
        queues = [unpack(data)[0] for data in records.values()]
        return queues.index(min(queues))

    yield Reading(
        "unpack(records[key])[0]", {"records": records, "unpack": unpack, "key": HELD}, least
    )
