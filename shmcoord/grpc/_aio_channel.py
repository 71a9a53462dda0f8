"""Skeleton."""

import grpc
import grpc.aio


def channel(*segments: str, group: str) -> grpc.aio.Channel:
    """Skeleton."""
    raise NotImplementedError
