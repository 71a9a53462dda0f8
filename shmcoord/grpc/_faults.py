"""Which statuses are the server's fault, so that they count against a node.

Those whose mapping to HTTP is 5xx in `google.rpc.Code` (google/rpc/code.proto): UNKNOWN, INTERNAL
and DATA_LOSS (500), UNAVAILABLE (503), DEADLINE_EXCEEDED (504). UNIMPLEMENTED (501) is left out: it
says something of the method, and another node of the group would say the same.
"""

from __future__ import annotations

import grpc

__all__ = ["is_fault"]

_CODES = (
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
)
# grpcio takes a code as its number as well.
_FAULTS = frozenset((*_CODES, *(code.value[0] for code in _CODES)))


def is_fault(code: object) -> bool:
    """Whether a status (a `grpc.StatusCode` or its number; None: OK) is the server's fault."""
    return code is not None and code in _FAULTS
