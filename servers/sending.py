"""Answering a client that may be gone."""

import asyncio
import contextlib
from collections.abc import Iterator

import grpc.aio


@contextlib.contextmanager
def absence_cancels() -> Iterator[None]:
    """Around what is sent to a client: its absence is a cancellation, and nothing else.

    gRPC cancels the handler of a client that has gone, but what is just being sent (a response,
    or a status by `abort`) may fail before that.

    Raises:
        asyncio.CancelledError: the client has gone.
    """
    try:
        yield
    except grpc.aio.InternalError as error:
        raise asyncio.CancelledError("the client has gone") from error
