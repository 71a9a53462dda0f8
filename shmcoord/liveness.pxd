from libc.stdint cimport uint32_t, uint64_t

from shmcoord._layout cimport SHMC_OP_MAX, shmc_meta
from shmcoord.beat cimport entry_t
from shmcoord.segment cimport Mapping
from shmcoord.status cimport NodeInfo


cdef class Participant:
    cdef readonly Mapping mapping
    cdef entry_t* entry
    cdef readonly uint32_t slot, generation
    cdef readonly bint left
    cdef uint32_t op
    cdef bint has_bell       # of a router: a loop listens for datagrams
    cdef uint64_t decisions  # of a router: how many it has written
    cdef object __weakref__
    cdef int leave(self) except -1
    cdef void _give_back(self) noexcept nogil

    cdef inline uint32_t next_op(self) noexcept nogil:
        """A number that differs between consecutive leases of this owner."""
        self.op = (self.op + 1) & SHMC_OP_MAX
        return self.op


# What one reader has seen of one slot's owner.
cdef struct seen_t:
    uint32_t generation
    uint64_t beats
    uint64_t beat_at_ns       # reader's clock
    uint64_t progress
    uint64_t progress_at_ns


cdef class Judge:
    cdef Mapping mapping
    cdef seen_t* seen
    cdef int health(self, NodeInfo info, uint64_t now_ns, double* age_s) noexcept

cdef Participant claim(Mapping mapping, uint32_t kind, shmc_meta* meta, str name)
cdef uint32_t reap_all(Mapping mapping) except? 0xFFFFFFFF
