"""Who may speak: a host for itself, and nobody else; and what is listened on."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("zenoh", reason="the extra `bridge` is not installed")

from bridge_peers import Peer, free_port
from helpers import Child

from shmcoord.bridge._zenoh import ZenohBridge, settings
from shmcoord.bridge.engine import EngineConfig, EngineError, Tls
from shmcoord.bridge.keys import generate

HOSTS = ("h1", "h2", "h3")

# A host that obeys no rules: what `settings` makes, without the access rules. Arguments: a
# configuration's JSON; each further line is a key to put something on.
ROGUE = """
import zenoh
zenoh.init_log_from_env_or("off")
config = zenoh.Config()
tokens = []
for key, value in json.loads(sys.argv[1]).items():
    config.insert_json5(key, json.dumps(value))
try:
    session = zenoh.open(config)
except zenoh.ZError as error:
    say("refused", error)
    raise SystemExit
token = session.liveliness().declare_token(sys.argv[2])
heard = []
hears = zenoh.handlers.Callback(
    lambda sample: heard.append(sample.payload.to_bytes()), indirect=False)
realm = sys.argv[2].rpartition("/alive/")[0]
listening = [session.declare_subscriber(key, hears) for key in ("**", realm + "/**")]
say("open")
for line in sys.stdin:
    key = line.strip()
    if key == "heard":
        say(heard.count(b"secret"))
        continue
    if "/alive/" in key:
        tokens.append(session.liveliness().declare_token(key))
    else:
        session.put(key, b"forged")
    say(len(session.info.peers_zid()))
"""


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    generate(tmp_path, {host: ["127.0.0.1"] for host in (*HOSTS, "stranger")})
    return tmp_path


def tls(folder: Path, host: str) -> Tls:
    return Tls(folder / "ca.pem", folder / f"{host}.pem", folder / f"{host}.key")


def config(keys: Path | None, **changes: object) -> EngineConfig:
    """What h1 is configured with; with keys by TLS."""
    found = EngineConfig(
        host="h1",
        realm=f"test-{time.monotonic_ns()}",
        listen=(f"{'tls' if keys else 'tcp'}/127.0.0.1:{free_port()}",),
        connect=(),
        hosts=("h2", "h3"),
        tls=None if keys is None else tls(keys, "h1"),
    )
    return replace(found, **changes)  # type: ignore[arg-type]


@pytest.fixture
def peer() -> Iterator[Callable[[EngineConfig], Peer]]:
    made: list[Peer] = []

    def start(config: EngineConfig) -> Peer:
        made.append(Peer("zenoh", config))
        return made[-1]

    yield start
    for one in made:
        one.close()


def rogue(
    spawn: Callable[..., Child],
    victim: EngineConfig,
    own: Tls | None,
    scheme: str = "",
    host: str = "h2",
) -> Child:
    """A process that connects to the victim with these certificates and says what it likes.

    It shows `host` alive. If the victim connects to somebody, it listens there instead.
    """
    import json

    at = victim.listen[0]
    if scheme:
        at = f"{scheme}/{at.partition('/')[2]}"
    kind = at.partition("/")[0]
    listens, connects = (f"{kind}/127.0.0.1:{free_port()}",), (at,)
    if victim.connect:
        listens, connects = victim.connect, ()
    mine = EngineConfig("h9", victim.realm, listens, connects, ("h1",), own)
    raw = settings(mine)
    raw.pop("access_control", None)
    raw["transport/link/protocols"] = ["tcp", "tls"]
    return spawn(ROGUE, json.dumps(raw), f"shmcoord/{victim.realm}/alive/{host}")


def forge(child: Child, victim: Peer, realm: str, host: str, *, wait_s: float = 3.0) -> bool:
    """Put frames on a host's key for a while; whether one was delivered."""
    ends = time.monotonic() + wait_s
    while time.monotonic() < ends:
        child.say(f"shmcoord/{realm}/frame/{host}")
        child.hear()
        if b"forged" in victim.frames(host):
            return True
        time.sleep(0.02)
    return False


def test_without_rules_anybody_speaks_for_anybody(
    peer: Callable[[EngineConfig], Peer], spawn: Callable[..., Child]
) -> None:
    """The control: on plain TCP, which is for loopback, a forged frame is delivered."""
    victim = config(None)
    h1 = peer(victim)
    child = rogue(spawn, victim, None)
    assert child.hear() == "open"
    assert forge(child, h1, victim.realm, "h2")
    assert h1.hints("h2") == ["up"]


