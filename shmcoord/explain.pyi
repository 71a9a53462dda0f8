from typing_extensions import disjoint_base

from shmcoord.decision import Candidate as Candidate
from shmcoord.policy import View as View

@disjoint_base
class Frozen: ...
