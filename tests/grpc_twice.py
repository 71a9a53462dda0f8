"""Two nodes of each kind of server, and a channel of each kind: how often a request is executed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import grpc.aio
from grpc_worlds import LoopThread

import shmcoord.grpc
from shmcoord.node import Node

SERVICE = "test.Twice"
HEALTH = "grpc.test.Twice"
CHANNELS = ("sync", "aio")
SERVERS = ("threads", "plug", "aio", "aio plain", "aio plug")
TIMEOUT_S = 10.0

Behavior = Callable[[Any, Any], Any]


def method(name: str, service: str = SERVICE) -> str:
    """The full name of a method."""
    return f"/{service}/{name}"


class Pair:
    """Nodes A and B. `Do` and `Each` run the behaviour and are counted; `Ok` echoes.

    The behaviour gets `executed` (the nodes so far), and a context; it is called in a thread or on
    the loop, and may return an awaitable there (`abort` of a context on a loop is one).
    """

    def __init__(
        self, segment: str, servers: str | None, behavior: Behavior, **options: Any
    ) -> None:
        self.segment = segment
        self.executed: list[str] = []
        self.tokens: list[str | None] = []  # of what was executed
        self._behavior = behavior
        self._outside = options.pop("outside", [])  # interceptors outside of the plug's
        self._loop = LoopThread()
        self._ends = contextlib.ExitStack()
        self._ends.callback(self._loop.close)
        self.endpoints: dict[str, str] = {}
        self.nodes: dict[str, Node] = {}
        for node in "AB" if servers else "":
            begin = self._begin_threads if servers in ("threads", "plug") else self._begin_aio
            begin(node, servers, options)

    def close(self) -> None:
        """End the servers."""
        self._ends.close()

    def _note(self, node: str, context: Any) -> None:
        self.executed.append(node)
        keys = dict(context.invocation_metadata())
        self.tokens.append(keys.get("shmcoord-lease"))

    def _services(self, node: str, on_loop: bool) -> list[grpc.GenericRpcHandler]:
        behavior, note = self._behavior, self._note

        def do(request: bytes, context: Any) -> Any:
            note(node, context)
            return behavior(self, context)

        def each(request: bytes, context: Any) -> Iterator[Any]:
            note(node, context)
            yield behavior(self, context)

        async def do_on_loop(request: bytes, context: Any) -> Any:
            note(node, context)
            return await _value(behavior(self, context))

        async def each_on_loop(request: bytes, context: Any) -> Any:
            note(node, context)
            yield await _value(behavior(self, context))

        handlers = {
            "Do": grpc.unary_unary_rpc_method_handler(do_on_loop if on_loop else do),
            "Each": grpc.unary_stream_rpc_method_handler(each_on_loop if on_loop else each),
            "Ok": grpc.unary_unary_rpc_method_handler(lambda request, context: request),
        }
        return [grpc.method_handlers_generic_handler(name, handlers) for name in (SERVICE, HEALTH)]

    def _begin_threads(self, node: str, servers: str, options: dict[str, Any]) -> None:
        place = {"node": node, "segment": self.segment, "group": "GREEN", **options}
        services = self._services(node, False)
        if servers == "threads":
            server = shmcoord.grpc.server(2, handlers=services, **place)
            port = server.add_insecure_port("127.0.0.1:0")
            self.endpoints[node] = f"127.0.0.1:{port}"
            server.start()
            self.nodes[node] = server.node
            self._ends.callback(lambda: server.stop(None).wait(10))
            return
        plug = shmcoord.grpc.instrument(**place)
        server = grpc.server(
            plug.executor(ThreadPoolExecutor(2)),
            handlers=[*plug.handlers, *services],
            interceptors=[*self._outside, plug.interceptor],
        )
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        self.endpoints[node] = f"127.0.0.1:{port}"
        plug.start(self.endpoints[node])
        self.nodes[node] = plug.node
        self._ends.callback(plug.stop)
        self._ends.callback(lambda: server.stop(None).wait(10))

    def _begin_aio(self, node: str, servers: str, options: dict[str, Any]) -> None:
        place = {"node": node, "segment": self.segment, "group": "GREEN", **options}
        services = self._services(node, servers != "aio plain")

        async def begin() -> Any:
            if servers != "aio plug":
                server = shmcoord.grpc.aio.server(handlers=services, **place)
                port = server.add_insecure_port("127.0.0.1:0")
                self.endpoints[node] = f"127.0.0.1:{port}"
                await server.start()
                self.nodes[node] = server.node
                return server.stop
            plug = shmcoord.grpc.aio.instrument(**place)
            real = grpc.aio.server(
                handlers=[*plug.handlers, *services],
                interceptors=[*self._outside, plug.interceptor],
            )
            port = real.add_insecure_port("127.0.0.1:0")
            await real.start()
            self.endpoints[node] = f"127.0.0.1:{port}"
            plug.start(self.endpoints[node])
            self.nodes[node] = plug.node

            async def stop(grace: float | None) -> None:
                await real.stop(grace)
                plug.stop()

            return stop

        stop = self._loop.run(begin())
        self._ends.callback(lambda: self._loop.run(stop(None)))

    def call(
        self,
        kind: str,
        names: Sequence[str],
        *,
        blocking: bool = False,
        learn: bool = True,
        **options: Any,
    ) -> list[str]:
        """Learn both nodes, then call the methods; the codes of these ("OK" where it went well).

        `executed` then tells of the last ones alone.
        """
        options = {"group": "GREEN", **options}
        if kind == "aio":
            return self._loop.run(self._call_aio(names, learn, options))
        codes = []
        with shmcoord.grpc.channel(self.segment, **options) as channel:
            # A call that is under way makes the next one go to the other.
            for _ in range(6 if learn else 0):
                calls = [channel.unary_unary(method("Ok")).future(b"x", TIMEOUT_S) for _ in "AB"]
                for call in calls:
                    call.result()
            for name in names:
                try:
                    if name.endswith("Each"):
                        list(channel.unary_stream(name)(b"x", timeout=TIMEOUT_S))
                    elif blocking:
                        channel.unary_unary(name)(b"x", timeout=TIMEOUT_S)
                    else:
                        channel.unary_unary(name).future(b"x", timeout=TIMEOUT_S).result()
                    codes.append("OK")
                except grpc.RpcError as error:
                    codes.append(error.code().name)
        return codes

    async def _call_aio(
        self, names: Sequence[str], learn: bool, options: dict[str, Any]
    ) -> list[str]:
        codes = []
        async with shmcoord.grpc.aio.channel(self.segment, **options) as channel:
            for _ in range(6 if learn else 0):
                calls = [channel.unary_unary(method("Ok"))(b"x", timeout=TIMEOUT_S) for _ in "AB"]
                await asyncio.gather(*calls)
            for name in names:
                try:
                    if name.endswith("Each"):
                        async for _ in channel.unary_stream(name)(b"x", timeout=TIMEOUT_S):
                            pass
                    else:
                        await channel.unary_unary(name)(b"x", timeout=TIMEOUT_S)
                    codes.append("OK")
                except grpc.aio.AioRpcError as error:
                    codes.append(error.code().name)
        return codes


async def _value(result: Any) -> Any:
    """What a behaviour returned, awaited where that is possible."""
    return await result if asyncio.iscoroutine(result) else result


def unavailable(pair: Pair, context: Any) -> Any:
    """A behaviour: done, and then UNAVAILABLE, as a gateway says of its own backend."""
    return context.abort(grpc.StatusCode.UNAVAILABLE, "somebody behind is not there")