def test_a_host_speaks_for_itself_alone(
    peer: Callable[[EngineConfig], Peer], spawn: Callable[..., Child], keys: Path
) -> None:
    victim = config(keys)
    h1 = peer(victim)
    child = rogue(spawn, victim, tls(keys, "h3"))
    assert child.hear() == "open"
    assert forge(child, h1, victim.realm, "h3")  # it is linked, and heard for itself
    assert not forge(child, h1, victim.realm, "h2", wait_s=0.5)
    assert h1.hints("h2") == []  # nor does it show anybody else alive


@pytest.mark.parametrize("who", ["h3", "stranger"])
def test_frames_are_for_known_hosts(
    peer: Callable[[EngineConfig], Peer], spawn: Callable[..., Child], keys: Path, who: str
) -> None:
    """A certificate of our CA alone lets nobody listen; that of a host, the control, does."""
    victim = config(keys)
    h1 = peer(victim)
    child = rogue(spawn, victim, tls(keys, who), host=who)
    assert child.hear() == "open"
    ends = time.monotonic() + (5.0 if who == "h3" else 1.0)
    count = 0
    while not count and time.monotonic() < ends:
        h1.publish(b"secret")
        time.sleep(0.02)
        child.say("heard")
        count = int(child.hear())
    assert (count > 0) == (who == "h3")
    child.say("any/key")
    assert child.hear() == "1"  # it was connected


#: Keys that are not of one host, yet meet what a victim listens to.
WIDE = ("frame/*", "frame/**", "**", "frame/h$*", "*/h2", "frame/h3/**")


def test_without_rules_a_wide_key_speaks_for_all(
    peer: Callable[[EngineConfig], Peer], spawn: Callable[..., Child]
) -> None:
    """The control: that these keys are delivered where no rule stops them."""
    victim = config(None)
    h1 = peer(victim)
    child = rogue(spawn, victim, None)
    assert child.hear() == "open"
    assert forge(child, h1, victim.realm, "h2")
    for key in WIDE[:-1]:
        before = len(h1.frames())
        child.say(f"shmcoord/{victim.realm}/{key}")
        h1.wait(lambda n=before: len(h1.frames()) > n, key)


@pytest.mark.parametrize("who", ["connects", "is connected to"])
def test_no_wide_key_gets_past_the_rules(
    peer: Callable[[EngineConfig], Peer], spawn: Callable[..., Child], keys: Path, who: str
) -> None:
    """A host with a good certificate, whichever of the two sides it has of the connection."""
    at = () if who == "connects" else (f"tls/127.0.0.1:{free_port()}",)
    victim = config(keys, connect=at)
    child = rogue(spawn, victim, tls(keys, "h3"), host="h3") if at else None
    h1 = peer(victim)
    child = child or rogue(spawn, victim, tls(keys, "h3"), host="h3")
    assert child.hear() == "open"
    assert forge(child, h1, victim.realm, "h3")
    h1.wait(lambda: h1.hints("h3"), "h3 is there")
    for key in (*WIDE, "frame/h2", "alive/h2", "alive/*", "alive/**"):
        child.say(f"shmcoord/{victim.realm}/{key}")
        child.hear()
    time.sleep(0.1)
    count = len(h1.frames("h3"))
    child.say(f"shmcoord/{victim.realm}/frame/h3")
    child.hear()
    h1.wait(lambda: len(h1.frames("h3")) > count, "h3 is heard")
    # What was said before has come by now, or never.
    assert {heard.host for heard in h1.heard} == {"h3"}
    assert h1.hints("h3") == ["up"]
    assert len(h1.frames("h3")) == count + 1


def test_a_certificate_of_no_known_host_says_nothing(
    peer: Callable[[EngineConfig], Peer], spawn: Callable[..., Child], keys: Path
) -> None:
    victim = config(keys)
    h1 = peer(victim)
    child = rogue(spawn, victim, tls(keys, "stranger"))
    assert child.hear() == "open"
    for host in ("h2", "h3", "stranger"):
        assert not forge(child, h1, victim.realm, host, wait_s=0.7)
    assert h1.frames() == []


