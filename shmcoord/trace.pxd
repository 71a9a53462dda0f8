from libc.stdint cimport uint32_t, uint64_t

from shmcoord.liveness cimport Participant

cdef void note_decision(Participant owner, uint64_t now_ns, uint64_t group, uint32_t outcome,
                        uint32_t slot, uint64_t waited_ns, uint32_t queue,
                        uint32_t candidates) noexcept nogil
