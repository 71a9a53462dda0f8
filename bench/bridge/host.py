"""A host's nodes, as one process: `python -m bench.bridge.host SEGMENT NODES`.

Node 0 publishes the time, once per millisecond, so that whoever reads it elsewhere on this machine
knows how old it is. All nodes change their load a hundred times per second, so that every frame has
all of them.
"""

from __future__ import annotations

import random
import signal
import sys
import threading
import time

from shmcoord import Segment

STAMP_EVERY_S = 0.001
CHANGE_EVERY = 10  # stamps


def main() -> None:
    """Join, change, and leave at SIGTERM."""
    name, count = sys.argv[1], int(sys.argv[2])
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    with Segment.open(name, slots=2 * count, leases=16) as segment:
        nodes = [
            segment.join(
                f"N{i}", group="G", endpoint=f"127.0.0.1:{i + 1}", capacity=4, gauges=("stamp",)
            )
            for i in range(count)
        ]
        print("ready", flush=True)
        chance = random.Random(1)
        for turn in range(10**9):
            nodes[0].publish(stamp=time.monotonic())
            if turn % CHANGE_EVERY == 0:
                for node in nodes[1:]:
                    node.waiting = chance.randrange(3)
            if ended.wait(STAMP_EVERY_S):
                return


if __name__ == "__main__":
    main()