@pytest.mark.parametrize("how", ["another CA", "plain TCP", "no certificate"])
def test_who_has_no_certificate_of_ours_is_not_let_in(
    peer: Callable[[EngineConfig], Peer],
    spawn: Callable[..., Child],
    keys: Path,
    tmp_path: Path,
    how: str,
) -> None:
    victim = config(keys)
    h1 = peer(victim)
    own = None
    if how == "another CA":
        generate(tmp_path / "other", {"h2": ["127.0.0.1"]})
        # It trusts us, and shows what another CA has signed.
        own = replace(tls(tmp_path / "other", "h2"), ca=keys / "ca.pem")
    elif how == "no certificate":
        _tls_without_certificate(victim, keys)
        return
    child = rogue(spawn, victim, own, "tcp" if how == "plain TCP" else "")
    assert child.hear() == "open"
    assert not forge(child, h1, victim.realm, "h2", wait_s=1.5)
    child.say("any/key")
    assert child.hear() == "0"
    assert h1.heard == []


def _tls_without_certificate(victim: EngineConfig, keys: Path) -> None:
    import ssl

    context = ssl.create_default_context(cafile=str(keys / "ca.pem"))
    port = int(victim.listen[0].rpartition(":")[2])
    # With TLS 1.3 our side is done before the other has seen that we show nothing.
    with (
        socket.create_connection(("127.0.0.1", port), timeout=5.0) as plain,
        contextlib.suppress(ssl.SSLError, ConnectionError),
        context.wrap_socket(plain, server_hostname="h1") as secure,
    ):
        assert secure.recv(100) == b""


def test_it_listens_on_what_it_is_told_and_nothing_else(
    peer: Callable[[EngineConfig], Peer], keys: Path
) -> None:
    for chosen in (config(None), config(keys)):
        one = peer(chosen)
        port = int(chosen.listen[0].rpartition(":")[2])
        assert _listening(one.process.pid) == {("127.0.0.1", port)}
        assert _datagram_sockets(one.process.pid) == 0  # no multicast


def _listening(pid: int) -> set[tuple[str, int]]:
    import psutil

    return {
        (found.laddr.ip, found.laddr.port)
        for found in psutil.Process(pid).net_connections("tcp")
        if found.status == psutil.CONN_LISTEN
    }


def _datagram_sockets(pid: int) -> int:
    import psutil

    return len(psutil.Process(pid).net_connections("udp"))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"listen": ("tcp/10.0.0.1:7447",)}, "needs TLS"),
        ({"connect": ("tcp/10.0.0.1:7447",)}, "needs TLS"),
        ({"listen": ("tcp/0.0.0.0:7447",), "insecure": True}, "name an address"),
        ({"listen": ("udp/127.0.0.1:7447",)}, "not of the form"),
        ({"listen": ("tls/127.0.0.1:7447",)}, "needs certificates"),
        ({"hosts": ("*",)}, "no name of a host"),
        ({"hosts": ("h2", "h2/x")}, "no name of a host"),
        ({"realm": "**"}, "no name of a host or realm"),
        ({"hosts": ("h1", "h2")}, "h1 is this host"),
    ],
)
def test_what_would_be_open_to_others_does_not_start(changes: dict[str, object], why: str) -> None:
    """The engine itself refuses, whoever made its configuration."""
    bridge = ZenohBridge()
    with pytest.raises(EngineError, match=why):
        bridge.start(config(None, **changes), Nobody())
    bridge.stop()


def test_with_certificates_no_link_is_without(keys: Path) -> None:
    with pytest.raises(EngineError, match="all hosts use TLS"):
        ZenohBridge().start(config(keys, connect=("tcp/127.0.0.1:7447",)), Nobody())


class Nobody:
    """Hears nothing."""

    def on_frame(self, host: str, frame: bytes) -> None:
        raise AssertionError

    def on_host(self, host: str, up: bool) -> None:
        raise AssertionError


def test_an_address_that_is_taken_is_an_error(peer: Callable[[EngineConfig], Peer]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        at = f"tcp/127.0.0.1:{taken.getsockname()[1]}"
        assert "cannot listen" in (peer(config(None, listen=(at,))).error or "")


def test_a_certificate_that_is_none_is_an_error(
    peer: Callable[[EngineConfig], Peer], keys: Path
) -> None:
    (keys / "h1.pem").write_text("nonsense")
    assert (peer(config(keys)).error or "").startswith("EngineError")
