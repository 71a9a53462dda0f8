from libc.stdint cimport uint8_t, uint32_t, uint64_t

from shmcoord.liveness cimport Judge
from shmcoord.segment cimport Mapping
from shmcoord.status cimport NodeInfo


cdef class Origin:
    cdef Mapping mapping
    cdef Judge judge
    cdef list infos       # NodeInfo per slot, or None
    cdef uint64_t* told   # E_WORDS_MAX words per slot: its entry when all were told last
    cdef uint8_t* changed  # per slot: whether it changed since
    cdef uint64_t* found  # the entry that is being read
    cdef NodeInfo _info(self, uint32_t slot)
    cdef uint32_t _read(self, NodeInfo info, uint64_t now) noexcept
