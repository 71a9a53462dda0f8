"""A node: `python examples/serve.py B 9001` serves on 127.0.0.1:9001 until Ctrl-C."""

import contextlib
import socketserver
import sys
import time

import shmcoord

if len(sys.argv) != 3:
    sys.exit("usage: serve.py NAME PORT")
NAME, PORT = sys.argv[1], int(sys.argv[2])


class Server(socketserver.ThreadingTCPServer):
    """A thread per request; the port may be taken again at once after the last run."""

    allow_reuse_address = True


class Handler(socketserver.StreamRequestHandler):
    """One request: a line with the lease's token and a text; the answer is the text, upper case."""

    def handle(self) -> None:
        """Adopt the lease before doing any of the work."""
        token, text = self.rfile.readline().decode().rstrip("\n").split(" ", 1)
        with node.adopt(token):
            time.sleep(0.05)
            self.wfile.write(f"{NAME}: {text.upper()}\n".encode())


segment = shmcoord.Segment.open("shm_example")
with (
    Server(("127.0.0.1", PORT), Handler) as server,
    segment.join(NAME, group="GREEN", endpoint=f"127.0.0.1:{PORT}", capacity=2) as node,
    contextlib.suppress(KeyboardInterrupt),
):
    server.serve_forever()
