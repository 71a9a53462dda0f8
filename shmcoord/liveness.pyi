from typing import Final

from typing_extensions import Never, Self, disjoint_base

from shmcoord.segment import Mapping

SUSPECT_INTERVALS: Final[int]

@disjoint_base
class Participant:
    def __new__(cls, *args: Never, **kwargs: Never) -> Self: ...
    @property
    def mapping(self) -> Mapping: ...
    @property
    def slot(self) -> int: ...
    @property
    def generation(self) -> int: ...
    @property
    def left(self) -> bool: ...

@disjoint_base
class Judge:
    def __new__(cls, mapping: Mapping) -> Judge: ...
