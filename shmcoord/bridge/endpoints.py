"""Where a bridge listens and connects: `tls/ADDRESS:PORT`, or `tcp/ADDRESS:PORT`."""

from __future__ import annotations

import ipaddress
import re

__all__ = ["NAME", "endpoint_problem", "is_loopback", "is_loopback_address"]

#: Names of hosts and realms: nothing in them means more than itself in a key of an engine.
NAME = re.compile(r"[A-Za-z0-9_-]{1,63}")

_ENDPOINT = re.compile(r"(?P<kind>tls|tcp)/(?P<host>\[[0-9A-Fa-f:.]+\]|[^\[\]/:]+):(?P<port>\d+)")


def endpoint_problem(at: str, *, has_tls: bool, insecure: bool) -> str | None:
    """Return what is wrong with an endpoint and what to do about it, or None.

    Args:
        at: The endpoint.
        has_tls: Whether there are certificates. Who shows none is not heard then, so that a link
            without TLS would carry nothing.
        insecure: Whether addresses that others can reach may go without TLS.
    """
    match = _ENDPOINT.fullmatch(at)
    if match is None or not 0 < int(match["port"]) < 65536:
        return f"{at!r} is not of the form tls/ADDRESS:PORT or tcp/ADDRESS:PORT"
    if match["host"].strip("[]") in ("0.0.0.0", "::", "*"):
        return f"{at!r}: others connect to it, so name an address of the host"
    if match["kind"] == "tls" and not has_tls:
        return f"{at!r}: needs certificates, see [tls] and `shmcoord bridge-keys`"
    if match["kind"] == "tcp" and has_tls:
        return f"{at!r}: there are certificates, so all hosts use TLS (tls/...), or none has [tls]"
    if match["kind"] == "tcp" and not insecure and not is_loopback(at):
        return f"{at!r}: others can reach it, so it needs TLS (tls/...), or insecure = true"
    return None


def is_loopback(at: str) -> bool:
    """Whether an endpoint can be reached from this machine alone."""
    match = _ENDPOINT.fullmatch(at)
    return match is not None and is_loopback_address(match["host"])


def is_loopback_address(host: str) -> bool:
    """Whether a name or an address, an IPv6 one perhaps in brackets, leads to its own machine."""
    host = host.strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
