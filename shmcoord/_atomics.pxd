# Declarations of _atomics.h for Cython; the memory order stands in each name.
from libc.stdint cimport uint32_t, uint64_t

cdef extern from "_atomics.h" nogil:
    uint64_t load_relaxed_u64(const uint64_t* p)
    uint64_t load_acquire_u64(const uint64_t* p)
    uint64_t load_seqcst_u64(const uint64_t* p)
    void store_relaxed_u64(uint64_t* p, uint64_t v)
    void store_release_u64(uint64_t* p, uint64_t v)
    uint32_t load_relaxed_u32(const uint32_t* p)
    uint32_t load_acquire_u32(const uint32_t* p)
    uint32_t load_seqcst_u32(const uint32_t* p)
    void store_relaxed_u32(uint32_t* p, uint32_t v)
    void store_release_u32(uint32_t* p, uint32_t v)
    bint cas_seqcst_u64(uint64_t* p, uint64_t expected, uint64_t desired)
    bint cas_seqcst_u32(uint32_t* p, uint32_t expected, uint32_t desired)
    uint64_t add_seqcst_u64(uint64_t* p, uint64_t v)
    uint32_t add_seqcst_u32(uint32_t* p, uint32_t v)
    uint64_t or_seqcst_u64(uint64_t* p, uint64_t v)
    uint64_t and_seqcst_u64(uint64_t* p, uint64_t v)
    void fence_acquire()
    void fence_release()
    void fence_seqcst()
