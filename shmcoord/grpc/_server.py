"""Skeleton."""

import grpc


def server(executor_workers: int = 8, *, node: str, segment: str, group: str) -> grpc.Server:
    """Skeleton."""
    raise NotImplementedError
