from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from shmcoord._layout cimport shmc_hot

cdef extern from *:
    """
    #define SHMC_LOAD_BITS 0xFFFFFFFFFFFull  /* waiting, in flight and flags of a load word */
    """
    const uint64_t LOAD_BITS "SHMC_LOAD_BITS"

cdef enum:
    KEPT = 16    # ties that least-loaded writes down; among more it draws
    DRAWS = 8    # tries of least-loaded to find an idle node of a large group by drawing
    SAMPLE = 32  # candidates that hot-cold compares; of a larger group it draws half as many
    REMOTE = 0x80  # bit of candidate_t.place: a node of another host

# One node of a group as a router's private table has it: half a cache line. `hot` points into the
# segment, the rest is a private copy of what the node wrote once, or this router's own.
cdef struct candidate_t:
    const shmc_hot* hot
    double inverse_weight  # score = queue * inverse_weight + bias
    float bias             # a node of another host: how much busier ours may be
    uint32_t open_tag      # generation and state OPEN, as bits 44 to 63 of the load word have them
    uint32_t skip          # number of the pick that passes it over
    uint16_t capacity
    uint8_t place          # index among the router's segments, 0 .. 127, and REMOTE
    uint8_t penalty        # 1: taken only when nobody without is there


cdef inline uint32_t segment_of(const candidate_t* c) noexcept nogil:
    """Index of its segment among the router's."""
    return c.place & ~<uint32_t>REMOTE


cdef struct candidates_t:
    candidate_t* items
    uint64_t* hashes     # beside `items`: of the node's name, for affinity
    double* turns        # beside `items`: round-robin's credit of each
    uint32_t* scratch    # `count` indices
    uint32_t* remote     # indices of the nodes of other hosts
    uint32_t remote_count
    uint32_t count
    double hot_quantile  # hot-cold: loads above this quantile of the group's are hot
    double bound         # affinity: nobody gets more than this times its share


# What one pick asks for.
cdef struct pick_t:
    uint32_t skip        # candidates whose `skip` has this number are passed over
    uint32_t cost
    uint64_t key         # hash of the key, for affinity; 0: there is none
    uint64_t* rng        # state of the random numbers; never 0

# A policy: the index of a candidate, or -1 if nobody is eligible. No clock, no global state.
ctypedef int (*policy_t)(candidates_t* table, const pick_t* pick) noexcept nogil


cdef class NativePolicy:
    """A policy written in Cython, for `Router(policy=...)`; made by `native_policy`."""
    cdef readonly str name
    cdef policy_t scan

cdef NativePolicy native_policy(str name, policy_t scan)
cdef policy_t find_policy(str name) except NULL
cdef bint allocate(candidates_t* table, uint32_t count) noexcept nogil
cdef void release(candidates_t* table) noexcept nogil
cdef bint score_of(const candidate_t* c, double* score) noexcept nogil
cdef double random_unit(uint64_t* rng) noexcept nogil
cdef bint is_open(const candidate_t* c, const pick_t* pick, uint64_t* word) noexcept nogil
cdef uint32_t tier_of(const candidate_t* c, uint64_t word) noexcept nogil
cdef double affinity_bound(candidates_t* table, uint32_t index, uint32_t cost) noexcept nogil
