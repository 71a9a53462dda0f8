"""What the servers of both kinds have in common: handlers and ports, and the endpoint they make."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import grpc

from shmcoord.grpc._closing import Listeners
from shmcoord.grpc._endpoint import endpoint_of
from shmcoord.grpc._plug import Plug
from shmcoord.node import Node

__all__ = ["Serving", "with_own_port"]


class Serving:
    """Passes on to gRPC's own server what does not concern the segment.

    Args:
        real: gRPC's own server.
        plug: What makes it a node.
        endpoint: Where clients reach it; None: the first port that is added.
    """

    _real: Any
    _plug: Plug

    def __init__(self, real: Any, plug: Plug, endpoint: str | None) -> None:
        self._real = real
        self._plug = plug
        self._endpoint = endpoint
        self._endpoints: list[str] = []
        self._listeners = Listeners()

    @property
    def node(self) -> Node:
        """The node that this server is: its load, its state, `publish` for its gauges.

        Raises:
            RuntimeError: The server has not started.
        """
        return self._plug.node

    @property
    def endpoint(self) -> str | None:
        """Where clients reach it: as given, or the first port that was added; None: none yet."""
        return self._endpoint or (self._endpoints[0] if self._endpoints else None)

    def add_generic_rpc_handlers(
        self, generic_rpc_handlers: Iterable[grpc.GenericRpcHandler]
    ) -> None:
        """As gRPC's own server."""
        self._real.add_generic_rpc_handlers(generic_rpc_handlers)

    def add_registered_method_handlers(
        self, service_name: str, method_handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]]
    ) -> None:
        """As gRPC's own server."""
        self._real.add_registered_method_handlers(service_name, method_handlers)

    def add_insecure_port(self, address: str) -> int:
        """As gRPC's own server; the first port is what the node publishes as its endpoint.

        Raises:
            RuntimeError: The port is taken, or the address is none.
        """
        port = self._listeners.open(lambda: self._real.add_insecure_port(address))
        self._endpoints.append(endpoint_of(address, port))
        return port

    def add_secure_port(self, address: str, server_credentials: grpc.ServerCredentials) -> int:
        """As `add_insecure_port`, with TLS."""
        port = self._listeners.open(lambda: self._real.add_secure_port(address, server_credentials))
        self._endpoints.append(endpoint_of(address, port))
        return port

    def _endpoint_to_publish(self) -> str:
        """Where clients reach it, when it is about to start."""
        endpoint = self.endpoint
        if endpoint is None:
            raise ValueError("the server has no port: add one, or say endpoint=")
        return endpoint


def with_own_port(options: Iterable[tuple[str, Any]] | None) -> list[tuple[str, Any]]:
    """Return server options by which a taken port is an error, unless they say otherwise."""
    # gRPC would share it silently, and the kernel would deal the connections out.
    return list({"grpc.so_reuseport": 0, **dict(options or ())}.items())
