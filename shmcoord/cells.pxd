from libc.stdint cimport int64_t, uint32_t, uint64_t

from shmcoord._atomics cimport *
from shmcoord._layout cimport *
from shmcoord._posix cimport FUTEX_OWNER_DIED, FUTEX_TID_MASK
from shmcoord.segment cimport mapping_t


# --- lease cells: state:2 | owner slot:12 | owner generation:10 | cost:16 | op:24

cdef inline uint64_t cell_make(uint32_t state, uint32_t owner, uint32_t generation, uint32_t cost,
                               uint32_t op) noexcept nogil:
    return (
        <uint64_t>(state & 0x3) << 62 | <uint64_t>(owner & 0xFFF) << 50
        | <uint64_t>(generation & SHMC_CELL_GENERATION_MASK) << 40
        | <uint64_t>(cost & SHMC_COST_MAX) << 24 | <uint64_t>(op & SHMC_OP_MAX)
    )

cdef inline uint32_t cell_state(uint64_t cell) noexcept nogil:
    return <uint32_t>(cell >> 62)

cdef inline uint32_t cell_owner(uint64_t cell) noexcept nogil:
    return <uint32_t>(cell >> 50) & 0xFFF

cdef inline bint cell_is_of(uint64_t cell, uint32_t owner, uint32_t generation) noexcept nogil:
    """Whether this generation of the participant in slot `owner` owns the cell."""
    return (
        cell_owner(cell) == owner
        and (<uint32_t>(cell >> 40) & SHMC_CELL_GENERATION_MASK)
        == (generation & SHMC_CELL_GENERATION_MASK)
    )

cdef inline uint32_t cell_cost(uint64_t cell) noexcept nogil:
    return <uint32_t>(cell >> 24) & SHMC_COST_MAX

cdef inline bint death_is_alive(uint32_t death) noexcept nogil:
    """Whether a death word says that its owner lives: it has a thread id and no death mark."""
    # One comparison for both: without the waiters bit, 1 .. FUTEX_TID_MASK is alive.
    return (death & (FUTEX_OWNER_DIED | FUTEX_TID_MASK)) - 1u < <uint32_t>FUTEX_TID_MASK

cdef inline bint slot_is_alive(const mapping_t* m, uint32_t slot) noexcept nogil:
    return death_is_alive(load_acquire_u32(&m.hot[slot].death))

cdef inline bint owner_is_dead(const mapping_t* m, uint64_t cell) noexcept nogil:
    """Whether the participant that owns this cell value is gone.

    It is if its slot has another generation by now, or its death word is marked or empty: a
    participant takes cells only after its word is set and gives them back before it clears it.
    """
    cdef uint32_t slot = cell_owner(cell)
    if slot >= m.slots:
        return True
    if not cell_is_of(cell, slot, load_acquire_u32(&m.hot[slot].generation)):
        return True
    return not slot_is_alive(m, slot)

cdef inline void notify_freed(mapping_t* m, uint32_t slot) noexcept nogil:
    """Tell whoever waits longest that a cell of this node is free; one load when nobody waits.

    The caller has freed the cell with a seq_cst CAS; a router publishes its turn and counts itself
    before it looks at the cells a last time. So either we see its turn, or it sees what we freed.
    """
    if load_seqcst_u32(&m.sync.waiters) != 0:
        wake_longest(m, load_relaxed_u64(&m.hot[slot].group))

cdef inline void count_waiter_out(mapping_t* m) noexcept nogil:
    """Take one off the routers that wait; never below 0."""
    cdef uint32_t waiters
    while True:
        waiters = load_relaxed_u32(&m.sync.waiters)
        if waiters == 0 or cas_seqcst_u32(&m.sync.waiters, waiters, waiters - 1):
            return


cdef void wake_longest(mapping_t* m, uint64_t group) noexcept nogil
cdef bint tell(mapping_t* m, uint32_t slot) noexcept nogil
cdef void notify_all(mapping_t* m) noexcept nogil
cdef uint64_t oldest_ticket(mapping_t* m, uint32_t slot, uint64_t group,
                            bint with_told) noexcept nogil
cdef uint32_t sweep_row(mapping_t* m, uint32_t slot) noexcept nogil
cdef uint32_t free_row(mapping_t* m, uint32_t slot) noexcept nogil
cdef uint32_t free_owned(mapping_t* m, uint32_t owner, uint32_t generation) noexcept nogil
