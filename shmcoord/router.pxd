from libc.stdint cimport uint32_t, uint64_t

from shmcoord.lease cimport Lease
from shmcoord.liveness cimport Participant
from shmcoord.picker cimport pick_t, policy_t
from shmcoord.segment cimport Mapping
from shmcoord.table cimport Rules, Table
from shmcoord.turns cimport Turns


cdef class Router


cdef class Ask:
    cdef Router router
    cdef str group
    cdef uint64_t group_hash
    cdef uint64_t key
    cdef uint64_t began_ns  # when it began to wait; 0: it does not
    cdef uint32_t cost
    cdef bint explain, idle_only
    cdef object exclude


cdef class Router:
    cdef list segments      # of Mapping
    cdef list participants  # Participant or None, beside `segments`
    cdef list judges
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
    cdef Turns turns
    cdef object claiming    # held by the thread that claims a slot
    cdef object waiting     # WaitQueue, made at the first wait
    cdef readonly uint32_t max_waiters
    cdef object __weakref__

    cdef Table table_of(self, group)
    cdef Table _rebuild(self, str group)
    cdef int _check(self) except -1
    cdef int _look_for_stale(self, uint64_t now_ns) except -1
    cdef int _choose(self, Table table, const pick_t* pick) except -2
    cdef bint _is_gated(self, Table table, int index)
    cdef uint32_t _next_skip(self) noexcept
    cdef Ask _ask(self, group, cost, key, bint explain, exclude, bint idle_only)
    cdef bint _is_behind(self, Ask ask, bint can_wait) except -1
    cdef Lease _attempt(self, Ask ask)
    cdef void _note_refusal(self, Table table, uint32_t outcome) noexcept
    cdef tuple _decide(self, Table table, str group, const pick_t* pick, object exclude,
                       bint is_real)
    cdef Participant _claim(self, Mapping mapping, uint32_t index)
    cdef Participant _claim_one(self, Mapping mapping, uint32_t index)
    cdef Lease _wait(self, Ask ask, double timeout_s)
    cdef object _queue(self, Ask ask)
    cdef object _expected_wait_s(self, Ask ask)
