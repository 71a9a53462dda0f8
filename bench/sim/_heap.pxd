# The events to come: a binary heap by time.
from libc.stdint cimport uint32_t
from libc.stdlib cimport realloc


cdef struct event_t:
    double at_s
    uint32_t kind      # what the engine makes of it
    uint32_t index


cdef struct heap_t:
    event_t* events
    uint32_t count
    uint32_t room


cdef inline bint heap_push(heap_t* heap, double at_s, uint32_t kind, uint32_t index) noexcept nogil:
    """False if there is no memory."""
    cdef uint32_t i, up
    cdef event_t* grown
    if heap.count == heap.room:
        grown = <event_t*>realloc(heap.events, (2 * heap.room + 64) * sizeof(event_t))
        if grown == NULL:
            return False
        heap.events = grown
        heap.room = 2 * heap.room + 64
    i = heap.count
    heap.count += 1
    while i:
        up = (i - 1) >> 1
        if heap.events[up].at_s <= at_s:
            break
        heap.events[i] = heap.events[up]
        i = up
    heap.events[i].at_s = at_s
    heap.events[i].kind = kind
    heap.events[i].index = index
    return True


cdef inline event_t heap_pop(heap_t* heap) noexcept nogil:
    """The first event; there must be one."""
    cdef event_t first = heap.events[0]
    cdef event_t last
    cdef uint32_t i = 0, down
    heap.count -= 1
    last = heap.events[heap.count]
    while True:
        down = 2 * i + 1
        if down >= heap.count:
            break
        if down + 1 < heap.count and heap.events[down + 1].at_s < heap.events[down].at_s:
            down += 1
        if heap.events[down].at_s >= last.at_s:
            break
        heap.events[i] = heap.events[down]
        i = down
    heap.events[i] = last
    return first
