"""How the processes of a cluster reach each other: plainly, with TLS, over Unix sockets."""

import errno
import os
import socket
import ssl
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from servers.config import Cluster, ConfigError, TlsSettings

UNIX = "unix:"
_CONNECT_S = 1.0


class LinkError(Exception):
    """A node cannot listen where it shall; the message says why."""


class Links:
    """Opens channels. Without arguments they are plain.

    Args:
        credentials: TLS, and who we are.
        server_name: the name that the servers' certificate must have instead of their address.
    """

    def __init__(
        self, credentials: grpc.ChannelCredentials | None = None, server_name: str | None = None
    ) -> None:
        self.credentials = credentials
        self.options: list[tuple[str, Any]] = []
        if server_name is not None:
            self.options.append(("grpc.ssl_target_name_override", server_name))

    def channel(self, endpoint: str, options: Sequence[tuple[str, Any]] = ()) -> grpc.aio.Channel:
        """A channel to an endpoint."""
        options = [*options, *self.options]
        if self.credentials is None:
            return grpc.aio.insecure_channel(endpoint, options)
        return grpc.aio.secure_channel(endpoint, self.credentials, options)


PLAIN = Links()


def links_of(cluster: Cluster) -> Links:
    """The links between a cluster's processes.

    Raises:
        ConfigError: a file of its [tls] cannot be used.
    """
    if cluster.tls is None:
        return PLAIN
    tls, folder = cluster.tls, cluster.folder
    return client_links(
        folder / tls.ca, folder / tls.certificate, folder / tls.key, tls.server_name
    )


def client_links(
    ca: Path, certificate: Path | None, key: Path | None, server_name: str | None = None
) -> Links:
    """Links with TLS; with certificate and key also the servers know who we are.

    Raises:
        ConfigError: a file cannot be used.
    """
    _check(ca, certificate, key)
    credentials = grpc.ssl_channel_credentials(
        ca.read_bytes(), key.read_bytes() if key else None, _bytes(certificate)
    )
    return Links(credentials, server_name)


def listen(server: grpc.aio.Server, cluster: Cluster, name: str) -> None:
    """Binds a node's server to its endpoint, with TLS if the cluster has it.

    Raises:
        LinkError: the endpoint is taken or not to be had.
        ConfigError: a file of [tls] cannot be used.
    """
    endpoint = cluster.endpoint(name)
    credentials = None if cluster.tls is None else _server_credentials(cluster.folder, cluster.tls)
    if endpoint.startswith(UNIX):
        _make_way(Path(endpoint.removeprefix(UNIX)))
    try:
        if credentials is None:
            bound = server.add_insecure_port(endpoint)
        else:
            bound = server.add_secure_port(endpoint, credentials)
    except RuntimeError:
        bound = 0
    if not bound:
        raise LinkError(
            f"cannot listen on {endpoint}: the port is taken, or the address is not of this host"
        )


def _server_credentials(folder: Path, tls: TlsSettings) -> grpc.ServerCredentials:
    ca, certificate, key = folder / tls.ca, folder / tls.certificate, folder / tls.key
    _check(ca, certificate, key)
    return grpc.ssl_server_credentials(
        [(key.read_bytes(), certificate.read_bytes())],
        root_certificates=ca.read_bytes(),
        require_client_auth=tls.require_client_certificate,
    )


def _check(ca: Path, certificate: Path | None, key: Path | None) -> None:
    """Reads the files as OpenSSL does: gRPC itself does not say what is wrong with them."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        where = str(ca)
        context.load_verify_locations(ca)
        if certificate is not None and key is not None:
            where = f"{certificate}, {key}"
            # A key that is locked by a password must not make us ask for it.
            context.load_cert_chain(certificate, key, password=lambda: b"")
    except ssl.SSLError as error:
        reason = error.reason or str(error)
        raise ConfigError("tls", [f"{where}: cannot be used: {reason}"]) from None
    except OSError as error:
        raise ConfigError("tls", [f"{where}: cannot be read: {error.strerror}"]) from None


def _bytes(file: Path | None) -> bytes | None:
    return file.read_bytes() if file else None


def _make_way(path: Path) -> None:
    """Checks that a Unix socket can be made, and removes one that nobody listens on any more.

    Raises:
        LinkError: others could get at the socket, or somebody listens on it.
    """
    _check_folder(path.parent)
    try:
        kind = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise LinkError(f"cannot listen on {UNIX}{path}: there is a file that is no socket")
    if is_taken(path):
        raise LinkError(f"cannot listen on {UNIX}{path}: the socket is taken")
    path.unlink(missing_ok=True)


def _check_folder(folder: Path) -> None:
    try:
        status = folder.lstat()
    except OSError as error:
        raise LinkError(f"the folder of a socket, {folder}: {error.strerror}") from None
    if not stat.S_ISDIR(status.st_mode):
        raise LinkError(f"the folder of a socket, {folder}, is no directory (nor may it be a link)")
    if status.st_uid != os.geteuid():
        raise LinkError(f"the folder of a socket, {folder}, belongs to user {status.st_uid}")
    mode = stat.S_IMODE(status.st_mode)
    if mode != 0o700:
        raise LinkError(
            f"the folder of a socket, {folder}, has the mode {mode:04o}, must have 0700: "
            "whoever gets into it can send requests"
        )


def is_taken(path: Path) -> bool:
    """Whether somebody listens on a Unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_CONNECT_S)
        return probe.connect_ex(str(path)) not in (errno.ECONNREFUSED, errno.ENOENT)
