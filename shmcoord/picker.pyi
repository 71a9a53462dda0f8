from typing_extensions import disjoint_base

from shmcoord.policy import POLICIES as POLICIES

@disjoint_base
class NativePolicy:
    @property
    def name(self) -> str: ...
