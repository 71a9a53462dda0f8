"""What every engine must do: one suite, on each of them.

The engine within a process runs in this one; real ones run in children, over loopback.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("zenoh", reason="the extra `bridge` is not installed")

from bridge_peers import Heard, Peer, free_port

from bench.bridge.relay import Relay
from shmcoord.bridge import engine as module
from shmcoord.bridge._memory import MemoryBridge, hub
from shmcoord.bridge.engine import EngineConfig, EngineNotFound, Tls, engine
from shmcoord.bridge.keys import generate

HOSTS = ("h1", "h2", "h3")
EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "bridge" / "redis_engine.py"


class Here:
    """A host whose engine runs in this process; has the interface of `bridge_peers.Peer`."""

    def __init__(self, config: EngineConfig) -> None:
        self.host = config.host
        self._realm = config.realm
        self.heard: list[Heard] = []
        self.error: str | None = None
        self._bridge = MemoryBridge()
        self._bridge.start(config, self)
        self.links = self._bridge.links

    def on_frame(self, host: str, frame: bytes) -> None:
        self.heard.append(Heard("frame", host, frame, time.monotonic()))

    def on_host(self, host: str, up: bool) -> None:
        self.heard.append(Heard("up" if up else "down", host, b"", time.monotonic()))

    def publish(self, *frames: bytes) -> tuple[list[bool], float]:
        return [self._bridge.publish(frame) for frame in frames], 0.0

    def threads(self) -> int:
        return threading.active_count()

    def stop(self) -> float:
        self._bridge.stop()
        self._bridge.stop()
        return 0.0

    def signal(self, number: signal.Signals) -> None:
        change = hub(self._realm)
        (change.freeze if number is signal.SIGSTOP else change.thaw)(self.host)

    def kill(self) -> None:
        hub(self._realm).leave(self.host)

    close = kill
    frames, hints = Peer.frames, Peer.hints

    def wait(self, true: Callable[[], object], what: str, timeout_s: float = 10.0) -> float:
        assert true(), what
        return 0.0


class Net:
    """Hosts by one engine; between h1 and h2 is something that can be cut."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        self.realm = f"test-{os.getpid()}-{time.monotonic_ns()}"
        self._ports = {host: free_port() for host in HOSTS}
        self._folder = folder
        self._made: list[Any] = []
        self._server = _Redis(folder) if kind == "redis" else None
        #: By when a death is noticed: who has no connection to the dead waits for a lease.
        self.noticed_s = 3.0 if kind == "redis" else 0.5
        self._relay = None
        if kind != "memory":
            self._relay = Relay(self._ports["h2"] if self._server is None else self._server.port)
        if kind == "tls":
            generate(folder, {host: ["127.0.0.1"] for host in HOSTS})

    def config(self, host: str, hosts: tuple[str, ...] = HOSTS) -> EngineConfig:
        """What one host is configured with."""
        scheme = "tls" if self.kind == "tls" else "tcp"
        ports = dict(self._ports)
        if self._relay is not None and host == "h1":
            ports["h2"] = self._relay.port
        tls = None
        if self.kind == "tls":
            tls = Tls(
                self._folder / "ca.pem", self._folder / f"{host}.pem", self._folder / f"{host}.key"
            )
        return EngineConfig(
            host=host,
            realm=self.realm,
            listen=(f"{scheme}/127.0.0.1:{self._ports[host]}",),
            connect=tuple(f"{scheme}/127.0.0.1:{ports[o]}" for o in hosts if o > host),
            hosts=tuple(o for o in hosts if o != host),
            tls=tls,
            settings={} if self._server is None else {"url": self._url(host)},
        )

    def _url(self, host: str) -> str:
        assert self._server is not None
        assert self._relay is not None
        port = self._relay.port if host == "h1" else self._server.port
        return f"redis://127.0.0.1:{port}"

    def start(self, host: str, hosts: tuple[str, ...] = HOSTS) -> Any:
        """Start a host."""
        config = self.config(host, hosts)
        name = f"{EXAMPLE}:RedisBridge" if self.kind == "redis" else "zenoh"
        made = Here(config) if self.kind == "memory" else Peer(name, config)
        self._made.append(made)
        assert made.error is None, made.error
        return made

    def pair(self) -> tuple[Any, Any]:
        """Two hosts that are linked."""
        one, other = (self.start(host, ("h1", "h2")) for host in ("h1", "h2"))
        for peer, about in ((one, "h2"), (other, "h1")):
            peer.wait(lambda p=peer, a=about: p.hints(a)[-1:] == ["up"], f"{about} is there")
        return one, other

    def cut(self) -> None:
        """Let nothing pass between h1 and h2."""
        if self._relay is None:
            hub(self.realm).cut("h1", "h2")
        else:
            self._relay.cut()

    def heal(self) -> None:
        """Let it pass again."""
        if self._relay is None:
            hub(self.realm).heal("h1", "h2")
        else:
            self._relay.heal()

    def close(self) -> None:
        """End all."""
        for peer in self._made:
            peer.close()
        if self._relay is not None:
            self._relay.close()
        if self._server is not None:
            self._server.close()


