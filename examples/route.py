"""A router: `python examples/route.py hello` sends twelve requests, each to the least loaded."""

import argparse
import socket
from concurrent.futures import ThreadPoolExecutor

import shmcoord

parser = argparse.ArgumentParser()
parser.add_argument("text", nargs="*", default=["hello"])
parser.add_argument("--segment", default="shm_example", help="where the nodes are")
arguments = parser.parse_args()
TEXT = " ".join(arguments.text)
router = shmcoord.Router(arguments.segment)


def ask(number: int) -> str:
    """Reserve a node, send it the request with the lease's token, release."""
    with router.acquire("GREEN", timeout_s=5.0) as lease:
        host, port = lease.endpoint.rsplit(":", 1)
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f"{lease.token} {TEXT} {number}\n".encode())
            return connection.makefile().readline().rstrip("\n")


with router, ThreadPoolExecutor(6) as threads:
    for answer in threads.map(ask, range(12)):
        print(answer)
