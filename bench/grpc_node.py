"""A node that answers unary gRPC calls at once: `python -m bench.grpc_node SEGMENT HOW`.

Says `ready ENDPOINT`. HOW is `plain` (grpcio's server, which knows nothing of leases; joined beside
it) or `plugin` (`shmcoord.grpc.server`). When stdin closes it also unlinks the segment.
"""

from __future__ import annotations

import sys
from concurrent import futures
from contextlib import ExitStack, suppress
from typing import Any

import grpc

import shmcoord
import shmcoord.grpc
from bench.children import until_stopped

NODE = "B"
GROUP = "GREEN"
SERVICE = "bench.Echo"
METHOD = f"/{SERVICE}/Say"
WORKERS = 8


def _say(request: bytes, context: grpc.ServicerContext) -> bytes:
    return request


def _handler() -> grpc.GenericRpcHandler:
    say = grpc.unary_unary_rpc_method_handler(_say)
    return grpc.method_handlers_generic_handler(SERVICE, {"Say": say})


def main(segment_name: str, how: str) -> None:
    """Serves until stdin closes."""
    with ExitStack() as stack:
        stack.callback(_unlink, segment_name)
        server: Any
        if how == "plugin":
            server = shmcoord.grpc.server(WORKERS, node=NODE, segment=segment_name, group=GROUP)
        else:
            server = grpc.server(
                futures.ThreadPoolExecutor(WORKERS), options=(("grpc.so_reuseport", 0),)
            )
        server.add_generic_rpc_handlers((_handler(),))
        endpoint = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        stack.callback(lambda: server.stop(None).wait())
        if how == "plain":
            segment = stack.enter_context(shmcoord.Segment.open(segment_name))
            stack.enter_context(segment.join(NODE, group=GROUP, endpoint=endpoint))
        for _ in until_stopped(words=endpoint):
            pass


def _unlink(segment_name: str) -> None:
    with suppress(shmcoord.SegmentNotFound):
        shmcoord.Segment.unlink(segment_name)


if __name__ == "__main__":
    main(*sys.argv[1:])
