from libc.stdint cimport uint32_t, uint64_t

from shmcoord._layout cimport shmc_hot
from shmcoord.backend cimport Backend
from shmcoord.liveness cimport Judge
from shmcoord.segment cimport mapping_t
from shmcoord.status cimport NodeInfo

cdef extern from *:
    """
    #define SHMC_LOAD_BITS 0xFFFFFFFFFFFull  /* waiting, in flight and flags of a load word */
    """
    const uint64_t LOAD_BITS "SHMC_LOAD_BITS"

cdef enum:
    KEPT = 16  # ties that least-loaded writes down; among more it draws
    DRAWS = 8  # tries of least-loaded to find an idle node of a large group by drawing

# One node of a group as a router's private table has it. `hot` points into the segment, the rest
# is a private copy of what the node wrote once; `penalty` and `skip` are this router's own.
cdef struct candidate_t:
    const shmc_hot* hot
    double inverse_weight
    uint32_t open_tag    # generation and state OPEN, as bits 44 to 63 of the load word have them
    uint32_t segment     # index among the router's segments
    uint32_t skip        # number of the acquire that found it full or gone
    uint32_t penalty     # 1: suspect or unreachable; taken only when nobody else is there


cdef struct candidates_t:
    candidate_t* items
    uint32_t count
    uint32_t cursor      # where round-robin stands
    uint32_t* scratch    # `count` indices


cdef class Table:
    cdef candidates_t candidates
    cdef list backends
    cdef list judges       # one per segment of the router
    cdef uint64_t judge_at_ns
    cdef uint64_t judge_every_ns
    cdef void judge(self, uint64_t now_ns, dict unreachable) except *

ctypedef int (*policy_t)(candidates_t* table, uint32_t skip, uint64_t* rng) noexcept nogil

cdef policy_t find_policy(str name) except NULL
cdef Table make_table(list backends, list segments_of, list judges, uint32_t cursor)
cdef bint score_of(const candidate_t* c, double* score) noexcept nogil
