from libc.stdint cimport uint32_t, uint64_t

from shmcoord.picker cimport pick_t, policy_t
from shmcoord.table cimport Rules, Table


cdef enum:
    NO_SKIP = 0xFFFFFFFF  # no attempt has this number: nothing is skipped


cdef uint64_t hash_of(key) except? 0


cdef class Groups:
    cdef list segments      # of Mapping
    cdef list judges        # beside `segments`
    cdef dict tables        # group -> Table, valid for `epochs`
    cdef uint64_t* epochs
    cdef uint32_t count
    cdef str last_group
    cdef Table last_table
    cdef Rules rules
    cdef dict unreachable   # Backend -> ns until which it is passed over
    cdef dict watches       # Backend -> Watch
    cdef readonly str policy
    cdef policy_t scan      # NULL: `asked` is a policy in Python
    cdef object asked
    cdef uint64_t rng
    cdef uint32_t attempt
    cdef uint64_t now_ns    # of the coarse clock, at the last `table_of`
    cdef uint64_t stale_at_ns
    cdef bint is_closed

    cdef int _open(self, tuple segments, object policy, object seed, dict rules) except -1
    cdef Table table_of(self, group)
    cdef Table _rebuild(self, str group)
    cdef int _check(self) except -1
    cdef int _look_for_stale(self, uint64_t now_ns) except -1
    cdef int _has_moved(self, uint32_t i) except -1
    cdef int _choose(self, Table table, const pick_t* pick) except -2
    cdef bint _is_gated(self, Table table, int index)
    cdef uint32_t _next_skip(self) noexcept
    cdef tuple _decide(self, Table table, str group, const pick_t* pick, object exclude,
                       bint is_real)
