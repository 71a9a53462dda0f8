"""Plug-ins for HTTP: an ASGI middleware publishes load, an httpx transport routes by it.

    app = shmcoord.http.Middleware(app, node="web-1", segment="shm_host1", group="GREEN",
                                   endpoint="127.0.0.1:8001")
    client = httpx.Client(transport=shmcoord.http.Transport("shm_host1", group="GREEN"))

The middleware needs nothing but an ASGI server; the transports and their errors need httpx
(`pip install shmcoord[http]`), which is imported when they are first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shmcoord.http._middleware import Middleware

if TYPE_CHECKING:
    from shmcoord.http._async_transport import AsyncTransport
    from shmcoord.http._errors import NoBackend, NoneReachable, Saturated
    from shmcoord.http._transport import Transport

__all__ = [
    "AsyncTransport",
    "Middleware",
    "NoBackend",
    "NoneReachable",
    "Saturated",
    "Transport",
]

_LAZY = {
    "AsyncTransport": "shmcoord.http._async_transport",
    "NoBackend": "shmcoord.http._errors",
    "NoneReachable": "shmcoord.http._errors",
    "Saturated": "shmcoord.http._errors",
    "Transport": "shmcoord.http._transport",
}


if not TYPE_CHECKING:  # or a type checker would believe in every name

    def __getattr__(name: str) -> object:
        """Import what needs httpx at its first use."""
        import importlib

        if name not in _LAZY:
            raise AttributeError(f"module 'shmcoord.http' has no attribute {name!r}")
        try:
            import httpx  # noqa: F401
        except ModuleNotFoundError as missing:
            raise ModuleNotFoundError(
                f"shmcoord.http.{name} needs httpx: pip install shmcoord[http]", name=missing.name
            ) from missing
        return getattr(importlib.import_module(_LAZY[name]), name)
