from collections.abc import Callable, Collection
from types import TracebackType
from typing import Any, TypeAlias

from typing_extensions import Self, disjoint_base

from shmcoord.backend import Backend
from shmcoord.budget import RetryBudget
from shmcoord.decision import Candidate
from shmcoord.groups import Groups
from shmcoord.lease import Lease
from shmcoord.picker import NativePolicy
from shmcoord.policy import View
from shmcoord.segment import Mapping
from shmcoord.waiters import Waits

_Key: TypeAlias = str | bytes | int

@disjoint_base
class Ask: ...

@disjoint_base
class Router(Groups):
    def __init__(
        self,
        *segments: str | Mapping,
        policy: str | Callable[[View], Candidate | None] | NativePolicy = "least-loaded",
        seed: int | None = None,
        max_waiters: int = 1024,
        **rules: Any,
    ) -> None: ...
    @property
    def max_waiters(self) -> int: ...
    def acquire(
        self,
        group: str,
        timeout_s: float = 0.0,
        cost: int = 1,
        *,
        key: _Key | None = None,
        explain: bool = False,
        exclude: Collection[Backend] = (),
        idle_only: bool = False,
        waits: Waits | None = None,
    ) -> Lease: ...
    def try_acquire(
        self,
        group: str,
        cost: int = 1,
        *,
        key: _Key | None = None,
        explain: bool = False,
        exclude: Collection[Backend] = (),
    ) -> Lease | None: ...
    async def acquire_async(
        self,
        group: str,
        timeout_s: float = 1.0,
        cost: int = 1,
        *,
        key: _Key | None = None,
        explain: bool = False,
        exclude: Collection[Backend] = (),
        idle_only: bool = False,
    ) -> Lease: ...
    def retry_budget(self, ratio: float = 0.2, burst: float = 100) -> RetryBudget: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None: ...
