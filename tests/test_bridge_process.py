"""`shmcoord bridge` and `shmcoord bridge-keys` as they are run."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("zenoh", reason="the extra `bridge` is not installed")

import msgspec
from bridge_helpers import SUSPECT_S, until
from bridge_peers import Peer, free_port

from shmcoord import Health, Router, Segment, State
from shmcoord.bridge.config import load
from shmcoord.bridge.frame import decode, encode
from shmcoord.bridge.sending import Sender

COMMAND = (sys.executable, "-m", "shmcoord")


class Hosts:
    """Two hosts on this machine: a segment and a bridge process each."""

    def __init__(self, name: str, folder: Path, scheme: str) -> None:
        self.name = name
        self.file = folder / "bridge.toml"
        lines = [
            f'realm = "{name.replace(".", "-")}"',
            f"suspect_after_s = {SUSPECT_S}",
            'mirror = "{segment}.{host}"',
        ]
        for host in ("h1", "h2"):
            lines += [
                f"[hosts.{host}]",
                f'listen = ["{scheme}/127.0.0.1:{free_port()}"]',
                f'segments = ["{name}.{host}"]',
            ]
        if scheme == "tls":
            lines += [
                "[tls]",
                *(['ca = "ca.pem"', 'certificate = "{host}.pem"', 'key = "{host}.key"']),
            ]
            run("bridge-keys", "--directory", str(folder), "h1=127.0.0.1", "h2=127.0.0.1")
        self.file.write_text("\n".join(lines))
        self.logs = {host: folder / f"{host}.log" for host in ("h1", "h2")}
        self.bridges: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, host: str) -> None:
        """Start its bridge."""
        with self.logs[host].open("ab") as log:
            self.bridges[host] = subprocess.Popen(
                [*COMMAND, "bridge", "--config", str(self.file), "--host", host], stderr=log
            )

    def shown(self) -> dict[str, tuple[Health, State]]:
        """What h1 shows of h2."""
        with contextlib.suppress(Exception), Segment.attach(f"{self.name}.h2.h1") as mirror:
            return {s.node: (s.health, s.state) for s in mirror.snapshot()}
        return {}

    def is_alive(self) -> bool:
        """Whether h1 shows C alive."""
        return self.shown().get("C", (None, None))[0] is Health.ALIVE

    def close(self) -> None:
        """End the bridges."""
        for bridge in self.bridges.values():
            bridge.send_signal(signal.SIGCONT)
            bridge.terminate()
            bridge.wait(10.0)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=30.0, check=False
    )


@pytest.fixture(params=["tcp", "tls"])
def hosts(request: pytest.FixtureRequest, name: str, tmp_path: Path) -> Iterator[Hosts]:
    made = Hosts(name, tmp_path, request.param)
    for host in ("h1", "h2"):
        made.start(host)
    yield made
    made.close()


def test_two_hosts(hosts: Hosts) -> None:
    """Death, freeze and end of either bridge, and what the first host shows meanwhile."""
    with (
        Segment.open(f"{hosts.name}.h2") as segment,
        segment.join("C", group="G", endpoint="127.0.0.1:1", capacity=2) as node,
        Router(f"{hosts.name}.h1", f"{hosts.name}.h2.h1") as router,
    ):
        until(hosts.is_alive, "C is shown", 10.0)
        with router.acquire("G") as lease, node.adopt(lease.token):
            assert (lease.node, node.inflight) == ("C", 1)
        node.drain()
        until(lambda: hosts.shown()["C"][1] is State.DRAINING, "C drains")
        node.resume()
        until(lambda: hosts.shown()["C"][1] is State.IDLE, "C takes work")

        hosts.bridges["h2"].kill()
        assert until(lambda: not hosts.is_alive(), "its end is seen") < SUSPECT_S
        hosts.bridges["h2"].wait()
        hosts.start("h2")
        until(hosts.is_alive, "C is back", 10.0)

        for frozen in ("h2", "h1"):
            hosts.bridges[frozen].send_signal(signal.SIGSTOP)
            took = until(lambda: not hosts.is_alive(), "C is suspect")
            assert took < SUSPECT_S + 0.3
            assert hosts.shown()["C"][0] is Health.SUSPECT
            time.sleep(0.7)  # frames gather, and come all at once at the thaw
            hosts.bridges[frozen].send_signal(signal.SIGCONT)
            until(hosts.is_alive, "C is back")

        # What each has refused is in its last words: h1's run ends here, h2's at the end.
        hosts.bridges["h1"].terminate()
        assert hosts.bridges["h1"].wait(10.0) == 0
        assert re.search(r"host h2: \d+ frames; dropped: \d+ late", hosts.logs["h1"].read_text())
        hosts.start("h1")
        until(hosts.is_alive, "C is back", 10.0)
        hosts.bridges["h1"].kill()
        until(lambda: not hosts.is_alive(), "nobody keeps the mirror")
        hosts.bridges["h1"].wait()
        hosts.start("h1")
        until(hosts.is_alive, "C is back", 10.0)

        for host in ("h2", "h1"):
            hosts.bridges[host].terminate()
            assert hosts.bridges[host].wait(10.0) == 0
        assert hosts.shown() == {}
    log = hosts.logs["h1"].read_text()
    assert "host h2 is heard" in log
    assert "Traceback" not in log
    assert not [file for file in os.listdir("/dev/shm") if "zenoh" in file]


def test_check(name: str, tmp_path: Path) -> None:
    hosts = Hosts(name, tmp_path, "tcp")
    done = run("bridge", "--config", str(hosts.file), "--host", "h1", "--check")
    assert done.returncode == 0
    assert done.stdout.endswith(f"right; h1 tells h2 of {name}.h1\n")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--config", "missing.toml"), "missing.toml: No such file"),
        (("--host", "h7"), "this host is 'h7'"),
    ],
)
def test_what_is_wrong_is_one_line(
    name: str, tmp_path: Path, arguments: tuple[str, ...], why: str
) -> None:
    hosts = Hosts(name, tmp_path, "tcp")
    done = run("bridge", "--config", str(hosts.file), "--host", "h1", *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: BridgeConfigError: ")
    assert why in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_address_that_is_taken(name: str, tmp_path: Path) -> None:
    hosts = Hosts(name, tmp_path, "tcp")
    port = int(hosts.file.read_text().partition("127.0.0.1:")[2].partition('"')[0])
    with socket.create_server(("127.0.0.1", port)):
        done = run("bridge", "--config", str(hosts.file), "--host", "h1")
    assert done.returncode == 1
    assert "EngineError: Zenoh cannot listen on" in done.stderr
    assert "Traceback" not in done.stderr


def test_bridge_keys(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    done = run("bridge-keys", "--directory", str(folder), "a=10.0.0.1,a.example", "b")
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(os.listdir(folder)) == ["a.key", "a.pem", "b.key", "b.pem", "ca.key", "ca.pem"]
    done = run("bridge-keys", "--directory", str(folder), "a")
    assert done.returncode == 1
    assert "is there already" in done.stderr


def test_without_the_extra(name: str, tmp_path: Path) -> None:
    """What is missing is named, with what to install."""
    hosts = Hosts(name, tmp_path, "tcp")
    for module in ("msgspec", "zenoh"):
        code = (
            f"import sys; sys.modules[{module!r}] = None\n"
            "from shmcoord.cli import main\n"
            f"sys.argv = ['shmcoord', 'bridge', '--config', {str(hosts.file)!r}, '--host', 'h1']\n"
            "main()"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=30.0, check=False
        )
        assert done.returncode == 1, done.stderr
        assert module in done.stderr
        assert "pip install shmcoord[bridge]" in done.stderr
        assert "Traceback" not in done.stderr


def test_what_a_bridge_hears_twice_too_late_or_of_others(name: str, tmp_path: Path) -> None:
    """A real bridge, and a peer that says what an honest one would not."""
    hosts = Hosts(name, tmp_path, "tcp")
    config = load(hosts.file, host="h2")
    hosts.start("h1")
    peer = Peer("zenoh", config.engine_config())
    try:
        with (
            Segment.open(f"{name}.h2") as segment,
            segment.join("C", group="G", endpoint="127.0.0.1:1") as node,
        ):
            assert peer.error is None
            peer.wait(lambda: peer.hints("h1") == ["up"], "they are linked")
            honest, other = Sender("h2", [segment.name]), Sender("h1", [segment.name])
            stale = honest.frame(full=True)
            time.sleep(2 * SUSPECT_S)
            first = honest.frame(full=True)
            peer.publish(first)
            until(hosts.is_alive, "C is shown")
            with node.request():
                told = honest.frame(full=True)
            late = decode(honest.frame(full=True))
            late = msgspec.structs.replace(late, sent_ns=late.sent_ns - 1_000_000_000)
            wrong = (told, told, first, stale, encode(late), other.frame(full=True), b"nonsense")
            for frame in wrong:
                peer.publish(frame)
                time.sleep(0.01)
            # What counts is the first of those alone.
            with Segment.attach(f"{name}.h2.h1") as mirror:
                until(lambda: mirror.status("C").queue == 1, "the request is told of")
            hosts.bridges["h1"].terminate()
            assert hosts.bridges["h1"].wait(10.0) == 0
    finally:
        peer.close()
        hosts.close()
    summary = "host h2: 2 frames; dropped: 1 repeated, 2 overtaken, 1 late, 2 wrong"
    assert summary in hosts.logs["h1"].read_text()
