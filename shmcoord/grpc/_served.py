"""Who served: told to the caller's context, and to the current span of OpenTelemetry."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from shmcoord.grpc._common import served_by

if TYPE_CHECKING:
    from shmcoord.lease import Lease

__all__ = ["TRACE", "tell_node"]

TRACE = "opentelemetry.trace"
"""The module whose presence says that somebody uses OpenTelemetry."""

_modules = sys.modules


def tell_node(lease: Lease, waited_s: float) -> None:
    """Set `served_by`, and the attributes of the current span if it records.

    OpenTelemetry is used only where somebody has imported it.
    """
    served_by.set(lease.node)
    if TRACE in _modules:
        _tell_span(lease, waited_s)


def _tell_span(lease: Lease, waited_s: float) -> None:
    span = _modules[TRACE].get_current_span()
    if span.is_recording():
        span.set_attribute("shmcoord.node", lease.node)
        span.set_attribute("shmcoord.group", lease.group)
        span.set_attribute("shmcoord.waited_s", waited_s)
