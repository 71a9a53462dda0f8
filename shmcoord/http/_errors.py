"""Errors of the HTTP transports: each is shmcoord's and httpx's at once.

So `except httpx.HTTPError` around a request catches them, and so does `except shmcoord.Saturated`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx

from shmcoord import course, errors

if TYPE_CHECKING:
    from shmcoord.decision import Candidate
    from shmcoord.router import Router

__all__ = ["NoBackend", "NoneReachable", "Saturated", "as_http"]


class _Looked:
    """Who was looked at, told when asked for.

    Attributes:
        candidates: All nodes of the group, as they are now; none if the router is closed.
    """

    _router: Router | None = None
    _group = ""

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        if self._router is None:
            return ()
        try:
            return self._router.explain(self._group).candidates
        except (errors.ShmcoordError, ValueError):
            return ()


class Saturated(_Looked, errors.Saturated, httpx.PoolTimeout):
    """Every node of the group was at its capacity until the time-out for a connection."""


class NoBackend(_Looked, errors.NoBackend, httpx.ConnectError):
    """There is no node for the request; the message says why for each."""


class NoneReachable(NoBackend, course.NoneReachable):
    """Nodes were tried, and none executed the request; `tried` names them."""


def as_http(
    error: errors.NoBackend | errors.Saturated, router: Router, group: str
) -> NoBackend | Saturated:
    """Return the same error as one of httpx too.

    Args:
        error: As the router or the course of the call raised it.
        router: Which looked for a node.
        group: In which.
    """
    text = str(error)
    same: NoBackend | Saturated
    if isinstance(error, errors.Saturated):
        same = Saturated(text, error.retry_after_s)
    elif isinstance(error, course.NoneReachable):
        same = NoneReachable(text, error.tried)
    else:
        same = NoBackend(text)
    same._router = router
    same._group = group
    return same
