# cython: language_level=3, boundscheck=False, wraparound=False
"""Lease cells of others: who owns one, and freeing those of the dead or of one who leaves.

A cell is freed only by a CAS from the exact value that was seen in it, so that whoever is late
changes nothing. Taking, adopting and releasing one's own are in `lease.pyx` and `node.pyx`.
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from shmcoord._atomics cimport *
from shmcoord._layout cimport *
from shmcoord._steps cimport step
from shmcoord.status cimport word_add_inflight


cdef uint32_t sweep_row(mapping_t* m, uint32_t slot) noexcept nogil:
    """Free the cells of one node whose owners are dead. Anyone, any number of times."""
    cdef uint64_t* row = m.cells + <size_t>slot * m.leases
    cdef uint64_t cell
    cdef uint32_t i, freed = 0
    for i in range(m.leases):
        cell = load_acquire_u64(&row[i])
        if cell != 0 and owner_is_dead(m, cell):
            freed += give_back_cell(m, slot, &row[i], cell)
    if freed:
        notify_release(m)
    return freed


cdef uint32_t give_back_cell(mapping_t* m, uint32_t slot, uint64_t* at,
                             uint64_t cell) noexcept nogil:
    if not cas_seqcst_u64(at, cell, 0):
        return 0
    step(b"sweep.cas")
    word_add_inflight(&m.hot[slot], load_relaxed_u32(&m.hot[slot].generation),
                      -<int64_t>cell_cost(cell))
    step(b"sweep.word")
    return 1


cdef uint32_t free_row(mapping_t* m, uint32_t slot) noexcept nogil:
    """Free every cell of a node that is gone, or leaves."""
    cdef uint64_t* row = m.cells + <size_t>slot * m.leases
    cdef uint64_t cell
    cdef uint32_t i, freed = 0
    for i in range(m.leases):
        cell = load_acquire_u64(&row[i])
        if cell != 0:
            freed += give_back_cell(m, slot, &row[i], cell)
    return freed


cdef uint32_t free_owned(mapping_t* m, uint32_t owner, uint32_t generation) noexcept nogil:
    """Free every cell, of any node, that this participant owns."""
    cdef uint64_t cell
    cdef uint64_t* row
    cdef uint32_t slot, i, freed = 0
    for slot in range(m.slots):
        row = m.cells + <size_t>slot * m.leases
        for i in range(m.leases):
            cell = load_acquire_u64(&row[i])
            if cell != 0 and cell_is_of(cell, owner, generation):
                freed += give_back_cell(m, slot, &row[i], cell)
    return freed
