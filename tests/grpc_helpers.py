"""Services of generic handlers over bytes, and what tests of the gRPC servers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import grpc

SERVICE = "test.Work"

_MAKE: dict[tuple[bool, bool], Callable[..., Any]] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


class Method(NamedTuple):
    """How a method is served, and whether requests and responses are streams."""

    behavior: Callable[..., Any]
    requests: bool = False
    responses: bool = False


def service(serializer: Any = None, /, **methods: Method) -> grpc.GenericRpcHandler:
    """A service over bytes."""
    return grpc.method_handlers_generic_handler(
        SERVICE,
        {
            name: _MAKE[method.requests, method.responses](
                method.behavior, response_serializer=serializer
            )
            for name, method in methods.items()
        },
    )


def path(name: str) -> str:
    """The full name of one of its methods."""
    return f"/{SERVICE}/{name}"


def trailing(call: Any) -> dict[str, Any]:
    """The trailing metadata of a call or of an error."""
    return dict(call.trailing_metadata() or ())
