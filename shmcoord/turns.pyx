# cython: language_level=3, boundscheck=False, wraparound=False
"""Turns: the native half of waiting for capacity (`waiting.py` is the other).

A router whose callers wait publishes in its slot of every segment which of them waits longest, and
sleeps on its wake words. Whoever frees a cell tells the router that waits longest, and only that
one (`cells.wake_longest`): six routers that all woke for one cell would cost six processes their
time and let chance decide who gets it.
"""
from libc.stdint cimport uint32_t, uint64_t

from shmcoord._atomics cimport *
from shmcoord._layout cimport *
from shmcoord._posix cimport futex_wait_any
from shmcoord._steps cimport step
from shmcoord.cells cimport count_waiter_out, oldest_ticket, tell, wake_longest
from shmcoord.liveness cimport Participant
from shmcoord.segment cimport MAPPING_FORKED, Mapping, mapping_t
from shmcoord.status cimport word_waiting

from shmcoord.doorbell import Doorbell


cdef inline bint _is_gone(participant) noexcept:
    """Whether it has left, or is the parent's and its memory is not here (a fork)."""
    cdef Participant owner = <Participant>participant
    return owner.left or owner.entry.m.state == MAPPING_FORKED


cdef class Turns:
    """One router's place among those who wait, in all of its segments.

    Args:
        segments: the router's list; a segment that was made anew takes its place in it.
        participants: beside it, this router's participants, or None where it has none.
    """

    def __init__(self, list segments, list participants):
        self.segments = segments
        self.participants = participants
        self.counted = []
        self.members = []
        self.version = 0

    cdef shmc_hot* _hot(self, participant):
        cdef Participant owner = <Participant>participant
        return &owner.entry.m.hot[owner.slot]

    def begin(self):
        """Count this router among those who wait, in every segment where it takes part."""
        counted = []
        for participant in self.participants:
            if participant is None or _is_gone(participant):
                continue
            # For the reaper, should we die here. Between the two stores lies a death that leaves
            # one count too many, which costs each release a look at the slots and no more.
            add_seqcst_u32(&(<Participant>participant).entry.m.sync.waiters, 1)
            store_release_u32(&self._hot(participant).waiting_now, 1)
            step(b"wait.counted")
            counted.append(participant)
        self.counted = counted
        if counted != self.members:
            self.members = counted
            self.version += 1

    def end(self):
        """The reverse of `begin`."""
        cdef Participant owner
        for participant in self.counted:
            owner = <Participant>participant
            if _is_gone(owner):  # who left was counted out then
                continue
            self._publish(owner, (), 0)
            store_release_u32(&self._hot(owner).waiting_now, 0)
            count_waiter_out(owner.entry.m)
        self.counted = []

    def tickets(self):
        """A new caller's place in the order of each segment."""
        return [
            add_seqcst_u64(&(<Mapping>segment).m.sync.tickets, 1) + 1 for segment in self.segments
        ]

    def publish(self, heads, waiting, by_loop=False):
        """Show for whom this router waits.

        Args:
            heads: the oldest waiting caller of each group, oldest first: the group's hash, and the
                caller's tickets.
            waiting: callers that wait, of all groups.
            by_loop: no thread is among them: the event loop's bell is to be rung.
        """
        cdef Participant owner
        if self.participants != self.counted and self._has_moved():
            self.end()  # a segment was made anew, or joined: wait there too
            self.begin()
        for i, participant in enumerate(self.participants):
            if participant in self.counted:
                owner = <Participant>participant
                if not _is_gone(owner):
                    store_relaxed_u32(&self._hot(owner).bell, by_loop and owner.has_bell)
                    self._publish(owner, [(group, at[i]) for group, at in heads], waiting)

    def _has_moved(self):
        return self.counted != [
            participant for participant in self.participants
            if participant is not None and not _is_gone(participant)
        ]

    cdef int _publish(self, Participant owner, heads, uint32_t waiting) except -1:
        cdef shmc_hot* hot = self._hot(owner)
        cdef uint64_t word = load_relaxed_u64(&hot.load)
        cdef uint64_t ticket
        cdef uint32_t i, count = <uint32_t>len(heads)
        # The owner is the only one who writes here. Whoever frees may see a ticket of one group
        # beside the hash of another for a moment: that wakes us once too often, or another first.
        for i in range(<uint32_t>SHMC_TURNS):
            if i >= count:
                if load_relaxed_u64(&hot.turn[i].ticket) != 0:
                    cas_seqcst_u64(&hot.turn[i].ticket, load_relaxed_u64(&hot.turn[i].ticket), 0)
                continue
            group, ticket = heads[<int>i]
            if i + 1 == SHMC_TURNS and count > SHMC_TURNS:
                group = 0  # the rest of the groups share the last turn
            store_relaxed_u64(&hot.turn[i].group, group)
            # seq_cst: before our look at the cells in the order of all threads.
            cas_seqcst_u64(&hot.turn[i].ticket, load_relaxed_u64(&hot.turn[i].ticket), ticket)
        waiting = min(waiting, <uint32_t>SHMC_FIELD_MAX)
        if word_waiting(word) != waiting:
            store_relaxed_u64(
                &hot.load, (word & ~(<uint64_t>SHMC_FIELD_MAX << 20)) | <uint64_t>waiting << 20
            )
        # Before every look at the cells, which begins with a relaxed load: a compare-and-swap made
        # of exclusive loads and stores (aarch64 without LSE) would let that load pass its store.
        fence_seqcst()
        step(b"wait.turn")
        return 0

    def consume(self):
        """Whether we were told; takes note of it. Look at the cells after this, not before."""
        cdef bint told = False
        cdef shmc_hot* hot
        cdef uint32_t wake
        for participant in self.members:  # also after `end`: a telling may be under way
            if _is_gone(participant):
                continue
            hot = self._hot(participant)
            wake = load_relaxed_u32(&hot.wake)
            if wake & 1:
                told |= cas_seqcst_u32(&hot.wake, wake, wake + 1)
                step(b"wait.consumed")
        fence_seqcst()  # as in `_publish`
        return bool(told)

    def doorbell(self):
        """A new `Doorbell` for this router as it takes part now."""
        return Doorbell(self.members)

    def pass_on(self, uint64_t group):
        """Tell the next one: a cell may be free that none of our callers needs."""
        cdef mapping_t* m
        for segment in self.segments:
            m = (<Mapping>segment).m
            if m.state != MAPPING_FORKED and load_seqcst_u32(&m.sync.waiters) != 0:
                wake_longest(m, group)

    def wake(self):
        """End a `sleep` of this router, begun or about to begin."""
        for participant in self.counted:
            if _is_gone(participant):
                continue
            tell((<Participant>participant).entry.m, (<Participant>participant).slot)
            return

    def sleep(self, timeout_s):
        """Sleep until this router is told of a free cell, at most for `timeout_s` seconds."""
        cdef uint32_t* words[128]
        cdef uint32_t seen[128]
        cdef uint32_t i = 0
        cdef uint64_t timeout_ns = <uint64_t>(timeout_s * 1e9)
        held = list(self.counted)  # keeps the memory mapped while we sleep
        for participant in held:
            if _is_gone(participant):
                continue
            words[i] = &self._hot(participant).wake
            seen[i] = load_seqcst_u32(words[i])
            if seen[i] & 1:
                return
            i += 1
        if i == 0:  # no slot was left anywhere
            words[0] = &self.alone
            seen[0] = 0
            i = 1
        with nogil:
            futex_wait_any(words, seen, i, timeout_ns)

    cdef bint others_wait(self, uint64_t group) noexcept:
        """Whether a caller of another router waits for the group: he was here first."""
        cdef mapping_t* m
        cdef uint32_t slot
        for segment in self.segments:
            m = (<Mapping>segment).m
            if m.state == MAPPING_FORKED or load_seqcst_u32(&m.sync.waiters) == 0:
                continue
            for slot in range(m.slots):
                if oldest_ticket(m, slot, group, False) != 0:
                    return True
        return False

    def waiting_elsewhere(self, uint64_t group):
        """Callers of other routers that wait, where those wait for the group."""
        cdef mapping_t* m
        cdef uint32_t slot
        cdef uint64_t total = 0
        for i, segment in enumerate(self.segments):
            m = (<Mapping>segment).m
            if m.state == MAPPING_FORKED:
                continue
            own = self.participants[i]
            for slot in range(m.slots):
                if own is not None and (<Participant>own).slot == slot:
                    continue
                if oldest_ticket(m, slot, group, True) != 0:
                    total += word_waiting(load_relaxed_u64(&m.hot[slot].load))
        return total
