# Declarations of _layout.h for Cython. The header is the truth; see its map.
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "_layout.h" nogil:
    const uint64_t SHMC_MAGIC
    const uint64_t SHMC_SIGNATURE
    const long SHMC_FUTEX_OFFSET
    enum:
        SHMC_LAYOUT_MAJOR, SHMC_LAYOUT_MINOR
        SHMC_SLOTS_MAX, SHMC_LEASES_MAX, SHMC_NAME_BYTES, SHMC_ENDPOINT_BYTES
        SHMC_GAUGES_MAX, SHMC_GAUGE_NAME_BYTES, SHMC_RECORD_WORDS
        SHMC_TABLES_OFFSET, SHMC_SYNC_OFFSET, SHMC_BITMAP_OFFSET
        SHMC_KIND_NODE, SHMC_KIND_ROUTER
        SHMC_STATE_OPEN, SHMC_STATE_DRAINING, SHMC_STATE_SHUTDOWN
        SHMC_FLAG_BUSY, SHMC_FIELD_MAX, SHMC_COST_MAX, SHMC_OP_MAX
        SHMC_CELL_GENERATION_MASK
        SHMC_CELL_RESERVED, SHMC_CELL_RUNNING, SHMC_CELL_REMOTE
        SHMC_LOCK_INIT, SHMC_LOCK_MEMBERSHIP, SHMC_READY
        SHMC_R_PUBLISHED_MONO_NS, SHMC_R_MEMORY_BYTES, SHMC_R_CPU_PERCENT, SHMC_R_SERVED
        SHMC_R_FAILED, SHMC_R_LATENCY_S, SHMC_R_GENERATION, SHMC_R_PUBLISHED_WALL_NS
        SHMC_R_STARTED_MONO_NS, SHMC_R_GAUGES
        SHMC_TURNS, SHMC_DECISIONS
        SHMC_DECIDED_LEASE, SHMC_DECIDED_SATURATED, SHMC_DECIDED_NOBODY

    ctypedef struct shmc_header:
        uint64_t magic
        uint16_t layout_major
        uint16_t layout_minor
        uint32_t header_bytes
        uint64_t signature
        uint32_t slots
        uint32_t leases
        uint64_t hot_offset
        uint64_t record_offset
        uint64_t lease_offset
        uint64_t meta_offset
        uint64_t total_bytes
        uint8_t boot_id[16]
        uint32_t creator_uid
        uint32_t creator_pid
        uint64_t created_mono_ns
        uint64_t created_wall_ns
        uint64_t incarnation
        uint32_t mode
        uint32_t ready

    ctypedef struct shmc_sync:
        uint64_t epoch
        uint32_t waiters
        uint64_t late_releases
        uint64_t tickets
        uint64_t retry_debt
        uint64_t mirror

    ctypedef struct shmc_turn:
        uint64_t ticket
        uint64_t group

    ctypedef struct shmc_hot:
        uint64_t load
        uint64_t beats
        uint64_t beat_ns
        uint64_t progress_ns
        uint32_t generation
        uint32_t kind
        uint32_t death
        uint32_t waiting_now
        uint64_t robust_next
        uint64_t refused
        uint32_t latency_us
        uint32_t failures
        uint32_t wake
        uint32_t bell
        uint64_t group
        shmc_turn turn[2]
        uint64_t owed

    ctypedef struct shmc_record:
        uint64_t seq
        uint64_t copy[2][32]

    ctypedef struct shmc_decision:
        uint64_t number
        uint64_t time_ns
        uint64_t group
        uint64_t what

    ctypedef struct shmc_decisions:
        shmc_decision entry[16]

    ctypedef struct shmc_meta:
        char name[64]
        char group[64]
        char endpoint[256]
        uint32_t pid
        uint32_t uid
        uint64_t time_ns_id
        uint64_t started_wall_ns
        uint64_t interval_ns
        double weight
        uint32_t capacity
        uint32_t gauge_count
        uint64_t slow_start_ns
        uint64_t origin_incarnation
        char gauge_names[16][32]
        uint32_t origin_slot
        uint32_t origin_generation

    uint64_t shmc_record_offset(uint64_t slots)
    uint64_t shmc_lease_offset(uint64_t slots)
    uint64_t shmc_meta_offset(uint64_t slots, uint64_t leases)
    uint64_t shmc_total_bytes(uint64_t slots, uint64_t leases)

    uint64_t shmc_mix(uint64_t x)
    uint64_t shmc_hash(const char* bytes, size_t length)
