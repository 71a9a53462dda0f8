"""Who may talk to the cluster: TLS with and without certificates of clients, Unix sockets."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import grpc.aio
import pytest
from certificates import make_authority, make_certificate, need_openssl, openssl
from click.testing import CliRunner
from cluster_helpers import ROOT, Running, matching, query, write_config, write_rows
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from servers import config
from servers.cli import main
from servers.links import PLAIN, LinkError, Links, client_links, links_of, listen

OK, UNAVAILABLE = grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, and certificates that exist for this test only."""
    need_openssl()
    folder = tmp_path_factory.mktemp("links")
    write_rows(folder)
    make_authority(folder, "ca")
    make_authority(folder, "other_ca")
    make_certificate(folder, "ca", "cluster", "IP:127.0.0.1,DNS:localhost,DNS:cluster.internal")
    make_certificate(folder, "ca", "client", "DNS:client")
    make_certificate(folder, "other_ca", "stranger", "IP:127.0.0.1,DNS:localhost")
    return folder


def tls(certificate: str = "cluster", **more: object) -> list[str]:
    lines = ["[tls]", 'ca = "ca.pem"']
    lines += [f'certificate = "{certificate}.pem"', f'key = "{certificate}.key"']
    return lines + [f"{key} = {value}" for key, value in more.items()]


@contextlib.asynccontextmanager
async def served(file: Path, name: str = "A") -> AsyncIterator[config.Cluster]:
    """A node's server with nothing behind it."""
    cluster = config.load(file)
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    listen(server, cluster, name)
    await server.start()
    try:
        yield cluster
    finally:
        await server.stop(None)


async def asked(endpoint: str, links: Links) -> grpc.StatusCode:
    async with links.channel(endpoint, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        call = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), timeout=10
        )
        return await call.code()


@pytest.fixture(scope="module")
def kinds(folder: Path) -> dict[str, Links]:
    ca, other_ca = folder / "ca.pem", folder / "other_ca.pem"
    client = folder / "client.pem", folder / "client.key"
    stranger = folder / "stranger.pem", folder / "stranger.key"
    return {
        "with a certificate": client_links(ca, *client),
        "with the cluster's name": client_links(ca, *client, "cluster.internal"),
        "without a certificate": client_links(ca, None, None),
        "with somebody else's": client_links(ca, *stranger),
        "without TLS": PLAIN,
        "who trusts others": client_links(other_ca, *client),
        "with a wrong name": client_links(ca, *client, "elsewhere.internal"),
    }


@pytest.mark.parametrize("require", ["true", "false"])
async def test_who_is_let_in(
    folder: Path, kinds: dict[str, Links], require: str, report: Callable[..., None]
):
    mutual = require == "true"
    welcome = {"with a certificate", "with the cluster's name"}
    if not mutual:
        welcome |= {"without a certificate", "with somebody else's"}  # it is not asked for one
    lines = tls(require_client_certificate=require)
    file = write_config(folder, {"A": "GREEN"}, secret=False, more=lines)
    async with served(file) as cluster:
        codes = {kind: await asked(cluster.endpoint("A"), links) for kind, links in kinds.items()}
        assert codes == {kind: OK if kind in welcome else UNAVAILABLE for kind in kinds}
        assert await asked(cluster.endpoint("A"), links_of(cluster)) is OK
    report(
        "TLS, certificates of clients " + ("required" if mutual else "not required"),
        let_in=sorted(welcome),
        refused_with_UNAVAILABLE=sorted(set(kinds) - welcome),
    )


async def test_a_node_with_somebody_else_s_certificate_is_not_talked_to(
    folder: Path, kinds: dict[str, Links]
):
    """A port that another process took gets none of the requests."""
    lines = tls("stranger", require_client_certificate="false")
    file = write_config(folder, {"A": "GREEN"}, secret=False, more=lines)
    async with served(file) as cluster:
        assert await asked(cluster.endpoint("A"), kinds["with a certificate"]) is UNAVAILABLE
        assert (
            await asked(cluster.endpoint("A"), client_links(folder / "other_ca.pem", None, None))
            is OK
        )


@pytest.mark.parametrize(
    ("key", "file", "says"),
    [
        ("ca", "none.pem", "none.pem: cannot be read: No such file"),
        ("certificate", "none.pem", "none.pem"),
        ("key", "none.key", "none.key: cannot be read"),
        ("ca", "client.key", "client.key: cannot be used"),
        ("certificate", "rows.csv", "rows.csv"),
        ("key", "stranger.key", "KEY_VALUES_MISMATCH"),
        ("key", "locked.key", "locked.key: cannot be used"),
    ],
)
async def test_a_bad_file_is_named(folder: Path, key: str, file: str, says: str):
    if file == "locked.key":
        openssl(
            "ec",
            "-in",
            "cluster.key",
            "-aes128",
            "-passout",
            "pass:secret",
            "-out",
            file,
            folder=folder,
        )
    lines = [line if not line.startswith(f"{key} =") else f'{key} = "{file}"' for line in tls()]
    cluster = config.load(write_config(folder, {"A": "GREEN"}, secret=False, more=lines))
    with pytest.raises(config.ConfigError, match=says):
        links_of(cluster)
    with pytest.raises(config.ConfigError, match=says):
        listen(grpc.aio.server(), cluster, "A")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "servers", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


