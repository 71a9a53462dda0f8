# cython: language_level=3
"""Reads records of shared memory in compiled code, as a router written in Cython or C would.

Built only for the benchmarks, and against nothing but what shmcoord installs (.pxd and .h).
"""
from libc.stdint cimport uint32_t, uint64_t

from shmcoord._atomics cimport load_relaxed_u64
from shmcoord._layout cimport SHMC_R_STARTED_MONO_NS, SHMC_RECORD_WORDS
from shmcoord.segment cimport Mapping, mapping_t
from shmcoord.status cimport NodeInfo, read_info, record_read, word_queue

cdef extern from *:
    """
    /* The compiler must believe that somebody looks at what was read. */
    static inline void bench_look_at(const void* p) { __asm__ volatile("" : : "r"(p) : "memory"); }
    """
    void bench_look_at(const void* p) noexcept nogil


cdef enum:
    # The last word that every node publishes; behind it are reserved words and user gauges.
    WORDS = SHMC_R_STARTED_MONO_NS + 1


def find_slot(Mapping mapping not None, str node not None):
    """Returns the slot of a node; raises LookupError if it is not there."""
    cdef uint32_t slot
    cdef NodeInfo info
    mapping.check()
    for slot in range(mapping.m.slots):
        info = read_info(mapping.m, slot)
        if info is not None and info.node == node:
            return slot
    raise LookupError(node)


def read_records(Mapping mapping not None, uint32_t slot, uint64_t n):
    """Reads a slot's record n times, whole but for user gauges; returns how many reads failed."""
    cdef const mapping_t* m = mapping.m
    cdef uint64_t words[WORDS]
    cdef uint64_t _i, failed = 0
    mapping.check()
    if slot >= m.slots:
        raise IndexError(slot)
    with nogil:
        for _i in range(n):
            if not record_read(&m.record[slot], words, WORDS):
                failed += 1
            bench_look_at(words)
    return failed


def read_whole_records(Mapping mapping not None, uint32_t slot, uint64_t n):
    """The same with the reserved words and all sixteen user gauges."""
    cdef const mapping_t* m = mapping.m
    cdef uint64_t words[SHMC_RECORD_WORDS]
    cdef uint64_t _i, failed = 0
    mapping.check()
    if slot >= m.slots:
        raise IndexError(slot)
    with nogil:
        for _i in range(n):
            if not record_read(&m.record[slot], words, SHMC_RECORD_WORDS):
                failed += 1
            bench_look_at(words)
    return failed


def read_queues(Mapping mapping not None, uint32_t slot, uint64_t n):
    """Reads a slot's load word n times; returns the last queue."""
    cdef const mapping_t* m = mapping.m
    cdef uint64_t _i
    cdef uint32_t queue = 0
    mapping.check()
    if slot >= m.slots:
        raise IndexError(slot)
    with nogil:
        for _i in range(n):
            queue = word_queue(load_relaxed_u64(&m.hot[slot].load))
            bench_look_at(&queue)
    return queue
