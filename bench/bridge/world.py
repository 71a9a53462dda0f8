"""The processes of a measurement: two hosts under observation, and stand-ins for the others."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from bench.bridge.relay import Relay
from bench.children import ROOT
from shmcoord import Health, Segment

NODES = 64
TICK_S = 0.05
SUSPECT_AFTER_S = 0.25
PER_PROCESS = 15  # stand-ins


def free_port() -> int:
    """Return a port of this moment that nobody has."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def until(true: Callable[[], bool], what: str, timeout_s: float = 30.0) -> float:
    """Wait until something is so; return the seconds it took."""
    begun = time.perf_counter()
    while not true():
        if time.perf_counter() - begun > timeout_s:
            raise TimeoutError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.0005)
    return time.perf_counter() - begun


class Process:
    """A child that says something when it is ready, and ends with its input."""

    def __init__(self, module: str, *arguments: object, first: Any = None) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._child.pid
        if first is not None:
            self._write(json.dumps(first))

    def _write(self, line: str) -> None:
        assert self._child.stdin is not None
        self._child.stdin.write(line + "\n")
        self._child.stdin.flush()

    def read(self) -> str:
        """Return its next line."""
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise RuntimeError(f"a process of the benchmark ended: {self._child.wait()}")
        return line

    def ask(self) -> Any:
        """Return its answer to an empty line."""
        self._write("")
        return json.loads(self.read())

    def cpu_s(self) -> float:
        """Return the CPU time that it has used, in seconds."""
        with open(f"/proc/{self.pid}/stat", encoding="ascii") as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_bytes(self) -> int:
        """Return its resident memory."""
        with open(f"/proc/{self.pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def threads(self) -> int:
        """Return how many threads it has."""
        return len(os.listdir(f"/proc/{self.pid}/task"))

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._child.send_signal(number)

    def close(self) -> None:
        """End it."""
        if self._child.poll() is None:
            self._child.send_signal(signal.SIGCONT)
            self._child.terminate()
            assert self._child.stdin is not None
            with contextlib.suppress(OSError):
                self._child.stdin.close()
            try:
                self._child.wait(10.0)
            except subprocess.TimeoutExpired:
                self._child.kill()
        self._child.wait()


class World:
    """`count` hosts: `h1` looks at `h2`; the link between them is a relay that can be cut."""

    def __init__(self, count: int, nodes: int = NODES) -> None:
        self.count = count
        self.nodes = nodes
        self.prefix = f"bench_bridge_{os.getpid()}_{secrets.token_hex(2)}"
        self._hosts = {f"h{i + 1}": free_port() for i in range(count)}
        self._children: list[Process] = []
        self.relay = Relay(self._hosts["h2"])
        for host in ("h1", "h2"):
            self._children.append(Process("bench.bridge.host", self.segment(host), nodes))
        others = list(self._hosts)[2:]
        for at in range(0, len(others), PER_PROCESS):
            some = others[at : at + PER_PROCESS]
            first = {
                "prefix": self.prefix,
                "nodes": nodes,
                "realm": self.prefix,
                "to": ["h1", "h2"],
                "tick_s": TICK_S,
                "hosts": {host: f"tcp/127.0.0.1:{self._hosts[host]}" for host in some},
            }
            self._children.append(Process("bench.bridge.stand_ins", first=first))
        for child in self._children:
            child.read()
        self.bridges = {host: self.bridge(host) for host in ("h1", "h2")}

    def segment(self, host: str) -> str:
        """Return the name of a host's segment."""
        return f"{self.prefix}.{host}"

    def mirror(self, at: str, of: str) -> str:
        """Return the name of the mirror, on one host, of the segment of another."""
        return f"{self.segment(of)}.{at}"

    def bridge(self, host: str) -> Process:
        """Start a bridge."""
        ports = dict(self._hosts)
        if host == "h1":
            ports["h2"] = self.relay.port
        found = Process("bench.bridge.runner", first=self._settings(host, ports))
        found.read()
        return found

    def _settings(self, host: str, ports: dict[str, int]) -> dict[str, Any]:
        hosts = {}
        for name, port in ports.items():
            hosts[name] = {
                "listen": [f"tcp/127.0.0.1:{port}"],
                "segments": [self.segment(name)],
            }
        return {
            "host": host,
            "realm": self.prefix,
            "tick_s": TICK_S,
            "suspect_after_s": SUSPECT_AFTER_S,
            "mirror": "{segment}.{host}",
            "hosts": hosts,
        }

    def is_alive(self, node: str = "N0") -> bool:
        """Tell whether h1 shows a node of h2 alive."""
        with contextlib.suppress(Exception), Segment.attach(self.mirror("h1", "h2")) as mirror:
            return mirror.status(node).health is Health.ALIVE
        return False

    def close(self) -> None:
        """End all, and remove the segments."""
        for child in (*getattr(self, "bridges", {}).values(), *self._children):
            child.close()
        self.relay.close()
        for name in os.listdir("/dev/shm"):
            if name.startswith(self.prefix):
                os.unlink(f"/dev/shm/{name}")


@contextlib.contextmanager
def world(count: int, nodes: int = NODES) -> Iterator[World]:
    """Hosts for the time of a measurement."""
    made = World(count, nodes)
    try:
        until(made.is_alive, "h1 sees h2")
        yield made
    finally:
        made.close()
