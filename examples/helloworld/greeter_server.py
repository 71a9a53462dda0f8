"""A greeter that publishes its load: `python examples/helloworld/greeter_server.py B 50051`."""

import sys

import grpc
import helloworld_pb2
import helloworld_pb2_grpc

import shmcoord.grpc

if len(sys.argv) != 3:
    sys.exit("usage: NAME PORT")
NAME, PORT = sys.argv[1], int(sys.argv[2])


class Greeter(helloworld_pb2_grpc.GreeterServicer):
    """Greets in the name of this process."""

    def SayHello(  # noqa: N802
        self, request: helloworld_pb2.HelloRequest, context: grpc.ServicerContext
    ) -> helloworld_pb2.HelloReply:
        """Greet once."""
        return helloworld_pb2.HelloReply(message=f"Hello, {request.name}, from {NAME}!")

    def SayHelloAgain(  # noqa: N802
        self, request: helloworld_pb2.HelloRequest, context: grpc.ServicerContext
    ) -> helloworld_pb2.HelloReply:
        """Greet once more."""
        return helloworld_pb2.HelloReply(message=f"Hello again, {request.name}, from {NAME}!")


server = shmcoord.grpc.server(8, node=NAME, segment="shm_hello", group="GREEN")
helloworld_pb2_grpc.add_GreeterServicer_to_server(Greeter(), server)
server.add_insecure_port(f"127.0.0.1:{PORT}")
server.start()
print(f"{NAME} serves on port {PORT}", flush=True)
try:
    server.wait_for_termination()
except KeyboardInterrupt:
    server.stop(grace=5.0).wait()