async def test_a_cluster_of_mutual_tls_and_sockets(folder: Path, report: Callable[..., None]):
    """Every link of real processes, one of them over TLS on a Unix socket; and the commands."""
    (folder / "run").mkdir(mode=0o700)
    file = write_config(
        folder,
        {"A": "GREEN", "E": "PINK"},
        secret=False,
        sockets={"E": "run/E.sock"},
        more=tls(require_client_certificate="true", server_name='"cluster.internal"'),
    )
    running = Running(file)
    try:
        running.start("A", "E")
        answer = await query(running, "code0001")
        assert answer.summary.matched == len(matching(["code0001"]))
        assert [part.node for part in answer.summary.parts] == ["A", "E"]
        for name in ("A", "E"):
            nobody = client_links(folder / "ca.pem", None, None, "cluster.internal")
            assert await asked(running.cluster.endpoint(name), nobody) is UNAVAILABLE
            assert await asked(running.cluster.endpoint(name), PLAIN) is UNAVAILABLE
        command = ("query", "--server", running.gateway, "--query", "code0001")
        ca = ("--ca", folder / "ca.pem")
        own = ("--cert", folder / "client.pem", "--key", folder / "client.key")
        assert run(*command, *ca, *own).returncode == 0
        refused = run(*command, *ca)
        assert refused.returncode == 1
        assert "UNAVAILABLE" in refused.stderr
        assert "Traceback" not in refused.stderr
        assert run("status", "--config", file).returncode == 0
        # Killed, it leaves its socket behind; the next one takes it over, and only then.
        taken = run("node", "E", "--config", file)
        assert taken.returncode == 1
        assert "the socket is taken" in taken.stderr
        running.kill("E")
        assert (folder / "run" / "E.sock").is_socket()
        running.start("E")
        answer = await query(running, "code0001")
        assert [part.node for part in answer.summary.parts] == ["A", "E"]
    finally:
        codes = running.stop()
    assert codes == {"A": 0, "E": 0}
    assert list((folder / "run").iterdir()) == []
    report("mutual TLS and Unix sockets", "all links of a cluster of processes")


@pytest.mark.parametrize(
    "options", [("--cert", "c", "--key", "k"), ("--ca", "a", "--key", "k"), ("--server-name", "n")]
)
def test_options_that_say_half_are_refused(options: tuple[str, ...]):
    result = CliRunner().invoke(main, ["query", *options])
    assert result.exit_code == 2
    assert "belong together" in result.output


# --- the folder of a socket


def socket_cluster(folder: Path, socket: str) -> config.Cluster:
    return config.load(write_config(folder, {"A": "GREEN"}, secret=False, sockets={"A": socket}))


@pytest.mark.parametrize("mode", [0o755, 0o750, 0o777, 0o1777, 0o710, 0o701])
async def test_a_folder_that_others_get_into_is_refused(tmp_path: Path, mode: int):
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(mode)
    with pytest.raises(LinkError, match=rf"mode {mode:04o}, must have 0700"):
        listen(grpc.aio.server(), socket_cluster(tmp_path, "run/A"), "A")
    assert not (tmp_path / "run" / "A").exists()


async def test_a_folder_that_is_none_of_ours_is_refused(tmp_path: Path):
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "file").touch(mode=0o700)
    for name, says in (("none", "No such file"), ("link", "link"), ("file", "no directory")):
        with pytest.raises(LinkError, match=says):
            listen(grpc.aio.server(), socket_cluster(tmp_path, f"{name}/A"), "A")
    if os.geteuid() == 0:
        os.chown(tmp_path / "real", 12345, -1)
        with pytest.raises(LinkError, match="belongs to user 12345"):
            listen(grpc.aio.server(), socket_cluster(tmp_path, "real/A"), "A")


async def test_a_socket_is_taken_over_only_from_the_dead(tmp_path: Path):
    (tmp_path / "run").mkdir(mode=0o700)
    cluster = socket_cluster(tmp_path, "run/A")
    (tmp_path / "run" / "A").write_text("dear")
    with pytest.raises(LinkError, match="no socket"):
        listen(grpc.aio.server(), cluster, "A")
    assert (tmp_path / "run" / "A").read_text() == "dear"
    (tmp_path / "run" / "A").unlink()
    async with served(
        write_config(tmp_path, {"A": "GREEN"}, secret=False, sockets={"A": "run/A"})
    ) as cluster:
        assert await asked(cluster.endpoint("A"), PLAIN) is OK
        with pytest.raises(LinkError, match="the socket is taken"):
            listen(grpc.aio.server(), cluster, "A")
        assert await asked(cluster.endpoint("A"), PLAIN) is OK
