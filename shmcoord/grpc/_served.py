"""Who serves: told to the context, and to the current span of OpenTelemetry."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from shmcoord.grpc._common import served_by

if TYPE_CHECKING:
    from shmcoord.lease import Lease

__all__ = ["TRACE", "tell_node", "tell_span"]

TRACE = "opentelemetry.trace"
"""The module: looked for among the loaded ones only, so that who does not use it does not pay."""

_modules = sys.modules


def tell_node(lease: Lease, waited_s: float) -> None:
    """Set `served_by`, and the attributes of the current span, if somebody uses OpenTelemetry."""
    served_by.set(lease.node)
    if TRACE in _modules:
        tell_span(lease.node, lease.group, waited_s)


def tell_span(node: str, group: str, waited_s: float | None = None) -> None:
    """Set the attributes of the current span, if it records; the module `TRACE` must be loaded.

    Args:
        node: Who serves.
        group: Of what group.
        waited_s: How long the call has waited for the node, seconds; None on the serving side.
    """
    span = _modules[TRACE].get_current_span()
    if span.is_recording():
        span.set_attribute("shmcoord.node", node)
        span.set_attribute("shmcoord.group", group)
        if waited_s is not None:
            span.set_attribute("shmcoord.waited_s", waited_s)
