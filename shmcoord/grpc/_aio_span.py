"""Telling a trace which node serves."""

from __future__ import annotations

import sys

__all__ = ["TRACE", "tell_span"]

TRACE = "opentelemetry.trace"
"""The module: looked for among the loaded ones only, so that who does not use it does not pay."""


def tell_span(node: str, group: str) -> None:
    """Note the node of a call in the current span, if one is recorded."""
    span = sys.modules[TRACE].get_current_span()
    if span.is_recording():
        span.set_attribute("shmcoord.node", node)
        span.set_attribute("shmcoord.group", group)
