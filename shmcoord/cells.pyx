# cython: language_level=3, boundscheck=False, wraparound=False
"""Lease cells of others: who owns one, freeing those of the dead or of one who leaves, and telling
routers that wait for a free one.

A cell is freed only by a CAS from the exact value that was seen in it, so that whoever is late
changes nothing. Taking, adopting and releasing one's own are in `lease.pyx` and `node.pyx`.
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t

cdef extern from *:
    int __builtin_ctzll(unsigned long long bits) noexcept nogil

from shmcoord._atomics cimport *
from shmcoord._layout cimport *
from shmcoord._bell cimport bell_ring
from shmcoord._posix cimport futex_wake_all
from shmcoord._steps cimport step
from shmcoord.status cimport word_add_inflight


# --- telling who waits

cdef uint64_t oldest_ticket(mapping_t* m, uint32_t slot, uint64_t group,
                            bint with_told) noexcept nogil:
    """The oldest ticket with which the router in `slot` waits for `group`; 0: it does not wait.

    Only of a living router, and, but `with_told`, of one that was not told of a free cell already.
    """
    cdef const shmc_hot* hot = &m.hot[slot]
    cdef uint64_t ticket, wanted, oldest = 0
    cdef uint32_t i
    if load_relaxed_u32(&hot.kind) != SHMC_KIND_ROUTER or load_relaxed_u32(&hot.waiting_now) == 0:
        return 0
    for i in range(<uint32_t>SHMC_TURNS):
        ticket = load_seqcst_u64(&hot.turn[i].ticket)
        if ticket == 0 or (oldest != 0 and ticket >= oldest):
            continue
        wanted = load_relaxed_u64(&hot.turn[i].group)
        if wanted == group or wanted == 0 or group == 0:
            oldest = ticket
    if oldest == 0 or not slot_is_alive(m, slot):
        return 0
    if not with_told and load_relaxed_u32(&hot.wake) & 1:
        return 0
    return oldest


cdef bint tell(mapping_t* m, uint32_t slot) noexcept nogil:
    """Tell a router that a cell may be free for it; False if it was told already.

    An odd `wake` is a telling that it has not taken note of; the router makes it even. Its event
    loop is woken by a datagram; a thread, or a loop that a datagram does not reach (another network
    namespace), by the futex.
    """
    cdef shmc_hot* hot = &m.hot[slot]
    cdef uint32_t wake = load_relaxed_u32(&hot.wake)
    if wake & 1 or not cas_seqcst_u32(&hot.wake, wake, wake + 1):
        return False
    step(b"wake.told")
    if load_relaxed_u32(&hot.bell) == 0 or not bell_ring(m.incarnation, slot):
        futex_wake_all(&hot.wake)
    return True


cdef void wake_longest(mapping_t* m, uint64_t group) noexcept nogil:
    """Tell the router whose caller waits longest for `group` (0: any) that a cell is free.

    Who was told and has not run since is passed over: it may be stopped, and two cells that are
    freed at once wake two routers. A router that dies with its telling unread costs the others
    nothing but time, since each looks again by itself after a while.
    """
    cdef uint64_t bits, ticket, oldest
    cdef uint32_t word, slot, chosen
    cdef int _attempt
    for _attempt in range(4):
        oldest = 0
        chosen = 0
        for word in range((m.slots + 63) >> 6):
            bits = load_acquire_u64(&m.bitmap[word])
            while bits != 0:
                slot = (word << 6) + <uint32_t>__builtin_ctzll(bits)
                bits &= bits - 1
                if slot >= m.slots:
                    break
                ticket = oldest_ticket(m, slot, group, False)
                if ticket != 0 and (oldest == 0 or ticket < oldest):
                    oldest = ticket
                    chosen = slot
        if oldest == 0:
            return
        if tell(m, chosen):
            return


cdef void notify_all(mapping_t* m) noexcept nogil:
    """Tell every router that waits: members, states or many cells have changed."""
    cdef uint64_t bits
    cdef uint32_t word, slot
    if load_seqcst_u32(&m.sync.waiters) == 0:
        return
    for word in range((m.slots + 63) >> 6):
        bits = load_acquire_u64(&m.bitmap[word])
        while bits != 0:
            slot = (word << 6) + <uint32_t>__builtin_ctzll(bits)
            bits &= bits - 1
            if slot >= m.slots:
                break
            if oldest_ticket(m, slot, 0, False) != 0:
                tell(m, slot)


# --- freeing


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
        notify_all(m)
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
