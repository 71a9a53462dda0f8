# cython: language_level=3, boundscheck=False, wraparound=False
"""Sleeping until somebody releases something: the native half of `waiting.py`.

Each segment has a futex word that a release moves while the segment's count of waiters is not 0.
"""
from libc.stdint cimport uint32_t, uint64_t

from shmcoord._atomics cimport *
from shmcoord._posix cimport futex_wait_any, futex_wake_all
from shmcoord.liveness cimport Participant
from shmcoord.segment cimport MAPPING_FORKED, Mapping, mapping_t


cdef class ReleaseWait:
    """One router's wait on all of its segments.

    Args:
        segments: the router's list; a segment that was made anew takes its place in it.
        participants: beside it, this router's participants, or None where it has none yet.
    """

    cdef list segments
    cdef list participants
    cdef list counted  # the segments and participants that are counted as waiting

    def __init__(self, list segments, list participants):
        self.segments = segments
        self.participants = participants
        self.counted = []

    def begin(self):
        """Count this router among those that a release wakes, in every segment."""
        cdef Participant owner
        counted = []
        for segment, participant in zip(self.segments, self.participants):
            add_seqcst_u32(&(<Mapping>segment).m.sync.waiters, 1)
            if participant is not None:
                owner = <Participant>participant
                # For the reaper, should we die here. Between the two stores lies a death that
                # leaves one count too many, which costs each release a system call and no more.
                store_release_u32(&owner.entry.m.hot[owner.slot].waiting_now, 1)
            counted.append((segment, participant))
        self.counted = counted

    def end(self):
        cdef Participant owner
        cdef mapping_t* m
        cdef uint32_t waiters
        for segment, participant in self.counted:
            m = (<Mapping>segment).m
            if m.state == MAPPING_FORKED:
                continue
            if participant is not None:
                owner = <Participant>participant
                if not owner.left:
                    store_release_u32(&m.hot[owner.slot].waiting_now, 0)
            while True:
                waiters = load_relaxed_u32(&m.sync.waiters)
                if waiters == 0 or cas_seqcst_u32(&m.sync.waiters, waiters, waiters - 1):
                    break

    def ticket(self):
        if [counted for counted, _ in self.counted] != self.segments:
            self.end()  # a segment was made anew: wait on the new one
            self.begin()
        return [
            (segment, load_seqcst_u32(&(<Mapping>segment).m.sync.release_word))
            for segment in self.segments
        ]

    def wake(self):
        """End a `sleep` that has begun (and, harmlessly, those of others)."""
        cdef mapping_t* m = (<Mapping>self.segments[0]).m
        add_seqcst_u32(&m.sync.release_word, 1)
        futex_wake_all(&m.sync.release_word)

    def sleep(self, ticket, timeout_s):
        """Sleep until a release word moves from where the ticket saw it."""
        cdef uint32_t* words[128]
        cdef uint32_t seen[128]
        cdef uint32_t i = 0
        cdef uint64_t timeout_ns = <uint64_t>(timeout_s * 1e9)
        for segment, word in ticket:
            words[i] = &(<Mapping>segment).m.sync.release_word
            seen[i] = word
            i += 1
        with nogil:
            futex_wait_any(words, seen, i, timeout_ns)
