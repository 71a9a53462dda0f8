"""Types of the generated service code, written by hand: protoc makes none for services."""

import grpc.aio

from servers.pb import shmcoord_cluster_pb2 as pb

_Query = grpc.aio.UnaryStreamMultiCallable[pb.QueryRequest, pb.QueryChunk]
_Answer = grpc.aio.UnaryStreamMultiCallable[pb.PartRequest, pb.PartChunk]
_GetStatus = grpc.aio.UnaryUnaryMultiCallable[pb.GetStatusRequest, pb.NodeStatus]
_Shutdown = grpc.aio.UnaryUnaryMultiCallable[pb.ShutdownRequest, pb.ShutdownReply]

class GatewayStub:
    def __init__(self, channel: grpc.aio.Channel) -> None: ...
    Query: _Query

class GatewayServicer:
    async def Query(
        self,
        request: pb.QueryRequest,
        context: grpc.aio.ServicerContext[pb.QueryRequest, pb.QueryChunk],
    ) -> None: ...

def add_GatewayServicer_to_server(servicer: GatewayServicer, server: grpc.aio.Server) -> None: ...

class NodeStub:
    def __init__(self, channel: grpc.aio.Channel) -> None: ...
    Answer: _Answer
    GetStatus: _GetStatus
    Shutdown: _Shutdown

class NodeServicer:
    async def Answer(
        self,
        request: pb.PartRequest,
        context: grpc.aio.ServicerContext[pb.PartRequest, pb.PartChunk],
    ) -> None: ...
    async def GetStatus(
        self,
        request: pb.GetStatusRequest,
        context: grpc.aio.ServicerContext[pb.GetStatusRequest, pb.NodeStatus],
    ) -> pb.NodeStatus: ...
    async def Shutdown(
        self,
        request: pb.ShutdownRequest,
        context: grpc.aio.ServicerContext[pb.ShutdownRequest, pb.ShutdownReply],
    ) -> pb.ShutdownReply: ...

def add_NodeServicer_to_server(servicer: NodeServicer, server: grpc.aio.Server) -> None: ...