class _Redis:
    """A server of our own, in memory only."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._process = subprocess.Popen(
            [*("redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "")],
            cwd=folder,
            stdout=subprocess.DEVNULL,
        )
        ends = time.monotonic() + 10.0
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
            except OSError:
                assert time.monotonic() < ends
                time.sleep(0.01)
            else:
                return

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(10.0)


FULL = os.environ.get("SHMCOORD_FAULTS") == "full"
TCP = pytest.param(
    "tcp", marks=pytest.mark.skipif(not FULL, reason="full counts only: what tls does without TLS")
)


@pytest.fixture(params=["memory", TCP, "tls", "redis"])
def net(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Net]:
    """Hosts without any process yet; the last engine is the example of docs/bridges.md."""
    if request.param == "redis":
        pytest.importorskip("redis", reason="the package redis is not installed")
        if shutil.which("redis-server") is None:
            pytest.skip("redis-server is not installed (Debian package redis-server)")
    made = Net(request.param, tmp_path)
    yield made
    made.close()


def arrives(sender: Any, receiver: Any, frame: bytes, timeout_s: float = 10.0) -> float:
    """Publish until a frame arrives; how long it took, seconds. Frames may be lost."""
    begun = time.monotonic()
    while frame not in receiver.frames(sender.host):
        sender.publish(frame)
        time.sleep(0.01)
        assert time.monotonic() - begun < timeout_s, f"{frame!r} did not arrive"
    return time.monotonic() - begun


def test_everybody_hears_everybody_else(net: Net) -> None:
    peers = [net.start(host) for host in HOSTS]
    for peer in peers:
        for other in HOSTS:
            if other != peer.host:
                peer.wait(lambda p=peer, o=other: p.hints(o) == ["up"], f"{other} is there")
        assert peer.links().connected == frozenset(HOSTS) - {peer.host}
    for peer in peers:
        assert peer.publish(f"from {peer.host}".encode())[0] == [True]
    for peer in peers:
        wanted = sorted(f"from {other}".encode() for other in HOSTS if other != peer.host)
        peer.wait(lambda p=peer, w=wanted: sorted(p.frames()) == w, "the frames of the others")
        for heard in peer.heard:
            assert heard.kind != "frame" or heard.frame == f"from {heard.host}".encode()


def test_frames_come_whole_in_order_and_soon(net: Net) -> None:
    one, other = net.pair()
    frames = [b"%06d" % i + os.urandom(i * 97) for i in range(200)] + [os.urandom(1 << 20), b""]
    took = []
    for i, frame in enumerate(frames):  # one at a time, as a bridge does: a full queue drops
        assert one.publish(frame)[0] == [True]
        took.append(other.wait(lambda i=i: len(other.frames("h1")) > i, f"frame {i}"))
    assert other.frames("h1") == frames
    assert statistics.median(took) < 0.02
    assert one.frames() == []  # nobody hears himself


def test_a_kill_is_noticed_at_once_and_the_next_run_is_heard(net: Net) -> None:
    one, other = net.pair()
    other.kill()
    took = one.wait(lambda: one.hints("h2") == ["up", "down"], "h2 is gone")
    assert took < net.noticed_s
    other = net.start("h2", ("h1", "h2"))
    one.wait(lambda: one.hints("h2") == ["up", "down", "up"], "h2 is back")
    arrives(other, one, b"again")
    arrives(one, other, b"welcome")


def test_a_frozen_host_blocks_nobody(net: Net) -> None:
    one, other = net.pair()
    third = net.start("h3")
    arrives(one, other, b"before")
    other.signal(signal.SIGSTOP)
    done, longest = one.publish(*([bytes(100_000)] * 300))  # 30 MB: no socket takes that
    assert len(done) == 300
    assert longest < 0.25
    del third
    other.signal(signal.SIGCONT)
    arrives(one, other, b"after")


def test_a_host_that_stays_frozen_is_noticed_and_heard_again(net: Net) -> None:
    if net.kind == "memory":
        pytest.skip("nobody is told there: the age of the frames must do")
    one, other = net.pair()
    other.signal(signal.SIGSTOP)
    took = one.wait(lambda: one.hints("h2") == ["up", "down"], "h2 does not answer")
    assert took < 3.0  # a lease is 1 s
    other.signal(signal.SIGCONT)
    one.wait(lambda: one.hints("h2") == ["up", "down", "up"], "h2 is back")
    arrives(one, other, b"after")
    arrives(other, one, b"as well")


def test_a_stop_waits_for_no_frozen_host(net: Net) -> None:
    one, other = net.pair()
    arrives(one, other, b"before")
    other.signal(signal.SIGSTOP)
    one.publish(*([bytes(100_000)] * 200))  # the link is full
    assert one.stop() < 3.0
    assert one.publish(b"too late")[0] == [False]
    if net.kind != "memory":
        begun = time.monotonic()
        one.close()
        assert time.monotonic() - begun < 3.0
        assert one.process.returncode == 0


def test_a_cut_link_heals(net: Net) -> None:
    one, other = net.pair()
    arrives(one, other, b"before")
    net.cut()
    for _ in range(20):
        one.publish(b"lost")
        time.sleep(0.01)
    assert other.frames("h1").count(b"lost") <= 1  # one may have been under way
    net.heal()
    arrives(one, other, b"after", 15.0)
    arrives(other, one, b"as well", 15.0)


def test_a_regular_stop_is_told_and_leaves_nothing(net: Net) -> None:
    one, other = net.pair()
    files = set(os.listdir("/dev/shm"))
    threads = other.threads()
    assert other.stop() < 2.0
    one.wait(lambda: one.hints("h2") == ["up", "down"], "h2 has gone")
    assert other.publish(b"too late")[0] == [False]
    assert other.links().connected == frozenset()
    assert other.threads() <= threads
    assert {name for name in os.listdir("/dev/shm") if "zenoh" in name} <= files


def test_other_realms_are_not_heard(net: Net, tmp_path: Path) -> None:
    one, other = net.pair()
    elsewhere = Net(net.kind if net.kind == "memory" else "tcp", tmp_path)
    try:
        stranger = elsewhere.start("h3")
        arrives(one, other, b"ours")
        stranger.publish(b"theirs")
        assert other.frames("h3") == one.frames("h3") == []
    finally:
        elsewhere.close()


def test_engines_are_found_by_name() -> None:
    assert engine("memory") is MemoryBridge
    assert engine("zenoh")().__class__.__name__ == "ZenohBridge"
    with pytest.raises(EngineNotFound, match="there are memory, zenoh"):
        engine("pigeons")


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("shmcoord.bridge._no_such:X", r"_no_such.*pip install shmcoord\[bridge\]"),
        ("bridge_peers:NoSuchBridge", r"NoSuchBridge.*\(bridge_peers:NoSuchBridge\)"),
        ("no_such_package.engine:X", r"no_such_package.*\(no_such_package\.engine:X\)"),
    ],
)
def test_an_engine_that_cannot_be_loaded(
    monkeypatch: pytest.MonkeyPatch, value: str, why: str
) -> None:
    found = [metadata.EntryPoint("broken", value, module.ENTRY_POINTS)]
    monkeypatch.setattr(module, "entry_points", lambda group: found)
    with pytest.raises(EngineNotFound, match=why):
        engine("broken")
