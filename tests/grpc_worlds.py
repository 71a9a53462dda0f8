"""Plain gRPC and shmcoord behind one face, so that the same test runs against both.

Plain gRPC is the control: what it does is what a drop-in must do.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import grpc
import grpc.aio
from certificates import make_authority, make_certificate, need_openssl
from helpers import SHM, Raw, wait_until

import shmcoord
import shmcoord.grpc

T = TypeVar("T")
GROUP = "GREEN"
LINKS = ("tcp", "unix", "tls", "mutual tls")
#: What each test gives every call, so that none hangs.
PATIENCE_S = 20.0
#: Kinds of channel and server. test_grpc_dropin.py tries every pair always, the other tests only at
#: the full counts of the fault harness.
KINDS = ("sync", "aio")
FULL = os.environ.get("SHMCOORD_FAULTS", "") == "full"
OWN_KEYS = ("shmcoord-", "endpoint-load-metrics")


class LoopThread:
    """An event loop in a thread, for servers and channels of asyncio in tests without."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="loop of the test")
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float = 30.0) -> T:
        """What the coroutine returned."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout_s)

    def close(self) -> None:
        self.run(self._leave())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    async def _leave(self) -> None:
        await self.loop.shutdown_asyncgens()


@dataclass
class Link:
    """How clients reach servers."""

    kind: str
    folder: Path
    client: grpc.ChannelCredentials | None = None
    server: grpc.ServerCredentials | None = None
    sockets: Iterator[int] = field(default_factory=itertools.count)

    def new_address(self) -> str:
        """Where a server may listen; a port is chosen there."""
        if self.kind == "unix":
            return f"unix:{self.folder / f's{next(self.sockets)}'}"
        return "127.0.0.1:0"

    def listen(self, server: grpc.Server | grpc.aio.Server, address: str | None = None) -> str:
        """Add the port to a server of either kind; the address that clients use."""
        address = address or self.new_address()
        if self.server is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, self.server)
        assert port
        return address if self.kind == "unix" else f"{address.rpartition(':')[0]}:{port}"


def make_links(folder: Path) -> dict[str, Link]:
    """A link of each kind. Skips the test where there is no openssl."""
    need_openssl()
    make_authority(folder, "ca")
    make_certificate(folder, "ca", "server", "IP:127.0.0.1,DNS:localhost")
    make_certificate(folder, "ca", "client", "DNS:client")
    pem = {path.name: path.read_bytes() for path in folder.iterdir()}
    ca, server = pem["ca.pem"], (pem["server.key"], pem["server.pem"])
    trusting = grpc.ssl_channel_credentials(ca)
    known = grpc.ssl_channel_credentials(ca, pem["client.key"], pem["client.pem"])
    return {
        "tcp": Link("tcp", folder),
        "unix": Link("unix", folder),
        "tls": Link("tls", folder, trusting, grpc.ssl_server_credentials([server])),
        "mutual tls": Link(
            "mutual tls",
            folder,
            known,
            grpc.ssl_server_credentials([server], ca, require_client_auth=True),
        ),
    }


class World:
    """Servers and channels of one test, of plain gRPC; they end with it."""

    name = "plain"

    def __init__(self, services: ModuleType, loop: LoopThread, link: Link) -> None:
        self.services = services
        self.loop = loop
        self.link = link
        self.address = ""
        self.servers: dict[str, Any] = {}
        self.endings = contextlib.ExitStack()

    # --- what differs

    def _sync_server(self, node: str, workers: int, **options: Any) -> grpc.Server:
        pool = ThreadPoolExecutor(workers)
        self.endings.callback(pool.shutdown)
        return grpc.server(pool, options=[("grpc.so_reuseport", 0)], **options)

    def _aio_server(self, node: str, **options: Any) -> grpc.aio.Server:
        return grpc.aio.server(options=[("grpc.so_reuseport", 0)], **options)

    def _sync_channel(self, interceptors: Iterable[Any] = (), **options: Any) -> grpc.Channel:
        if self.link.client is None:
            channel = grpc.insecure_channel(self.address, **options)
        else:
            channel = grpc.secure_channel(self.address, self.link.client, **options)
        return grpc.intercept_channel(channel, *interceptors)

    def _aio_channel(self, **options: Any) -> grpc.aio.Channel:
        if self.link.client is None:
            return grpc.aio.insecure_channel(self.address, **options)
        return grpc.aio.secure_channel(self.address, self.link.client, **options)

    def _stand_behind(self, relay: Counting, options: dict[str, Any]) -> None:
        """Tell clients of a relay instead of the server."""

    def check(self) -> None:
        """Nothing is held any more."""

    # --- what does not

    def serve(
        self,
        kind: str,
        node: str = "B",
        *,
        workers: int = 4,
        features: Any = None,
        servicers: tuple[Any, Any] | None = None,
        address: str | None = None,
        behind: Counting | None = None,
        **options: Any,
    ) -> str:
        """Start a server with both services; the address that clients use.

        Args:
            kind: "sync" or "aio".
            node: Its name.
            workers: Threads of a server that has any.
            features: What `RouteGuide` knows.
            servicers: In place of new ones of the services.
            address: Where it listens; by default where nobody does.
            behind: What stands in front of it.
            options: Of the server.
        """
        services = self.services
        if behind is not None:
            self._stand_behind(behind, options)

        if servicers is None:
            given = () if features is None else (features,)
            greeter, guide = {
                "sync": (services.Greeter, services.RouteGuide),
                "aio": (services.AioGreeter, services.AioRouteGuide),
            }[kind]
            servicers = greeter(), guide(*given)

        def add(server: grpc.Server | grpc.aio.Server) -> str:
            services.helloworld_pb2_grpc.add_GreeterServicer_to_server(servicers[0], server)
            services.route_guide_pb2_grpc.add_RouteGuideServicer_to_server(servicers[1], server)
            reached = self.link.listen(server, address)
            if behind is None:
                return reached
            host, _, port = reached.rpartition(":")
            behind.target = host, int(port)
            return behind.address

        if kind == "sync":
            server = self._sync_server(node, workers, **options)
            self.address = add(server)
            server.start()
            self.servers[node] = server
            self.endings.callback(self.stop, None, node)
            return self.address

        async def start() -> grpc.aio.Server:
            server = self._aio_server(node, **options)
            self.address = add(server)
            await server.start()
            return server

        self.servers[node] = self.loop.run(start())
        self.endings.callback(self.stop, None, node)
        return self.address

    def stop(self, grace: float | None, node: str = "B") -> None:
        """Stop a server, and wait until it has."""
        server = self.servers[node]
        if isinstance(server, grpc.aio.Server):
            self.loop.run(server.stop(grace))
        else:
            server.stop(grace).wait()

    def channel(self, **options: Any) -> grpc.Channel:
        """A channel of threads, closed with the test."""
        return self.endings.enter_context(self._sync_channel(**options))

    def with_channel(
        self,
        client: Callable[..., Coroutine[Any, Any, T]],
        timeout_s: float = 30.0,
        **options: Any,
    ) -> T:
        """Run `client(channel)` on the event loop, with a channel of asyncio."""

        async def work() -> T:
            async with self._aio_channel(**options) as channel:
                return await client(channel)

        return self.loop.run(work(), timeout_s)

    def close(self) -> None:
        try:
            self.check()
        finally:
            self.endings.close()


class Routed(World):
    """The same through shmcoord."""

    name = "shmcoord"

    def __init__(
        self, services: ModuleType, loop: LoopThread, link: Link, segment: shmcoord.Segment
    ) -> None:
        super().__init__(services, loop, link)
        self.segment = segment

    def _sync_server(self, node: str, workers: int, **options: Any) -> grpc.Server:
        return shmcoord.grpc.server(
            workers, node=node, segment=self.segment.name, group=GROUP, **options
        )

    def _aio_server(self, node: str, **options: Any) -> grpc.aio.Server:
        return shmcoord.grpc.aio.server(
            node=node, segment=self.segment.name, group=GROUP, **options
        )

    def _sync_channel(self, **options: Any) -> grpc.Channel:
        segments = () if "router" in options else (self.segment.name,)
        return shmcoord.grpc.channel(
            *segments, group=GROUP, credentials=self.link.client, **options
        )

    def _aio_channel(self, **options: Any) -> grpc.aio.Channel:
        segments = () if "router" in options else (self.segment.name,)
        return shmcoord.grpc.aio.channel(
            *segments, group=GROUP, credentials=self.link.client, **options
        )

    def _stand_behind(self, relay: Counting, options: dict[str, Any]) -> None:
        options["endpoint"] = relay.address

    def held(self) -> str:
        """What is held of nodes and cells, in words; "" for nothing."""
        if not (SHM / self.segment.name).exists():
            return ""
        said = [
            f"{status.node}: {status.inflight} in flight, {status.waiting} waiting"
            for status in self.segment.snapshot()
            if status.queue or status.inflight or status.waiting
        ]
        cells = Raw(self.segment.name).taken()
        return "; ".join([*said, *([f"{cells} lease cells"] if cells else [])])

    def check(self) -> None:
        # The server ends a call a moment after the client has its status.
        with contextlib.suppress(AssertionError):
            wait_until(lambda: not self.held(), 5.0)
        assert self.held() == ""


class Counting:
    """A relay in front of a server that counts what goes through it.

    Attributes:
        up: Bytes from the client.
        down: Bytes from the server.
        target: Host and port of the server.
    """

    def __init__(self) -> None:
        self.up = self.down = 0
        self.target = "", 0
        self._open: list[socket.socket] = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = "{}:{}".format(*self._listening.getsockname())
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listening.accept()
            except OSError:  # closed
                return
            far = socket.create_connection(self.target)
            self._open += [near, far]
            for args in ((near, far, "up"), (far, near, "down")):
                self._threads.append(threading.Thread(target=self._relay, args=args))
                self._threads[-1].start()

    def _relay(self, source: socket.socket, target: socket.socket, counter: str) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                # Only this thread counts this way.
                setattr(self, counter, getattr(self, counter) + len(data))
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        for end in self._open:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for end in (self._listening, *self._open):
            end.close()


def users(metadata: Iterable[tuple[str, str | bytes]] | None) -> list[tuple[str, str | bytes]]:
    """Metadata without what shmcoord adds."""
    return sorted((key, value) for key, value in metadata or () if not key.startswith(OWN_KEYS))


def node_in(metadata: Iterable[tuple[str, str | bytes]] | None) -> str | bytes | None:
    """The node that trailing metadata names."""
    return dict(metadata or ()).get("shmcoord-node")
