from shmcoord.decision import PastDecision
from shmcoord.segment import Mapping

def read_decisions(mapping: Mapping, group: str | None = None) -> list[PastDecision]: ...
