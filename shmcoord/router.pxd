from libc.stdint cimport uint32_t, uint64_t

from shmcoord.backend cimport Backend
from shmcoord.lease cimport Lease
from shmcoord.picker cimport Table, candidate_t, policy_t


cdef class Router:
    cdef list segments      # of Mapping
    cdef list participants  # Participant or None, beside `segments`
    cdef list judges
    cdef dict tables        # group -> Table, valid for `epochs`
    cdef uint64_t* epochs
    cdef uint32_t count
    cdef str last_group
    cdef Table last_table
    cdef dict unreachable   # Backend -> ns until which it is passed over
    cdef readonly str policy
    cdef policy_t scan
    cdef uint64_t rng
    cdef uint32_t attempt
    cdef uint64_t stale_at_ns
    cdef bint is_closed
    cdef bint owns_segments
    cdef object waiting     # WaitQueue, made at the first wait
    cdef object __weakref__

    cdef Table table_of(self, group)
    cdef Table _rebuild(self, str group)
    cdef int _check(self) except -1
    cdef int _look_for_stale(self, uint64_t now_ns) except -1
    cdef Lease _attempt(self, str group, uint32_t cost, bint explain, object exclude)
    cdef tuple _decide(self, Table table, str group, uint32_t skip, object exclude)
    cdef str _reason(self, const candidate_t* c, Backend backend, bint is_chosen, int health,
                     double age_s, uint64_t word, double score, double best, uint32_t skip,
                     object exclude)
