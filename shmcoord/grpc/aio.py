"""The gRPC plug-ins for event loops: `shmcoord.grpc.aio.channel` and `.server`."""

from shmcoord.grpc._aio_channel import channel
from shmcoord.grpc._aio_server import server

__all__ = ["channel", "server"]
