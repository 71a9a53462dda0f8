"""Telling the caller's context, and its trace, which node serves."""

from __future__ import annotations

import sys

from shmcoord.grpc._common import served_by

__all__ = ["tell"]


def tell(node: str, group: str) -> None:
    """Note the node of the call in the current context, and in its span if there is one.

    OpenTelemetry is looked for among the loaded modules only: who does not use it does not pay.
    """
    served_by.set(node)
    trace = sys.modules.get("opentelemetry.trace")
    if trace is not None:
        span = trace.get_current_span()
        if span.is_recording():
            span.set_attribute("shmcoord.node", node)
            span.set_attribute("shmcoord.group", group)
