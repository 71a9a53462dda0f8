"""What a caller of gRPC is told when there is no node for the call: a status with details.

`Saturated` becomes RESOURCE_EXHAUSTED, with the time after which to try again; `NoBackend` becomes
UNAVAILABLE. Both carry a `google.rpc.Status` whose `ErrorInfo` lists the state of each node
(https://google.aip.dev/193); `grpc_status.rpc_status.from_call` reads it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status as RpcStatus

from shmcoord.course import NoneReachable
from shmcoord.errors import NoBackend, Saturated, ShmcoordError
from shmcoord.grpc._common import PUSHBACK_KEY, STATUS_KEY

if TYPE_CHECKING:
    from shmcoord.router import Router

__all__ = ["Refusal", "refusal"]

DOMAIN = "shmcoord"
# Metadata is limited, to 8 KiB by default.
_NODES_LISTED = 32
_MESSAGE_CHARACTERS = 1024


class Refusal(NamedTuple):
    """A status that was made here, not by a server.

    Attributes:
        code: Its code.
        details: Its message.
        trailing: Its trailing metadata: pairs of key and value.
    """

    code: grpc.StatusCode
    details: str
    trailing: tuple[tuple[str, str | bytes], ...] = ()


def refusal(
    error: ShmcoordError | TimeoutError, router: Router | None = None, group: str = ""
) -> Refusal:
    """Return the status for an error of the routing side.

    Args:
        error: Why there is no node for the call.
        router: Tells the state of each node of the group; None: none is listed.
        group: What was asked for.
    """
    if isinstance(error, TimeoutError):
        return Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, str(error))
    if not isinstance(error, (NoBackend, Saturated)):
        return Refusal(grpc.StatusCode.UNAVAILABLE, str(error))
    retry_after_s = error.retry_after_s if isinstance(error, Saturated) else None
    code, reason = (
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "SATURATED")
        if isinstance(error, Saturated)
        else (grpc.StatusCode.UNAVAILABLE, "NO_BACKEND")
    )
    # Cut for both: from_call refuses a status whose message is not that of the call.
    text = str(error)[:_MESSAGE_CHARACTERS]
    info = ErrorInfo(reason=reason, domain=DOMAIN, metadata=_states(router, group))
    if isinstance(error, NoneReachable):
        info.reason = "NONE_REACHABLE"
    details = [info]
    status = RpcStatus(code=code.value[0], message=text)
    trailing: list[tuple[str, str | bytes]] = []
    if retry_after_s is not None:
        retry = RetryInfo()
        retry.retry_delay.FromNanoseconds(round(retry_after_s * 1e9))
        details.append(retry)
        trailing.append((PUSHBACK_KEY, str(max(1, round(retry_after_s * 1e3)))))
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    trailing.append((STATUS_KEY, status.SerializeToString()))
    return Refusal(code, text, tuple(trailing))


def _states(router: Router | None, group: str) -> dict[str, str]:
    """What each node of the group is doing: `{"B": "BUSY, queue 4 of 4"}`."""
    if router is None:
        return {}
    try:
        candidates = router.explain(group).candidates
    except (ShmcoordError, ValueError):  # closed meanwhile, or its segment is gone
        return {}
    states = {"group": group}
    for candidate in candidates[:_NODES_LISTED]:
        text = f"{candidate.state.name}, queue {candidate.queue} of {candidate.capacity}"
        if candidate.health:  # ALIVE is what one expects
            text += f", {candidate.health.name}"
        if candidate.passed_over:
            text += f" ({candidate.passed_over})"
        states[f"node.{candidate.node}"] = text
    if len(candidates) > _NODES_LISTED:
        states["more"] = str(len(candidates) - _NODES_LISTED)
    return states
