from libc.stdint cimport int64_t, uint32_t, uint64_t

from shmcoord._atomics cimport *
from shmcoord._layout cimport *
from shmcoord._posix cimport FUTEX_OWNER_DIED, FUTEX_TID_MASK, futex_wake_all
from shmcoord.segment cimport Mapping, mapping_t
from shmcoord.status cimport NodeInfo, word_add_inflight


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

cdef inline void notify_release(mapping_t* m) noexcept nogil:
    """Wake whoever waits for capacity; one load when nobody does.

    The caller has freed something with a seq_cst CAS; a waiter counts itself before it looks at
    the cells a last time. So either we see its count, or it sees what we freed.
    """
    if load_seqcst_u32(&m.sync.waiters) != 0:
        add_seqcst_u32(&m.sync.release_word, 1)
        futex_wake_all(&m.sync.release_word)


# One of this process's participants, as its beat thread sees it.
cdef struct entry_t:
    mapping_t* m
    uint32_t slot
    uint32_t generation
    bint is_node
    uint64_t interval_ns
    uint64_t due_ns
    uint64_t overflow  # cost of running requests for which no cell was left; node side moves it
    entry_t* next


cdef class Participant:
    cdef readonly Mapping mapping
    cdef entry_t* entry
    cdef readonly uint32_t slot, generation
    cdef readonly bint left
    cdef uint32_t op
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
cdef uint32_t sweep_row(mapping_t* m, uint32_t slot) noexcept nogil
cdef uint32_t reap_all(Mapping mapping) except? 0xFFFFFFFF
