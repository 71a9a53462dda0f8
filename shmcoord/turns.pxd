from libc.stdint cimport uint32_t, uint64_t

from shmcoord._layout cimport shmc_hot
from shmcoord.liveness cimport Participant


cdef class Turns:
    cdef list segments
    cdef list participants
    cdef list counted   # the participants that are counted as waiting
    cdef list members   # those that were counted last
    cdef readonly uint64_t version  # moves when `members` does
    cdef uint32_t alone  # what is slept on where the router has no slot
    cdef shmc_hot* _hot(self, participant)
    cdef int _publish(self, Participant owner, heads, uint32_t waiting) except -1
    cdef bint others_wait(self, uint64_t group) noexcept
