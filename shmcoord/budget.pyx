# cython: language_level=3, boundscheck=False, wraparound=False
"""A budget of retries that all routers of a segment share.

Retries multiply load just when there is too much of it, so they are bounded by what requests earn
(as in gRFC A6 and in Finagle's budget). The segment holds one number, the *debt*: thousandths of a
retry that were spent and not earned back yet. Every router moves it by CAS; a router that dies
takes nothing with it.
"""
from libc.stdint cimport uint64_t

from shmcoord._atomics cimport cas_seqcst_u64, load_relaxed_u64
from shmcoord.segment cimport Mapping

from shmcoord.errors import SegmentForbidden

# The largest `burst`, in thousandths.
cdef uint64_t _DEBT_MAX = 10**12


cdef class RetryBudget:
    """Whether one more retry may be made.

    Args:
        segments: one, or a router's list: its first one holds the budget, also after that segment
            was made anew.
        ratio: retries that each request earns, 0 to 10.
        burst: retries that may be made before any were earned, 0 to 10^9. Routers that give
            different bounds still move the same number.
    """

    cdef list segments
    cdef uint64_t earned, most

    def __init__(self, segments, double ratio=0.2, double burst=100):
        if not 0 <= ratio <= 10:
            raise ValueError(f"ratio must be between 0 and 10, not {ratio}")
        if not 0 <= burst <= 1e9:
            raise ValueError(f"burst must be between 0 and 1e9, not {burst}")
        self.segments = [segments] if isinstance(segments, Mapping) else segments
        self.mapping()
        self.earned = <uint64_t>(ratio * 1000)
        self.most = <uint64_t>(burst * 1000)

    cdef Mapping mapping(self):
        cdef Mapping found = <Mapping?>self.segments[0]
        found.check()
        if not found.m.writable:
            raise SegmentForbidden(f"segment {found.name} is attached read-only")
        return found

    def earn(self):
        """Count one request; one load where nothing is owed."""
        cdef uint64_t debt, left
        cdef Mapping mapping = self.mapping()
        while True:
            debt = load_relaxed_u64(&mapping.m.sync.retry_debt)
            # More than any router may owe is nonsense: requests would never earn it back.
            left = debt - min(debt, self.earned) if debt <= _DEBT_MAX else 0
            if debt == left or cas_seqcst_u64(&mapping.m.sync.retry_debt, debt, left):
                return

    def spend(self):
        """Take one retry; False if the budget is spent."""
        cdef uint64_t debt
        cdef Mapping mapping = self.mapping()
        while True:
            debt = load_relaxed_u64(&mapping.m.sync.retry_debt)
            # What others wrote there is bounded before it is used.
            if debt > self.most or debt + 1000 > self.most:
                return False
            if cas_seqcst_u64(&mapping.m.sync.retry_debt, debt, debt + 1000):
                return True

    @property
    def left(self):
        """Retries that may be made now."""
        cdef uint64_t debt
        cdef Mapping mapping = self.mapping()
        debt = load_relaxed_u64(&mapping.m.sync.retry_debt)
        return (self.most - debt) / 1000.0 if debt < self.most else 0.0
