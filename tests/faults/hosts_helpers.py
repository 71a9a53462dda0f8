"""Hosts for tests: namespaces with a network and a /dev/shm of their own, or, without, loopback.

Each host is a network namespace and a mount namespace, kept by a process that sleeps; a veth pair
links it to a bridge device in one more network namespace, the switch, where its cable can be
pulled. On loopback the hosts differ by their ports and by the names of their mirrors, and what can
be cut is the link between their bridges.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cluster_helpers import ROOT, free_ports, write_rows

from bench.bridge.relay import Relay
from shmcoord.bridge.keys import generate

GREEN_PINK = {"A": "GREEN", "B": "GREEN", "C": "GREEN", "D": "PINK", "E": "PINK", "F": "PINK"}
_HERE = Path(__file__).resolve().parent


@functools.cache
def why_no_namespaces() -> str:
    """Why hosts cannot be namespaces here; empty if they can."""
    for word in ("unshare", "nsenter", "ip"):
        if shutil.which(word) is None:
            return f"{word} is not installed"
    if os.geteuid() != 0:
        return "not root"
    try:
        with Switch("probe") as switch:
            switch.add("x", 1)
    except (subprocess.CalledProcessError, OSError) as error:
        return f"namespaces are not allowed: {getattr(error, 'stderr', '') or error}"
    return ""


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True)


class Switch:
    """The network: a bridge device to which hosts are plugged."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._keepers: list[subprocess.Popen[bytes]] = []
        self._at: dict[str, int] = {}
        try:
            self._pid = self._keep("--net")
            self._in_switch("ip", "link", "add", "lan", "type", "bridge")
            self._in_switch("ip", "link", "set", "lan", "up")
        except BaseException:
            self.close()
            raise

    def _keep(self, *namespaces: str) -> int:
        keeper = subprocess.Popen(
            ["unshare", *namespaces, "--", "sh", "-c", "echo ready; exec sleep 3600"],
            stdout=subprocess.PIPE,
        )
        self._keepers.append(keeper)
        assert keeper.stdout is not None
        if keeper.stdout.readline() != b"ready\n":
            raise OSError("unshare refused")
        return keeper.pid

    def _in_switch(self, *words: str) -> None:
        _run("nsenter", "-t", str(self._pid), "-n", "--", *words)

    def add(self, host: str, number: int) -> str:
        """Plug in a host; its address."""
        pid = self._at[host] = self._keep("--net", "--mount", "--propagation", "private")
        address = f"10.77.0.{number}"
        port = f"port{number}"
        _run(
            *("nsenter", "-t", str(self._pid), "-n", "--", "ip", "link", "add", port, "type"),
            *("veth", "peer", "name", "eth0", "netns", str(pid)),
        )
        self._in_switch("ip", "link", "set", port, "master", "lan", "up")
        for words in (
            ("ip", "address", "add", f"{address}/24", "dev", "eth0"),
            ("ip", "link", "set", "eth0", "up"),
            ("ip", "link", "set", "lo", "up"),
            ("mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", "/dev/shm"),
        ):
            _run(*self.inside(host), *words)
        return address

    def inside(self, host: str) -> tuple[str, ...]:
        """The words before a command that run it on a host."""
        return ("nsenter", "-t", str(self._at[host]), "-n", "-m", "--")

    def cable(self, number: int, *, plugged: bool) -> None:
        """Pull the cable of a host, or plug it in again."""
        self._in_switch("ip", "link", "set", f"port{number}", "up" if plugged else "down")

    def forward(self, number: int, *, forwards: bool) -> None:
        """Swallow what a host sends and gets while its link stays up, or forward it again."""
        to = ("master", "lan") if forwards else ("nomaster",)
        self._in_switch("ip", "link", "set", f"port{number}", *to)

    def close(self) -> None:
        """End all; the namespaces and what is in them go with their keepers."""
        for keeper in self._keepers:
            keeper.kill()
            keeper.wait()
            assert keeper.stdout is not None
            keeper.stdout.close()

    def __enter__(self) -> Switch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Hosts:
    """The cluster on several hosts; `up` runs on each.

    Args:
        folder: for configuration, keys and logs.
        nodes: for each host, its nodes.
        namespaces: whether hosts are namespaces; else all are on loopback.
        bridge: further lines for [bridge].
    """

    def __init__(
        self, folder: Path, nodes: dict[str, str], *, namespaces: bool, bridge: tuple[str, ...] = ()
    ) -> None:
        self.folder = folder
        self.bridge = bridge
        self.nodes = nodes
        self.unique = f"test_{os.getpid()}_{random.randrange(1 << 32):08x}"
        self.switch = Switch(self.unique) if namespaces else None
        self.addresses: dict[str, str] = {}
        self._ups: dict[str, subprocess.Popen[bytes]] = {}
        self._clients: list[Client] = []
        self._relays: dict[tuple[str, str], Relay] = {}
        try:
            for number, host in enumerate(nodes, 1):
                address = "127.0.0.1" if self.switch is None else self.switch.add(host, number)
                self.addresses[host] = address
            write_rows(folder)
            self._write()
        except BaseException:
            self.close()
            raise

    def file(self, host: str) -> Path:
        """The configuration that a host has."""
        return self.folder / f"{host}.toml"

    def _write(self) -> None:
        names = {node: host for host, of_host in self.nodes.items() for node in of_host}
        if self.switch is None:
            *ports, _ = free_ports(len(names) + len(self.nodes) + 1)
        else:
            ports = list(range(5000, 5000 + len(names) + len(self.nodes)))
        numbers = iter(ports)
        self.ports = {node: next(numbers) for node in names}
        bridges = {host: next(numbers) for host in self.nodes}
        generate(self.folder / "keys", {host: [at] for host, at in self.addresses.items()})
        for host in self.nodes:
            seen = dict(bridges)
            if self.switch is None:  # of two hosts the first by name connects: over a relay
                for other in self.nodes:
                    if other > host:
                        relay = self._relays[host, other] = Relay(bridges[other])
                        seen[other] = relay.port
            self.file(host).write_text("\n".join(self._lines(names, seen)))

    def _lines(self, names: dict[str, str], bridges: dict[str, int]) -> list[str]:
        teams = list(dict.fromkeys(GREEN_PINK[node] for node in names))
        lines = [f"teams = {teams}", "[cluster]", "heartbeat_s = 0.2", "grace_s = 5.0"]
        lines += ["timeout_s = 20.0", "[data]", f'file = "{self.folder / "rows.csv"}"']
        lines += ['nulls = ["", "NA"]', 'group_by = "kind"', 'mean = "weight"']
        for host, address in self.addresses.items():
            lines += [f"[hosts.{host}]", f'segment = "{self.unique}_{host}"']
            lines += [f'address = "{address}"', f'bridge = ["tls/{address}:{bridges[host]}"]']
        lines += ["[bridge]", f'realm = "{self.unique}"', *self.bridge]
        if self.switch is None:
            lines.append('mirror = "{segment}.{host}"')
        lines += ["[bridge.tls]", 'ca = "keys/ca.pem"']
        lines += ['certificate = "keys/{host}.pem"', 'key = "keys/{host}.key"']
        for node, host in names.items():
            role = "leader" if node == "A" else "worker"
            lines += [f"[nodes.{node}]", f'host = "{host}"', f'role = "{role}"']
            lines += [f"port = {self.ports[node]}", f'team = "{GREEN_PINK[node]}"']
        return lines

    def words(self, host: str) -> tuple[str, ...]:
        """The words before a command that run it on a host."""
        return () if self.switch is None else self.switch.inside(host)

    def log(self, host: str) -> str:
        """What `up` said on a host."""
        return (self.folder / f"{host}.log").read_text()

    def up(self, *hosts: str) -> None:
        """Run `up` on hosts, and wait until their nodes serve."""
        for host in hosts:
            with (self.folder / f"{host}.log").open("wb") as log:
                self._ups[host] = subprocess.Popen(
                    [
                        *self.words(host),
                        *(sys.executable, "-m", "servers", "up", "--host", host),
                        *("--config", str(self.file(host))),
                    ],
                    cwd=ROOT,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, "PYTHONPATH": str(ROOT)},  # nsenter leaves the folder
                    start_new_session=True,
                )
        ends = time.monotonic() + 60.0
        for host in hosts:
            while "Ready: " not in self.log(host):
                assert self._ups[host].poll() is None, self.log(host)
                assert time.monotonic() < ends, self.log(host)
                time.sleep(0.02)

    def pids(self, host: str) -> dict[str, int]:
        """The processes of a host: its nodes, and "bridge"."""
        import psutil

        found = {}
        for process in psutil.Process(self._ups[host].pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                words = process.cmdline()
                if "servers" in words and "node" in words:
                    found[words[words.index("node") + 1]] = process.pid
                elif "servers" in words and "bridge" in words:
                    found["bridge"] = process.pid
        return found

    def signal(self, host: str, what: str, number: signal.Signals) -> None:
        """Send a signal to a process of a host."""
        os.kill(self.pids(host)[what], number)

    def crash(self, host: str) -> None:
        """End a host as a power cut does, and what was in its memory with it."""
        pids = self.pids(host)
        os.kill(self._ups[host].pid, signal.SIGKILL)
        for pid in pids.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._ups.pop(host).wait()
        ends = time.monotonic() + 10.0
        while any(Path(f"/proc/{pid}").exists() for pid in pids.values()):
            assert time.monotonic() < ends
            time.sleep(0.005)
        self._forget(host)

    def _forget(self, host: str) -> None:
        """Empty a host's memory."""
        if self.switch is not None:
            subprocess.run([*self.words(host), "sh", "-c", "rm -f /dev/shm/*"], check=True)
            return
        for path in Path("/dev/shm").glob(f"{self.unique}_*"):
            own = path.name == f"{self.unique}_{host}"
            if own or path.name.endswith(f".{host}"):
                path.unlink()

    def swallow(self, host: str, *, swallows: bool) -> None:
        """Let a host's packets vanish though its link is up, or not. In namespaces alone."""
        assert self.switch is not None
        self.switch.forward(list(self.nodes).index(host) + 1, forwards=not swallows)

    def codes(self) -> dict[str, int | None]:
        """How `up` ended on each host; None: it has not."""
        return {host: up.poll() for host, up in self._ups.items()}

    def cut(self, host: str) -> None:
        """Pull a host's cable; on loopback, cut the links of its bridge."""
        if self.switch is not None:
            self.switch.cable(list(self.nodes).index(host) + 1, plugged=False)
        for pair, relay in self._relays.items():
            if host in pair:
                relay.cut()

    def heal(self, host: str) -> None:
        """Mend that again."""
        if self.switch is not None:
            self.switch.cable(list(self.nodes).index(host) + 1, plugged=True)
        for pair, relay in self._relays.items():
            if host in pair:
                relay.heal()

    def client(self, host: str) -> Client:
        """Somebody on a host who asks its gateway, and looks into its memory."""
        made = Client(self, host)
        self._clients.append(made)
        return made

    def close(self) -> None:
        """End all."""
        for client in self._clients:
            client.close()
        for up in self._ups.values():
            if up.poll() is None:
                up.terminate()
        for up in self._ups.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                up.wait(20.0)
            if up.poll() is None:
                os.killpg(up.pid, signal.SIGKILL)
                up.wait()
        if self.switch is not None:
            self.switch.close()
        for relay in self._relays.values():
            relay.close()
        for path in Path("/dev/shm").glob(f"{self.unique}_*"):
            path.unlink()


class Client:
    """A process on a host that asks queries and looks into segments; a line of JSON each."""

    def __init__(self, hosts: Hosts, host: str) -> None:
        self._process = subprocess.Popen(
            [
                *hosts.words(host),
                *(sys.executable, str(_HERE / "hosts_client.py"), str(hosts.file(host)), host),
            ],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    def ask(self, timeout_s: float = 60.0, /, **command: Any) -> Any:
        """Its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], timeout_s)[0]:
            raise AssertionError(f"no answer within {timeout_s:g} s: {command}")
        line = self._process.stdout.readline()
        if not line:
            raise AssertionError(f"the client ended: {self._process.wait()}")
        return json.loads(line)

    def seen(self) -> dict[str, str]:
        """The health of each node, as the host's memory has it."""
        found: dict[str, str] = self.ask(do="seen")
        return found

    def until(
        self, true: Callable[[dict[str, str]], bool], what: str, timeout_s: float = 15.0
    ) -> float:
        """Wait until something is so of what is seen; how long it took, seconds."""
        begun = time.monotonic()
        while not true(found := self.seen()):
            if time.monotonic() - begun > timeout_s:
                raise AssertionError(f"not within {timeout_s:g} s: {what}; seen: {found}")
            time.sleep(0.005)
        return time.monotonic() - begun

    def queries(self, **options: Any) -> dict[str, Any]:
        """Ask queries; what came of them (see hosts_client.py)."""
        found: dict[str, Any] = self.ask(do="queries", **options)
        return found

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(10.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


@contextlib.contextmanager
def hosts(
    folder: Path, nodes: dict[str, str], *, namespaces: bool, bridge: tuple[str, ...] = ()
) -> Iterator[Hosts]:
    """The cluster on several hosts, for a test."""
    made = Hosts(folder, nodes, namespaces=namespaces, bridge=bridge)
    try:
        made.up(*nodes)
        yield made
    finally:
        made.close()
