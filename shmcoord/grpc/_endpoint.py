"""Where clients of this host reach a port that a server has opened."""

from __future__ import annotations

__all__ = ["endpoint_of"]

_HERE = ("", "0.0.0.0", "[::]", "::", "*", "localhost", "127.0.0.1")


def endpoint_of(address: str, port: int) -> str:
    """Return the endpoint of an address that was given to `add_insecure_port`.

    Args:
        address: In gRPC's form: `host:port`, `[::]:port`, `ipv4:...`, `dns:///...`, `unix:path`.
        port: The port that it got.

    Returns:
        `127.0.0.1:port` where the server listens on every interface or on this host's own one; a
        Unix socket as it is; any other host with the port.
    """
    if address.startswith(("unix:", "unix-abstract:")):
        return address
    for scheme in ("ipv4:", "ipv6:", "dns:"):
        if address.startswith(scheme):
            address = address.removeprefix(scheme).rpartition("/")[2]
    host = address if address.endswith("]") or ":" not in address else address.rpartition(":")[0]
    if host in _HERE:
        host = "127.0.0.1"
    return f"{host}:{port}"
