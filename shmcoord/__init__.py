"""Processes of a host share their live load in shared memory.

Serving side: `Segment.open(name).join(...)` and `with node.request():`. Routing side:
`Router(name).acquire(group)`. See README.md; the bytes are in docs/layout.md.
"""

from __future__ import annotations

try:
    from shmcoord.api import Segment
    from shmcoord.backend import Backend
    from shmcoord.lease import Lease
    from shmcoord.node import Node, Request
    from shmcoord.router import Router
    from shmcoord.segment import segments
    from shmcoord.status import Health, State, Status
except ModuleNotFoundError as _error:
    if (_error.name or "").startswith("shmcoord"):
        raise ModuleNotFoundError(
            "shmcoord's native modules are not built here; build them with "
            "`pip install -e .` (or `make build`) in the checkout",
            name=_error.name,
        ) from None
    raise

from shmcoord.errors import (
    ForkedHandle,
    LayoutMismatch,
    LeaseLost,
    LeaseReleased,
    NoBackend,
    NodeExists,
    NodeNotFound,
    Saturated,
    SegmentCorrupt,
    SegmentForbidden,
    SegmentFull,
    SegmentNotFound,
    ShmcoordError,
)

TYPE_CHECKING = False  # as of typing, which costs a third of a MiB to import
if TYPE_CHECKING:
    from shmcoord import grpc as grpc
    from shmcoord import http as http
    from shmcoord import transport as transport
    from shmcoord.decision import Candidate, Decision
    from shmcoord.dispatch import AsyncDispatcher, Dispatcher, NoneReachable
    from shmcoord.policy import POLICIES

__version__ = "0.1.0"

__all__ = [
    "POLICIES",
    "AsyncDispatcher",
    "Backend",
    "Candidate",
    "Decision",
    "Dispatcher",
    "ForkedHandle",
    "Health",
    "LayoutMismatch",
    "Lease",
    "LeaseLost",
    "LeaseReleased",
    "NoBackend",
    "Node",
    "NodeExists",
    "NodeNotFound",
    "NoneReachable",
    "Request",
    "Router",
    "Saturated",
    "Segment",
    "SegmentCorrupt",
    "SegmentForbidden",
    "SegmentFull",
    "SegmentNotFound",
    "ShmcoordError",
    "State",
    "Status",
    "__version__",
    "get_include",
    "segments",
]

# Loaded when first asked for: `import shmcoord` is to cost little.
_LAZY = {
    "AsyncDispatcher": "shmcoord.dispatch",
    "Dispatcher": "shmcoord.dispatch",
    "NoneReachable": "shmcoord.dispatch",
    "Candidate": "shmcoord.decision",
    "Decision": "shmcoord.decision",
    "POLICIES": "shmcoord.policy",
    "grpc": "shmcoord.grpc",
    "http": "shmcoord.http",
    "transport": "shmcoord.transport",
}


if not TYPE_CHECKING:  # or a type checker would believe in every name

    def __getattr__(name: str) -> object:
        """Import what is rarely needed at its first use."""
        import importlib

        if name not in _LAZY:
            raise AttributeError(f"module 'shmcoord' has no attribute {name!r}")
        module = importlib.import_module(_LAZY[name])
        return module if _LAZY[name] == f"shmcoord.{name}" else getattr(module, name)


def get_include() -> str:
    """Directory of the headers `_atomics.h` and `_layout.h`, for native code that cimports us."""
    import os

    return os.path.dirname(__file__)
