"""The gRPC plug-ins for event loops: `shmcoord.grpc.aio.channel` and `.server`."""

from shmcoord.grpc._aio_channel import channel
from shmcoord.grpc._aio_instrument import AioInstrument, instrument
from shmcoord.grpc._aio_server import AioServer, server

__all__ = ["AioInstrument", "AioServer", "channel", "instrument", "server"]
