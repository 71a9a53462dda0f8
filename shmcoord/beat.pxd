from libc.stdint cimport uint32_t, uint64_t

from shmcoord.segment cimport mapping_t

# One of this process's participants, as its beat thread sees it.
cdef struct entry_t:
    mapping_t* m
    uint32_t slot
    uint32_t generation
    bint is_node
    bint is_mirror    # its beats are moved by whoever brings news, not by time
    uint64_t interval_ns
    uint64_t due_ns
    uint64_t overflow  # cost of running requests for which no cell was left; node side moves it
    entry_t* next


cdef bint hold(entry_t* entry) noexcept nogil
cdef void let_go(entry_t* entry) noexcept nogil
cdef bint is_ours(mapping_t* m, uint32_t slot) noexcept nogil
cdef str why_not_held()
