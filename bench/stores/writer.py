"""The writer's process: `python -m bench.stores.writer STORE FOLDER`.

It rewrites all records every two seconds, as nodes of shmcoord move their heartbeats. At the end it
removes the folder, since whoever started it may have been killed.
"""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path

from bench.children import until_stopped
from bench.stores import record

PERIOD_S = 2.0


def main(name: str, place: str) -> None:
    """Holds a store until stdin closes."""
    store = importlib.import_module(f"bench.stores.{name}")
    with store.writing(Path(place)) as write:
        for i in range(len(record.NODES)):
            write(i, record.pack(i))
        for _ in until_stopped(PERIOD_S):
            for i in range(len(record.NODES)):
                write(i, record.pack(i))
    shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
