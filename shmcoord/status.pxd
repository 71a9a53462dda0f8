from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcpy

from shmcoord._atomics cimport *
from shmcoord._layout cimport *
from shmcoord._steps cimport step
from shmcoord.segment cimport Mapping, mapping_t

cdef enum:
    # A writer needs some 10 ns of a copy's life; this many misses is a fault.
    RECORD_READ_TRIES = 64
    STATUS_READ_TRIES = 16


# --- the load word: generation:16 | state:4 | flags:4 | waiting:20 | in flight:20

cdef inline uint32_t word_generation(uint64_t word) noexcept nogil:
    return <uint32_t>(word >> 48)

cdef inline uint32_t word_state(uint64_t word) noexcept nogil:
    return <uint32_t>(word >> 44) & 0xF

cdef inline uint32_t word_flags(uint64_t word) noexcept nogil:
    return <uint32_t>(word >> 40) & 0xF

cdef inline uint32_t word_waiting(uint64_t word) noexcept nogil:
    return <uint32_t>(word >> 20) & 0xFFFFF

cdef inline uint32_t word_inflight(uint64_t word) noexcept nogil:
    return <uint32_t>word & 0xFFFFF

cdef inline uint32_t word_queue(uint64_t word) noexcept nogil:
    """Waiting plus in flight."""
    return word_waiting(word) + word_inflight(word)

cdef inline uint64_t word_make(uint32_t generation, uint32_t state, uint32_t flags,
                               uint32_t waiting, uint32_t inflight) noexcept nogil:
    return (
        <uint64_t>(generation & 0xFFFF) << 48 | <uint64_t>(state & 0xF) << 44
        | <uint64_t>(flags & 0xF) << 40 | <uint64_t>(waiting & 0xFFFFF) << 20
        | <uint64_t>(inflight & 0xFFFFF)
    )

cdef inline bint word_add_inflight(shmc_hot* hot, uint32_t generation,
                                   int64_t delta) noexcept nogil:
    """Move `in flight` of this generation's word by `delta`, clamped; False if it is another's.

    Routers and the owner call it, after the CAS on the lease cell that it stands for.
    """
    cdef uint64_t word, moved
    cdef int64_t inflight
    while True:
        word = load_relaxed_u64(&hot.load)
        if word_generation(word) != (generation & 0xFFFF):
            return False
        inflight = <int64_t>word_inflight(word) + delta
        if inflight < 0:
            inflight = 0
        elif inflight > <int64_t>SHMC_FIELD_MAX:
            inflight = SHMC_FIELD_MAX
        moved = (word & ~<uint64_t>SHMC_FIELD_MAX) | <uint64_t>inflight
        if cas_seqcst_u64(&hot.load, word, moved):
            return True


# --- the record: a two-copy latch, one writer (the slot's owner), any number of readers

cdef inline void record_write(shmc_record* record, const uint64_t* words,
                              uint32_t count) noexcept nogil:
    """Commit the first `count` words as the new record. Only the slot's owner may call this.

    A writer that dies anywhere in here leaves the copy that `seq` names untouched. The fence keeps
    the stores to the other copy behind the commit before this one: a reader that sees any of them
    also sees, on its second look, that `seq` has moved on.
    """
    cdef uint64_t seq = load_relaxed_u64(&record.seq)
    cdef uint64_t* copy = record.copy[(seq + 1) & 1]
    cdef uint32_t i
    fence_release()
    step(b"write.begin")
    for i in range(count):
        store_relaxed_u64(&copy[i], words[i])
        step(b"write.word")
    store_release_u64(&record.seq, seq + 1)
    step(b"write.commit")

cdef inline bint record_read(const shmc_record* record, uint64_t* words,
                             uint32_t count) noexcept nogil:
    """Copy the first `count` words of the committed record; False after too many disturbances."""
    cdef uint64_t seq
    cdef const uint64_t* copy
    cdef uint32_t i
    cdef int _attempt
    for _attempt in range(RECORD_READ_TRIES):
        seq = load_acquire_u64(&record.seq)
        copy = record.copy[seq & 1]
        for i in range(count):
            words[i] = load_relaxed_u64(&copy[i])
        fence_acquire()
        if load_relaxed_u64(&record.seq) == seq:
            return True
    return False

cdef inline double bits_to_double(uint64_t bits) noexcept nogil:
    cdef double value
    memcpy(&value, &bits, 8)
    return value

cdef inline uint64_t double_to_bits(double value) noexcept nogil:
    cdef uint64_t bits
    memcpy(&bits, &value, 8)
    return bits


cdef inline bint slot_is_live(const mapping_t* m, uint32_t slot) noexcept nogil:
    """Whether the slot is claimed (its owner may be dead)."""
    return (load_acquire_u64(&m.bitmap[slot >> 6]) >> (slot & 63)) & 1


cdef class NodeInfo:
    cdef readonly str node, group, endpoint
    cdef readonly tuple gauge_names
    cdef readonly double weight
    cdef readonly uint32_t capacity, generation, pid, slot
    cdef readonly uint64_t interval_ns, slow_start_ns
    cdef readonly double started_at
    cdef bint same_clock
    # Of the node that this one mirrors; incarnation 0: this is a real node.
    cdef readonly uint64_t origin_incarnation
    cdef readonly uint32_t origin_slot, origin_generation

cdef class Status:
    cdef readonly NodeInfo info
    cdef readonly uint32_t waiting, inflight
    cdef int _state, _health
    cdef readonly uint64_t memory_bytes, served, failed
    cdef readonly double cpu_percent, latency_s, uptime_s, heartbeat_age_s
    cdef double _gauges[16]

cdef NodeInfo read_info(const mapping_t* m, uint32_t slot)
cdef Status read_status(const mapping_t* m, NodeInfo info, int health, double heartbeat_age_s)
cdef void meta_write(shmc_meta* target, const shmc_meta* source) noexcept nogil
cdef object state_of(uint64_t word)
cdef object state_enum(int state)
cdef object health_enum(int health)

cdef enum:
    STATE_IDLE = 0
    STATE_BUSY = 1
    STATE_DRAINING = 2
    STATE_SHUTDOWN = 3
    HEALTH_ALIVE = 0
    HEALTH_SUSPECT = 1
    HEALTH_DEAD = 2

cdef inline int word_public_state(uint64_t word) noexcept nogil:
    """STATE_*: IDLE and BUSY follow from the numbers, so that they never disagree with them."""
    cdef uint32_t state = word_state(word)
    if state == SHMC_STATE_OPEN:
        if word & <uint64_t>0xFFFFFFFFFF or word_flags(word) & SHMC_FLAG_BUSY:
            return STATE_BUSY
        return STATE_IDLE
    if state == SHMC_STATE_DRAINING:
        return STATE_DRAINING
    return STATE_SHUTDOWN
