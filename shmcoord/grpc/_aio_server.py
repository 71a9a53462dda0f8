"""Skeleton."""

import grpc
import grpc.aio


def server(*, node: str, segment: str, group: str) -> grpc.aio.Server:
    """Skeleton."""
    raise NotImplementedError
