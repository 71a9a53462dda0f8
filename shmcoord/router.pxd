from libc.stdint cimport uint32_t, uint64_t

from shmcoord.groups cimport Groups
from shmcoord.lease cimport Lease
from shmcoord.liveness cimport Participant
from shmcoord.segment cimport Mapping
from shmcoord.table cimport Table
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


cdef class Router(Groups):
    cdef list participants  # Participant or None, beside `segments`
    cdef Turns turns
    cdef object claiming    # held by the thread that claims a slot
    cdef object waiting     # WaitQueue, made at the first wait
    cdef readonly uint32_t max_waiters
    cdef object __weakref__

    cdef Ask _ask(self, group, cost, key, bint explain, exclude, bint idle_only)
    cdef bint _is_behind(self, Ask ask, bint can_wait) except -1
    cdef Lease _attempt(self, Ask ask)
    cdef void _note_refusal(self, Table table, uint32_t outcome) noexcept
    cdef Participant _claim(self, Mapping mapping, uint32_t index)
    cdef Participant _claim_one(self, Mapping mapping, uint32_t index)
    cdef Lease _wait(self, Ask ask, double timeout_s, waits)
    cdef object _queue(self, Ask ask)
    cdef object _expected_wait_s(self, Ask ask)
