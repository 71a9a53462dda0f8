"""Nodes for the tests of gRPC channels: real servers on loopback that adopt leases by hand.

Not the server side of the plug-ins: what a server owes a channel is written out here, so that each
fault can be made on purpose.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
from helpers import Raw, wait_until

from shmcoord import LeaseLost, Segment
from shmcoord.grpc._common import NODE_KEY
from shmcoord.transport.grpc import lease_token, refuse_lost_lease

GROUP = "GREEN"
SERVICE = "test.Echo"


class Stub:
    """What generated code would hold, with strings for messages."""

    def __init__(self, channel: grpc.Channel) -> None:
        codec: dict[str, Any] = {
            "request_serializer": str.encode,
            "response_deserializer": bytes.decode,
            "_registered_method": True,
        }
        self.Say = channel.unary_unary(f"/{SERVICE}/Say", **codec)
        self.Count = channel.unary_stream(f"/{SERVICE}/Count", **codec)
        self.Gather = channel.stream_unary(f"/{SERVICE}/Gather", **codec)
        self.Chat = channel.stream_stream(f"/{SERVICE}/Chat", **codec)


METHODS = tuple(f"/{SERVICE}/{name}" for name in ("Say", "Count", "Gather", "Chat"))


class Node:
    """One node with a threaded server; requests say what it does.

    Unary requests: "hold" waits for `release`, the name of a status code aborts with it, "before"
    does so with UNAVAILABLE ahead of the lease, all else is answered in upper case. `Count` answers
    so many numbers; behind the last one "N+" waits, "N!" aborts with UNAVAILABLE.
    """

    def __init__(
        self,
        segment: Segment,
        name: str,
        *,
        capacity: int | None = None,
        adopts: bool = True,
        loses: int = 0,
        tells: bool | None = None,
        threads: int = 16,
        listens: bool = True,
        address: str = "127.0.0.1:0",
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        self.name = name
        self.adopts = adopts
        self.loses = loses  # so many leases are refused as lost
        self.tells = adopts if tells is None else tells
        self.seen: list[Any] = []
        self.metadata: list[dict[str, Any]] = []
        self.peers: list[str] = []
        self.release = threading.Event()
        self.entered = threading.Semaphore(0)
        self.ended = threading.Semaphore(0)
        self.server = grpc.server(
            futures.ThreadPoolExecutor(threads), options=(("grpc.so_reuseport", 0),)
        )
        self.server.add_generic_rpc_handlers((self._handlers(),))
        self._reserved: socket.socket | None = None
        if not listens:
            self._reserved = socket.socket()  # a port that refuses connections while it is open
            self._reserved.bind(("127.0.0.1", 0))
            port = self._reserved.getsockname()[1]
        elif credentials is None:
            port = self.server.add_insecure_port(address)
        else:
            port = self.server.add_secure_port(address, credentials)
        self.endpoint = address if address.startswith("unix:") else f"127.0.0.1:{port}"
        if listens:
            self.server.start()
        self.node = segment.join(
            name, group=GROUP, endpoint=self.endpoint, capacity=capacity, interval_s=0.2
        )

    def stop(self, grace: float | None = None) -> None:
        self.release.set()
        self.server.stop(grace).wait(10)

    def close(self) -> None:
        self.stop()
        if self._reserved is not None:
            self._reserved.close()
        self.node.leave()

    def _handlers(self) -> grpc.GenericRpcHandler:
        codec: dict[str, Any] = {
            "request_deserializer": bytes.decode,
            "response_serializer": str.encode,
        }
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Say": grpc.unary_unary_rpc_method_handler(self._say, **codec),
                "Count": grpc.unary_stream_rpc_method_handler(self._count, **codec),
                "Gather": grpc.stream_unary_rpc_method_handler(self._gather, **codec),
                "Chat": grpc.stream_stream_rpc_method_handler(self._chat, **codec),
            },
        )

    @contextlib.contextmanager
    def _work(self, context: grpc.ServicerContext, request: Any = None) -> Iterator[None]:
        self.metadata.append(dict(context.invocation_metadata()))
        self.peers.append(context.peer())
        if self.loses:
            self.loses -= 1
            refuse_lost_lease(context)
        token = lease_token(context)
        if self.tells:
            context.set_trailing_metadata(((NODE_KEY, self.name),))
        with contextlib.ExitStack() as stack:
            if self.adopts and token is not None:
                try:
                    stack.enter_context(self.node.adopt(token))
                except LeaseLost:
                    refuse_lost_lease(context)
            self.seen.append(request)
            stack.callback(self.ended.release)
            self.entered.release()
            yield

    def _say(self, request: str, context: grpc.ServicerContext) -> str:
        if request == "before":  # the connection ends before the lease is adopted
            self.seen.append(request)
            context.abort(grpc.StatusCode.UNAVAILABLE, "as if the connection had ended")
        with self._work(context, request):
            if request == "hold":
                while context.is_active() and not self.release.wait(0.01):
                    pass
            if request in grpc.StatusCode.__members__:
                context.abort(grpc.StatusCode[request], f"said {request}")
            return request.upper()

    def _count(self, request: str, context: grpc.ServicerContext) -> Iterator[str]:
        if request == "before":
            self.seen.append(request)
            context.abort(grpc.StatusCode.UNAVAILABLE, "as if the connection had ended")
        with self._work(context, request):
            context.send_initial_metadata((("first", self.name),))
            if request in grpc.StatusCode.__members__:
                context.abort(grpc.StatusCode[request], f"said {request}")
            for number in range(int(request.rstrip("+!"))):
                yield str(number)
            while request.endswith("+") and context.is_active() and not self.release.is_set():
                time.sleep(0.005)
            if request.endswith("!"):
                context.abort(grpc.StatusCode.UNAVAILABLE, "in the middle")

    def _gather(self, requests: Iterator[str], context: grpc.ServicerContext) -> str:
        with self._work(context, "gather"):
            gathered = list(requests)
            if gathered == ["hold"]:
                while context.is_active() and not self.release.wait(0.01):
                    pass
            if gathered[:1] and gathered[0] in grpc.StatusCode.__members__:
                context.abort(grpc.StatusCode[gathered[0]], f"said {gathered[0]}")
            return "+".join(gathered)

    def _chat(self, requests: Iterator[str], context: grpc.ServicerContext) -> Iterator[str]:
        with self._work(context, "chat"):
            for request in requests:
                if request in grpc.StatusCode.__members__:
                    context.abort(grpc.StatusCode[request], f"said {request}")
                yield request.upper()


class Cluster:
    """Nodes of one segment, and how many leases are held there."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.segment = Segment.open(name, slots=16, leases=32)
        self.raw = Raw(name)
        self.nodes: list[Node] = []

    def add(self, name: str = "B", **options: Any) -> Node:
        node = Node(self.segment, name, **options)
        self.nodes.append(node)
        return node

    def held(self) -> int:
        return self.raw.taken()

    def close(self) -> None:
        for node in self.nodes:
            node.close()
        self.segment.close()


_closing: list[threading.Thread] = []


def close_soon(channel: grpc.Channel) -> None:
    """Close a channel without waiting for gRPC's watching threads, which take 0.2 s."""
    thread = threading.Thread(target=channel.close)
    thread.start()
    _closing.append(thread)


def none_held(cluster: Cluster) -> None:
    """The client gives back when the call ends, the node when its handler does: a moment later."""
    wait_until(lambda: cluster.held() == 0)
