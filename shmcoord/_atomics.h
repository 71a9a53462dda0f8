/* Atomics whose names say their memory order.
 *
 * Why C: Cython has no atomics of its own, and the compiler's builtins need a constant memory
 * order as argument. Every access to shared memory in this project goes through a function of
 * this file, so that the memory order of each one can be read (and searched for) in the code
 * that makes it. Nothing here knows what the words mean.
 *
 * Shared words are plain uint32_t/uint64_t, naturally aligned, never C11 _Atomic: the segment is
 * mapped by other compilers' and other languages' programs too, and the representation of _Atomic
 * types is not promised between them. The builtins are lock-free for both sizes on every platform
 * that is supported, which is asserted below.
 */
#ifndef SHMCOORD_ATOMICS_H
#define SHMCOORD_ATOMICS_H

#include <stdint.h>

#ifndef __linux__
#error "shmcoord needs Linux: robust futexes, open-file-description locks and futex waiting"
#endif

_Static_assert(sizeof(void *) == 8, "shmcoord needs a 64-bit platform (x86-64 or aarch64)");
_Static_assert(__atomic_always_lock_free(8, 0), "64-bit atomics must be lock-free");
_Static_assert(__atomic_always_lock_free(4, 0), "32-bit atomics must be lock-free");

static inline uint64_t load_relaxed_u64(const uint64_t *p) {
    return __atomic_load_n(p, __ATOMIC_RELAXED);
}
static inline uint64_t load_acquire_u64(const uint64_t *p) {
    return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
static inline uint64_t load_seqcst_u64(const uint64_t *p) {
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}
static inline void store_relaxed_u64(uint64_t *p, uint64_t v) {
    __atomic_store_n(p, v, __ATOMIC_RELAXED);
}
static inline void store_release_u64(uint64_t *p, uint64_t v) {
    __atomic_store_n(p, v, __ATOMIC_RELEASE);
}
static inline uint32_t load_relaxed_u32(const uint32_t *p) {
    return __atomic_load_n(p, __ATOMIC_RELAXED);
}
static inline uint32_t load_acquire_u32(const uint32_t *p) {
    return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
static inline uint32_t load_seqcst_u32(const uint32_t *p) {
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}
static inline void store_relaxed_u32(uint32_t *p, uint32_t v) {
    __atomic_store_n(p, v, __ATOMIC_RELAXED);
}
static inline void store_release_u32(uint32_t *p, uint32_t v) {
    __atomic_store_n(p, v, __ATOMIC_RELEASE);
}

/* Compare-and-swap: 1 if *p was `expected` and is now `desired`; 0 otherwise, nothing written. */
static inline int cas_seqcst_u64(uint64_t *p, uint64_t expected, uint64_t desired) {
    return __atomic_compare_exchange_n(p, &expected, desired, 0, __ATOMIC_SEQ_CST,
                                       __ATOMIC_RELAXED);
}
static inline int cas_seqcst_u32(uint32_t *p, uint32_t expected, uint32_t desired) {
    return __atomic_compare_exchange_n(p, &expected, desired, 0, __ATOMIC_SEQ_CST,
                                       __ATOMIC_RELAXED);
}

/* Add, seq_cst; returns the value before. */
static inline uint64_t add_seqcst_u64(uint64_t *p, uint64_t v) {
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);
}
static inline uint32_t add_seqcst_u32(uint32_t *p, uint32_t v) {
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);
}
static inline uint64_t or_seqcst_u64(uint64_t *p, uint64_t v) {
    return __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST);
}
static inline uint64_t and_seqcst_u64(uint64_t *p, uint64_t v) {
    return __atomic_fetch_and(p, v, __ATOMIC_SEQ_CST);
}

static inline void fence_acquire(void) { __atomic_thread_fence(__ATOMIC_ACQUIRE); }
static inline void fence_release(void) { __atomic_thread_fence(__ATOMIC_RELEASE); }
static inline void fence_seqcst(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

#endif /* SHMCOORD_ATOMICS_H */
