from typing_extensions import disjoint_base

from shmcoord.liveness import Participant

@disjoint_base
class Doorbell:
    def __new__(cls, participants: list[Participant]) -> Doorbell: ...
    @property
    def fds(self) -> tuple[int, ...]: ...
    def close(self) -> None: ...
