"""gRPC's client: `python examples/helloworld/greeter_client_plain.py` asks who is on port 50051."""

import grpc
import helloworld_pb2
import helloworld_pb2_grpc

with grpc.insecure_channel("127.0.0.1:50051") as channel:
    greeter = helloworld_pb2_grpc.GreeterStub(channel)
    for number in range(6):
        request = helloworld_pb2.HelloRequest(name=f"number {number}")
        print(greeter.SayHello(request, timeout=5.0).message)
