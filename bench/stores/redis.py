"""Redis on a Unix socket, nothing saved to disk: one string of 64 bytes per node."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.stores import Reading, UnavailableError, Write
from bench.stores.record import HELD, NODES, QUEUE

try:
    import redis
except ImportError as error:  # pragma: no cover - depends on the machine
    raise UnavailableError(f"the package redis does not import: {error}") from error

SERVER = shutil.which(os.environ.get("SHMCOORD_BENCH_REDIS", "redis-server"))
START_TIMEOUT_S = 10.0

if SERVER is None:
    raise UnavailableError("no redis-server found (Debian package redis-server)")


def _socket(place: Path) -> Path:
    return place / "redis.sock"


def _connect(place: Path) -> redis.Redis:
    client = redis.Redis(unix_socket_path=str(_socket(place)))
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            client.ping()
        except redis.ConnectionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return client


@contextmanager
def writing(place: Path) -> Iterator[Write]:
    """Starts a server of our own."""
    assert SERVER is not None
    options = {
        "port": "0",
        "unixsocket": str(_socket(place)),
        "unixsocketperm": "700",
        "save": "",
        "appendonly": "no",
        "dir": str(place),
    }
    command = [SERVER, *(word for key, value in options.items() for word in (f"--{key}", value))]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    try:
        with _connect(place) as client:
            yield lambda i, data: client.set(NODES[i], data)  # type: ignore[func-returns-value]
    finally:
        server.terminate()
        server.wait()


@contextmanager
def reading(place: Path) -> Iterator[Reading]:
    """Connects; the six are asked for in one round trip."""
    unpack = QUEUE.unpack_from
    with _connect(place) as client:

        def least() -> int:
            queues = [unpack(data)[0] for data in client.mget(NODES)]
            return queues.index(min(queues))

        names = {"client": client, "unpack": unpack, "key": NODES[HELD]}
        yield Reading("unpack(client.get(key))[0]", names, least)
