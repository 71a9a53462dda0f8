from libc.stdint cimport uint32_t, uint64_t

from shmcoord._layout cimport shmc_hot, shmc_meta, shmc_record
from shmcoord.liveness cimport Participant
from shmcoord.segment cimport Mapping, mapping_t


cdef class Node:
    cdef readonly Mapping segment
    cdef readonly str name, group, endpoint
    cdef readonly double interval_s, weight
    cdef readonly uint32_t capacity
    cdef Participant participant
    cdef mapping_t* m
    cdef shmc_hot* hot
    cdef shmc_record* record
    cdef uint64_t* row
    cdef uint64_t words[32]
    cdef uint32_t word_count
    cdef uint64_t served_before  # at the interval before
    cdef dict gauge_index
    cdef readonly bint stale  # the name leads to other memory by now
    cdef object __weakref__
    cdef int check(self) except -1
    cdef void set_state(self, uint32_t state) noexcept
    cdef uint32_t _stored_state(self) noexcept
    cdef void publish_record(self) noexcept
    cdef void show_latency(self, double latency_s) noexcept
    cdef void forget_latency(self) noexcept
    cdef void run(self, Request request, uint32_t state, uint32_t cost, uint32_t op) noexcept
    cdef void finish(self, int index, uint64_t value, uint64_t began_ns, bint failed) noexcept


cdef class Request:
    cdef Node node
    cdef uint64_t value
    cdef uint64_t began_ns
    cdef int index
    cdef bint ended

cdef int fill_meta(shmc_meta* meta, Mapping segment, str name, str group, str endpoint,
                   object capacity, object weight, object interval_s, tuple gauges,
                   object slow_start_s) except -1
cdef Node join_node(Mapping segment, str name, str group, str endpoint, object capacity,
                    object weight, object interval_s, tuple gauges, object slow_start_s)
