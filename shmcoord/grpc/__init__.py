"""Plug-ins for gRPC: existing stubs route by load, existing servers publish it.

    channel = shmcoord.grpc.channel("shm_host1", group="GREEN")      # a grpc.Channel
    server = shmcoord.grpc.server(8, node="B", segment="shm_host1", group="GREEN")  # a grpc.Server

and the same for event loops in `shmcoord.grpc.aio`.
"""

from __future__ import annotations

try:
    import google.rpc.status_pb2  # noqa: F401
    import grpc  # noqa: F401
except ModuleNotFoundError as _missing:
    raise ModuleNotFoundError(
        "shmcoord.grpc needs grpcio and googleapis-common-protos: pip install shmcoord[grpc]",
        name=_missing.name,
    ) from _missing

from shmcoord.grpc import aio
from shmcoord.grpc._channel import channel
from shmcoord.grpc._common import served_by
from shmcoord.grpc._instrument import Instrument, instrument
from shmcoord.grpc._server import Server, server

__all__ = ["Instrument", "Server", "aio", "channel", "instrument", "served_by", "server"]
