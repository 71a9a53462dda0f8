from libc.stdint cimport int64_t, uint32_t, uint64_t

from shmcoord._atomics cimport *
from shmcoord._layout cimport *
from shmcoord._steps cimport step
from shmcoord.backend cimport Backend
from shmcoord.cells cimport cell_make, cell_state, death_is_alive, notify_freed
from shmcoord.liveness cimport Participant
from shmcoord.segment cimport Mapping, mapping_t
from shmcoord.status cimport word_add_inflight, word_generation, word_state


cdef inline int take_cell(uint64_t* row, uint32_t first, uint32_t end,
                          uint64_t value) noexcept nogil:
    """CAS the first free cell of `row[first:end]` to `value`; its index, or -1 if all are taken."""
    cdef uint32_t i
    for i in range(first, end):
        if load_relaxed_u64(&row[i]) == 0 and cas_seqcst_u64(&row[i], 0, value):
            return <int>i
    return -1

cdef inline bint is_open(const shmc_hot* hot, uint32_t generation) noexcept nogil:
    """Whether this generation of the node takes new leases and lives.

    Looked at again after a cell was taken: a drain stores its state before it looks at the cells,
    both seq_cst, so either the router sees the drain or the drain sees the lease.
    """
    # The death word first: if the slot changes hands in between, the load word tells.
    cdef uint32_t death = load_seqcst_u32(&hot.death)
    cdef uint64_t word = load_seqcst_u64(&hot.load)
    return (
        death_is_alive(death)
        and word_generation(word) == (generation & 0xFFFF)
        and word_state(word) == SHMC_STATE_OPEN
    )

cdef inline bint free_cell(mapping_t* m, shmc_hot* hot, uint32_t generation, uint64_t* cell,
                           uint64_t value, uint32_t cost) noexcept nogil:
    """Free a cell from exactly `value`; False (and counted) if it is something else by now."""
    if not cas_seqcst_u64(cell, value, 0):
        add_seqcst_u64(&m.sync.late_releases, 1)
        return False
    step(b"free.cas")
    word_add_inflight(hot, generation, -<int64_t>cost)
    step(b"free.word")
    notify_freed(m, <uint32_t>(hot - m.hot))
    step(b"free.notify")
    return True


cdef class Lease:
    cdef readonly Backend backend
    cdef readonly uint32_t cost
    cdef readonly bint released
    cdef public object decision
    cdef Participant owner
    cdef shmc_hot* hot
    cdef uint64_t* cell
    cdef uint64_t value
    cdef uint32_t index
    cdef uint32_t host           # of a node of another host: our id, which the token carries there
    cdef bint _free(self) noexcept

cdef Lease reserve(Backend backend, Participant owner, uint32_t cost, bint* full)
cdef uint64_t* find_cell(Mapping mapping, uint32_t slot, uint32_t generation, str token,
                         uint64_t* value, uint32_t* cost, uint32_t* host) except? NULL
