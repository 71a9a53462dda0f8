"""A process that holds nodes: `python -m bench.holder SEGMENT GROUP NAME=QUEUE ...`.

Each node is joined as any server joins, moves its heartbeat every two seconds, and has QUEUE
requests in flight until stdin closes. Then it also unlinks the segment, since whoever started it
may have been killed.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack, suppress

import shmcoord
from bench.children import until_stopped


def main(segment_name: str, group: str, *nodes: str) -> None:
    """Joins the nodes and waits."""
    with ExitStack() as stack:
        segment = stack.enter_context(shmcoord.Segment.open(segment_name))
        for word in nodes:
            name, _, queue = word.partition("=")
            node = stack.enter_context(
                segment.join(name, group=group, endpoint=f"127.0.0.1:{name}", interval_s=2.0)
            )
            for _ in range(int(queue)):
                stack.enter_context(node.request())
        for _ in until_stopped():
            pass
    with suppress(shmcoord.SegmentNotFound):
        shmcoord.Segment.unlink(segment_name)


if __name__ == "__main__":
    main(*sys.argv[1:])
