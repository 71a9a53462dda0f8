"""nginx and HAProxy, as Debian has them: configuration, start and end.

Both speak HTTP/2 in clear text on both sides and listen on a loopback port. What is not said here
is left as it comes, also the number of their threads or processes: one per core.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

START_TIMEOUT_S = 10.0
_PR_SET_PDEATHSIG = 1
PACKAGES = {"nginx": "nginx-light", "haproxy": "haproxy"}

_NGINX = """\
daemon off;
master_process on;
worker_processes auto;
pid {folder}/nginx.pid;
error_log {folder}/nginx.log warn;
events {{
    worker_connections 4096;
}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    upstream nodes {{
        zone nodes 256k;
        least_conn;
{servers}
        keepalive 64;
        keepalive_requests 1000000000;
    }}
    server {{
        listen 127.0.0.1:{port} http2;
        http2_max_concurrent_streams 4096;
        keepalive_requests 1000000000;
        location / {{
            grpc_pass grpc://nodes;
            grpc_read_timeout {timeout_s}s;
            grpc_next_upstream off;
        }}
    }}
}}
"""

_HAPROXY = """\
global
    nbthread 1
    maxconn 8192
    tune.h2.max-concurrent-streams 4096
defaults
    mode http
    balance leastconn
    timeout connect 5s
    timeout client {timeout_s}s
    timeout server {timeout_s}s
    timeout queue {queue_ms}ms
    option abortonclose
    http-reuse always
frontend routers
    bind 127.0.0.1:{port} proto h2
    default_backend nodes
backend nodes
{servers}
"""


class ProxyMissing(Exception):
    """The proxy is not installed and cannot be."""


def find(program: str) -> str:
    """Path of nginx or haproxy; as root, installs the Debian package if need be.

    Raises:
        ProxyMissing: says why it cannot be had.
    """
    for folder in (None, "/usr/sbin:/usr/local/sbin"):
        if path := shutil.which(program, path=folder):
            return path
    package = PACKAGES[program]
    if os.geteuid() or not shutil.which("apt-get"):
        raise ProxyMissing(f"{program} is missing: apt-get install {package}")
    # Installed for its program alone: Debian would also start it as a service, on port 80.
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    for command in (["update", "-q"], ["install", "-qy", "--no-install-recommends", package]):
        done = subprocess.run(["apt-get", *command], env=environment, capture_output=True)
        if done.returncode:
            raise ProxyMissing(f"apt-get install {package} failed: {done.stderr.decode()[-200:]}")
    if path := shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin"):
        return path
    raise ProxyMissing(f"{package} was installed, but has no {program}")


def versions() -> list[str]:
    """What nginx and HAProxy say of themselves, of those that are there."""
    found = []
    for program in PACKAGES:
        try:
            done = subprocess.run([find(program), "-v"], capture_output=True, text=True)
        except ProxyMissing:
            continue
        number = re.search(r"\d+\.\d+\.\d+", done.stdout + done.stderr)
        found.append(f"{program} {number.group() if number else '?'}")
    return found


def free_port() -> int:
    """A loopback port that nobody listens on just now."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def nginx_config(folder: Path, port: int, nodes: Sequence[int], timeout_s: float) -> str:
    """least_conn over the nodes' ports, counted for all worker processes together (zone)."""
    servers = "\n".join(f"        server 127.0.0.1:{node} max_fails=0;" for node in nodes)
    return _NGINX.format(folder=folder, port=port, servers=servers, timeout_s=round(timeout_s))


def haproxy_config(
    port: int, nodes: Sequence[int], timeout_s: float, queue_s: float, maxconn: int | None
) -> str:
    """Leastconn over the nodes' ports.

    Args:
        port: where it listens.
        nodes: ports of the nodes.
        timeout_s: how long a request may take.
        queue_s: how long a request may wait in HAProxy for a node.
        maxconn: how many requests a node gets at once; None is no limit.
    """
    limit = "" if maxconn is None else f" maxconn {maxconn}"
    servers = "\n".join(
        f"    server node-{number} 127.0.0.1:{node} proto h2{limit}"
        for number, node in enumerate(nodes)
    )
    return _HAPROXY.format(
        port=port, servers=servers, timeout_s=round(timeout_s), queue_ms=round(queue_s * 1000)
    )


@contextmanager
def running(command: Sequence[str], port: int, log: Path) -> Iterator[list[int]]:
    """Starts a proxy and waits until it listens; yields the ids of its processes."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        try:
            _await_port(process, port, log)
            yield [process.pid, *_children(process.pid)]
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(5.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _await_port(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    ends = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < ends:
        if process.poll() is not None:
            break
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise RuntimeError(f"{process.args!r} did not listen: {log.read_text(errors='replace')[-500:]}")


def _children(pid: int) -> list[int]:
    words = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    return [int(word) for word in words]
