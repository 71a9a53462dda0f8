"""`bridge.toml`: what is taken, and what is said of what is not."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("msgspec", reason="the extra `bridge` is not installed")

from shmcoord import ShmcoordError
from shmcoord.bridge.config import BridgeConfigError, load, parse
from shmcoord.bridge.service import check

GOOD: dict[str, Any] = {
    "hosts": {
        "h1": {"listen": ["tcp/127.0.0.1:7001"], "segments": ["shm_1", "shm_1b"]},
        "h2": {"listen": ["tcp/127.0.0.1:7002"], "segments": ["shm_2"]},
        "h3": {"listen": ["tcp/[::1]:7003"]},
    }
}
EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "bridge" / "bridge.toml"


def test_defaults() -> None:
    config = parse(GOOD, host="h2", source="f")
    assert (config.tick_s, config.full_s, config.suspect_after_s) == (0.05, 1.0, 0.25)
    assert (config.realm, config.engine, config.mode, config.insecure) == (
        "shmcoord",
        "zenoh",
        0o600,
        False,
    )
    assert config.own.segments == ("shm_2",)
    assert set(config.others) == {"h1", "h3"}
    assert config.mirror_name("shm_1") == "shm_1"
    assert config.is_loopback
    check(config)


def test_of_two_hosts_the_first_by_name_connects() -> None:
    found = {host: parse(GOOD, host=host, source="f").engine_config() for host in GOOD["hosts"]}
    assert found["h1"].connect == ("tcp/127.0.0.1:7002", "tcp/[::1]:7003")
    assert found["h2"].connect == ("tcp/[::1]:7003",)
    assert found["h3"].connect == ()
    assert found["h2"].listen == ("tcp/127.0.0.1:7002",)
    assert found["h2"].hosts == ("h1", "h3")


def test_which_host_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse({**GOOD, "host": "h3"}, source="f").host == "h3"
    assert parse({**GOOD, "host": "h3"}, host="h1", source="f").host == "h1"
    monkeypatch.setattr(socket, "gethostname", lambda: "h2.example.org")
    assert parse(GOOD, source="f").host == "h2"
    monkeypatch.setattr(socket, "gethostname", lambda: "other")
    with pytest.raises(BridgeConfigError, match=r"f: this host is 'other'.*h1, h2, h3.*--host"):
        parse(GOOD, source="f")


def test_mirrors_have_names_of_their_own() -> None:
    config = parse({**GOOD, "mirror": "{segment}.{host}"}, host="h1", source="f")
    assert config.mirror_name("shm_2") == "shm_2.h1"


def changed(**changes: Any) -> Callable[[], object]:
    return lambda: parse({**GOOD, **changes}, host="h1", source="f")


def host(**changes: Any) -> Callable[[], object]:
    hosts = {**GOOD["hosts"], "h2": {**GOOD["hosts"]["h2"], **changes}}
    return changed(hosts=hosts)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (changed(tickk_s=1.0), "tickk_s"),
        (changed(tick_s="fast"), r"tick_s"),
        (changed(tick_s=0.0001), r"tick_s"),
        (changed(tick_s=0.2), "suspect_after_s: 0.25 is less than two ticks"),
        (changed(hosts={}), "this host is 'h1'"),
        (changed(hosts={"h 1": {"listen": ["tcp/127.0.0.1:1"]}}), "hosts"),
        (changed(hosts={"h*": {"listen": ["tcp/127.0.0.1:1"]}}), "hosts"),
        (changed(hosts={"h1\n": {"listen": ["tcp/127.0.0.1:1"]}}), "hosts"),
        (changed(realm="a/**"), "realm"),
        (changed(realm="a\n"), "realm"),
        (changed(mode=0o400), "mode"),
        (changed(mode=0o677 - 0o100), "mode: 0o577 lacks 0600|mode"),
        (changed(mirror="all"), "mirror: it needs {segment}"),
        (changed(mirror="{segment}/x"), "no name for a segment"),
        (changed(folder="/", host=7), "host"),
        (host(listen=[]), "listen"),
        (host(listen=["127.0.0.1:7002"]), "tls/ADDRESS:PORT"),
        (host(listen=["udp/127.0.0.1:7002"]), "tls/ADDRESS:PORT"),
        (host(listen=["tcp/127.0.0.1:0"]), "tls/ADDRESS:PORT"),
        (host(listen=["tcp/127.0.0.1:70000"]), "tls/ADDRESS:PORT"),
        (host(listen=["tcp/0.0.0.0:7002"]), "name an address"),
        (host(listen=["tcp/10.0.0.2:7002"]), "needs TLS"),
        (host(listen=["tls/10.0.0.2:7002"]), "needs certificates"),
        (host(segments=["shm_1"]), "shm_1 is of host h1 already"),
        (host(segments=["no/name"]), "segments"),
        (host(listen=["tcp/127.0.0.1:7001"]), "host h1 listens on 'tcp/127.0.0.1:7001' already"),
        (host(port=1), "port"),
    ],
)
def test_what_is_wrong_is_named(wrong: Callable[[], object], why: str) -> None:
    with pytest.raises(BridgeConfigError, match=why) as caught:
        wrong()
    assert str(caught.value).startswith("f: ")
    assert isinstance(caught.value, ShmcoordError)


def test_all_problems_are_named_at_once() -> None:
    hosts = {**GOOD["hosts"], "h2": {"listen": ["tcp/10.0.0.2:1"], "segments": ["shm_1"]}}
    with pytest.raises(BridgeConfigError) as caught:
        parse({**GOOD, "hosts": hosts, "tick_s": 0.2}, host="h1", source="f")
    assert len(str(caught.value).splitlines()) == 3


def test_plain_links_between_machines_must_be_asked_for() -> None:
    hosts = {**GOOD["hosts"], "h2": {"listen": ["tcp/10.0.0.2:7002"]}}
    config = parse({**GOOD, "hosts": hosts, "insecure": True}, host="h1", source="f")
    assert not config.is_loopback
    assert config.engine_config().insecure


def test_certificates(tmp_path: Path) -> None:
    pytest.importorskip("cryptography", reason="the extra `bridge` is not installed")
    from shmcoord.bridge.keys import generate

    generate(tmp_path / "keys", {"host1": [], "host2": []})
    file = tmp_path / "bridge.toml"
    file.write_text(EXAMPLE.read_text())
    config = load(file, host="host1")
    tls = config.engine_config().tls
    assert tls is not None
    assert tls.key == tmp_path / "keys" / "host1.key"
    mixed = tmp_path / "mixed.toml"
    mixed.write_text(EXAMPLE.read_text() + '[hosts.host9]\nlisten = ["tcp/127.0.0.1:7009"]\n')
    with pytest.raises(BridgeConfigError, match=r"hosts\.host9\.listen: .*all hosts use TLS"):
        load(mixed, host="host1")
    tls.key.chmod(0o640)
    with pytest.raises(BridgeConfigError, match=r"tls\.key: others may read .*chmod 600"):
        load(file, host="host1")
    tls.key.unlink()
    with pytest.raises(BridgeConfigError, match=r"tls\.key: .*No such file"):
        load(file, host="host1")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "bridge.toml"
    with pytest.raises(BridgeConfigError, match="No such file"):
        load(file)
    file.write_text("hosts = [")
    with pytest.raises(BridgeConfigError, match="not TOML"):
        load(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(BridgeConfigError, match="not TOML"):
        load(file)
    file.write_text("folder = '/'")
    with pytest.raises(BridgeConfigError, match="folder"):
        load(file)


def test_two_hosts_of_one_number(monkeypatch: pytest.MonkeyPatch) -> None:
    import shmcoord.origin

    monkeypatch.setattr(shmcoord.origin, "host_id", lambda name: 7)
    with pytest.raises(ShmcoordError, match="h1 and h2 have the same number"):
        check(parse(GOOD, host="h1", source="f"))


def test_an_engine_that_is_not_there() -> None:
    with pytest.raises(ShmcoordError, match="no bridge engine 'pigeons'"):
        check(parse({**GOOD, "engine": "pigeons"}, host="h1", source="f"))
