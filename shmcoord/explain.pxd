from libc.stdint cimport uint32_t, uint64_t

from shmcoord._layout cimport shmc_hot
from shmcoord.picker cimport candidates_t, pick_t, policy_t
from shmcoord.table cimport Table


cdef class RandomSource:
    cdef uint64_t state


# A table's words at one moment, copied, so that what is explained is what was decided.
cdef class Frozen:
    cdef Table table
    cdef candidates_t view
    cdef shmc_hot* hot

    cdef int choose(self, policy_t scan, object ask, const pick_t* pick) except -2
    cdef tuple candidates(self, str policy, int chosen, const pick_t* pick, object exclude)
    cdef str _reason(self, uint32_t i, uint64_t word, int health, double age_s, uint64_t now_ns,
                     str policy, int chosen, const pick_t* pick, object exclude)

cdef Frozen freeze(Table table)
