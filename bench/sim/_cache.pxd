# A node's cache of keys: what was used last stays, what was not used for longest goes. A list per
# node through two arrays of indices; entry `keys` of a node's row is the list's head and end.
from libc.stdint cimport uint32_t

cdef enum:
    ABSENT = 0xFFFFFFFFu


cdef struct cache_t:
    uint32_t* after        # the entry used before this one; ABSENT: not in the cache
    uint32_t* before
    uint32_t keys
    uint32_t room          # entries per node
    uint32_t* filled       # per node


cdef inline bint cache_use(cache_t* cache, uint32_t node, uint32_t key) noexcept nogil:
    """Use a key on a node; whether it was there."""
    cdef uint32_t head = cache.keys
    cdef uint32_t* after = cache.after + <size_t>node * (cache.keys + 1)
    cdef uint32_t* before = cache.before + <size_t>node * (cache.keys + 1)
    cdef uint32_t oldest
    cdef bint was_there = after[key] != <uint32_t>ABSENT
    if was_there:
        after[before[key]] = after[key]
        before[after[key]] = before[key]
    elif cache.filled[node] == cache.room:
        oldest = before[head]
        after[before[oldest]] = head
        before[head] = before[oldest]
        after[oldest] = <uint32_t>ABSENT
    else:
        cache.filled[node] += 1
    after[key] = after[head]
    before[key] = head
    before[after[head]] = key
    after[head] = key
    return was_there
