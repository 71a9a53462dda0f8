"""Asks whichever greeter has the least to do: `python examples/helloworld/greeter_client.py`."""

import helloworld_pb2
import helloworld_pb2_grpc

import shmcoord.grpc

with shmcoord.grpc.channel("shm_hello", group="GREEN") as channel:
    greeter = helloworld_pb2_grpc.GreeterStub(channel)
    for number in range(6):
        request = helloworld_pb2.HelloRequest(name=f"number {number}")
        print(greeter.SayHello(request, timeout=5.0).message)
