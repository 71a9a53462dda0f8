from collections.abc import Collection
from types import TracebackType

from typing_extensions import Self, disjoint_base

from shmcoord.backend import Backend
from shmcoord.decision import Decision
from shmcoord.lease import Lease
from shmcoord.segment import Mapping

@disjoint_base
class Router:
    def __init__(
        self, *segments: str | Mapping, policy: str = "least-loaded", seed: int | None = None
    ) -> None: ...
    @property
    def policy(self) -> str: ...
    @property
    def closed(self) -> bool: ...
    def pick(self, group: str) -> Backend: ...
    def explain(self, group: str) -> Decision: ...
    def acquire(
        self,
        group: str,
        timeout_s: float = 0.0,
        cost: int = 1,
        *,
        explain: bool = False,
        exclude: Collection[Backend] = (),
    ) -> Lease: ...
    async def acquire_async(
        self,
        group: str,
        timeout_s: float = 1.0,
        cost: int = 1,
        *,
        explain: bool = False,
        exclude: Collection[Backend] = (),
    ) -> Lease: ...
    def mark_unreachable(self, backend: Backend, for_s: float = 1.0) -> None: ...
    def mark_reachable(self, backend: Backend) -> None: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None: ...
