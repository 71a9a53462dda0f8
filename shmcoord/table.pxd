from libc.stdint cimport uint32_t, uint64_t

from shmcoord.picker cimport candidates_t


# Why a candidate has a penalty.
cdef enum:
    PASSED_NOT = 0
    PASSED_SUSPECT = 1
    PASSED_UNREACHABLE = 2
    PASSED_EJECTED = 3


cdef class Rules:
    cdef readonly double panic_threshold, remote_margin, hot_quantile, affinity_bound, eject_s
    cdef readonly uint32_t eject_after
    cdef readonly frozenset local


cdef class Watch:
    cdef uint64_t first_seen_ns, seen_ns, served, failed
    cdef double recent, recent_failed
    cdef uint64_t ejected_until_ns
    cdef double ejected_s        # how long the last time
    cdef uint32_t times          # ejections without a good time in between
    cdef uint32_t forgiven       # failures in a row when it came back
    cdef void note(self, uint64_t served, uint64_t failed, uint64_t now_ns) noexcept
    cdef bint fails(self, uint32_t in_row, double others, Rules rules) noexcept


cdef class Table:
    cdef candidates_t candidates
    cdef Rules rules
    cdef list backends
    cdef list judges        # one per segment of the router
    cdef list watches       # beside `backends`
    cdef double* shares     # beside the candidates: 1, or less while one starts slowly
    cdef double* inverses   # beside the candidates: 1 / weight
    cdef uint32_t* marks    # beside the candidates: failures in a row that make us judge at once
    cdef int* why           # beside the candidates: PASSED_*
    cdef readonly bint is_slow   # whether any share is below 1
    cdef readonly bint is_panic  # too few are without penalty: penalties do not count
    cdef uint64_t group_hash
    cdef uint64_t judge_at_ns
    cdef uint64_t judge_every_ns
    cdef void judge(self, uint64_t now_ns, dict unreachable) except *

cdef Table make_table(list backends, list segments_of, list judges, Rules rules, dict watches,
                      uint64_t group_hash, uint64_t* rng, Table before)
