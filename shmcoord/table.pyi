from collections.abc import Iterable

from typing_extensions import disjoint_base

@disjoint_base
class Rules:
    def __init__(
        self,
        *,
        local: str | Iterable[str] | None = None,
        remote_margin: float = 1.0,
        panic_threshold: float = 0.2,
        eject_after: int = 5,
        eject_s: float = 5.0,
        hot_quantile: float = 0.84,
        affinity_bound: float = 1.25,
    ) -> None: ...
    @property
    def panic_threshold(self) -> float: ...
    @property
    def remote_margin(self) -> float: ...
    @property
    def hot_quantile(self) -> float: ...
    @property
    def affinity_bound(self) -> float: ...
    @property
    def eject_s(self) -> float: ...
    @property
    def eject_after(self) -> int: ...
    @property
    def local(self) -> frozenset[str] | None: ...

@disjoint_base
class Watch: ...

@disjoint_base
class Table:
    @property
    def is_slow(self) -> bool: ...
    @property
    def is_panic(self) -> bool: ...
