from typing_extensions import disjoint_base

@disjoint_base
class Frozen: ...

@disjoint_base
class RandomSource: ...
