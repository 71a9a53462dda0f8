from typing import NamedTuple

from typing_extensions import disjoint_base

from shmcoord.segment import Mapping

class Member(NamedTuple):
    slot: int
    generation: int
    node: str
    group: str
    endpoint: str
    capacity: int
    weight: float
    gauges: list[str]
    slow_start_s: float

def host_id(host: str) -> int: ...

@disjoint_base
class Origin:
    def __new__(cls, mapping: Mapping) -> Origin: ...
    @property
    def incarnation(self) -> int: ...
    def mark(self) -> int: ...
    def members(self) -> list[Member]: ...
    def entries(self, full: bool) -> bytes: ...
