from types import TracebackType
from typing import Final

from typing_extensions import Never, Self, disjoint_base

from shmcoord.backend import Backend
from shmcoord.decision import Decision

COST_MAX: Final[int]

@disjoint_base
class Lease:
    decision: Decision | None
    def __new__(cls, *args: Never, **kwargs: Never) -> Self: ...
    @property
    def backend(self) -> Backend: ...
    @property
    def cost(self) -> int: ...
    @property
    def released(self) -> bool: ...
    @property
    def node(self) -> str: ...
    @property
    def group(self) -> str: ...
    @property
    def endpoint(self) -> str: ...
    @property
    def token(self) -> str: ...
    def release(self) -> bool: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None: ...
