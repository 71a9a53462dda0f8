"""The gRPC transport for threads."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import grpc

from shmcoord.transport._grpc_common import LEASE_KEY, Budget, Options, judge, stub_method
from shmcoord.transport._grpc_links import LinkPool

__all__ = ["GrpcTransport"]


class GrpcTransport:
    """Sends requests over gRPC from the calling thread."""

    def __init__(
        self,
        stub: Callable[[grpc.Channel], Any],
        *,
        connect_timeout_s: float = 1.0,
        credentials: grpc.ChannelCredentials | None = None,
        options: Options = (),
    ) -> None:
        """Make a transport; it connects to an endpoint when the first call goes there.

        Args:
            stub: The generated stub class, or any callable that makes a stub from a channel.
            connect_timeout_s: Longest wait for a connection, in seconds.
            credentials: For encrypted channels; None for plain ones.
            options: gRPC channel options.
        """
        self._connect_timeout_s = connect_timeout_s
        self._links = LinkPool(stub, credentials=credentials, options=options)

    def send(
        self, endpoint: str, method: str, request: Any, *, lease: str, timeout_s: float | None
    ) -> Any:
        """Call a unary method of the stub; see `shmcoord.transport.Transport.send`.

        Raises:
            ValueError: The stub has no such method, or it streams.
            grpc.RpcError: The call failed otherwise.
        """
        budget = Budget(timeout_s, self._connect_timeout_s)
        link = self._links.take(endpoint)
        try:
            call = stub_method(
                link.face,
                method,
                grpc.UnaryUnaryMultiCallable,
                grpc.UnaryStreamMultiCallable,
                grpc.StreamUnaryMultiCallable,
                grpc.StreamStreamMultiCallable,
            )
            if not link.connect(budget.connect_s):
                raise budget.not_connected(endpoint, link.spent)
            return call(request, timeout=budget.left_s(), metadata=((LEASE_KEY, lease),))
        except grpc.RpcError as error:
            judged = judge(error, lambda: lease)
            if judged is error:
                raise
            raise judged from error
        finally:
            self._links.give_back(link)

    def close(self) -> None:
        """Close all channels; calls under way are cancelled."""
        self._links.close()

    def __enter__(self) -> GrpcTransport:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
