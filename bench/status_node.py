"""A node of the reference cluster to ask for its status: `python -m bench.status_node FOLDER`.

The node is what `python -m servers node` starts, with a configuration of its own: one host, one
team, a handful of rows. Says `ready ENDPOINT SEGMENT` once it answers.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import grpc

import shmcoord
from bench.children import until_stopped
from servers.pb import shmcoord_cluster_pb2 as pb
from servers.pb import shmcoord_cluster_pb2_grpc as pb_grpc

NODE = "A"
START_TIMEOUT_S = 30.0
CONFIG = """\
teams = ["GREEN"]

[cluster]
heartbeat_s = 2.0

[data]
file = "rows.csv"

[hosts.host1]
segment = "{segment}"

[nodes.{node}]
host = "host1"
role = "leader"
port = {port}
team = "GREEN"
"""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await_answer(endpoint: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    with grpc.insecure_channel(endpoint) as channel:
        stub = pb_grpc.NodeStub(channel)
        while True:
            try:
                stub.GetStatus(pb.GetStatusRequest(), timeout=1.0)
            except grpc.RpcError:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
            else:
                return


def main(place: str) -> None:
    """Runs the node until stdin closes."""
    port, segment = _free_port(), f"shmbench_{os.getpid()}_{secrets.token_hex(3)}"
    folder = Path(place)
    (folder / "rows.csv").write_text("carrier,delay\nAA,1\nUA,2\n", encoding="utf-8")
    config = folder / "cluster.toml"
    config.write_text(CONFIG.format(segment=segment, node=NODE, port=port), encoding="utf-8")
    log = folder / "node.log"
    with log.open("wb") as file:
        command = [sys.executable, "-m", "servers", "node", NODE, "--config", str(config)]
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    try:
        endpoint = f"127.0.0.1:{port}"
        try:
            _await_answer(endpoint, server)
        except grpc.RpcError:
            sys.exit(f"the node does not answer; its log:\n{log.read_text(encoding='utf-8')}")
        for _ in until_stopped(words=f"{endpoint} {segment}"):
            pass
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        if segment in shmcoord.segments():
            shmcoord.Segment.unlink(segment)
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
