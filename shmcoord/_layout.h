/* Every byte of a segment. Layout 1.2.
 *
 * A change here changes SHMC_LAYOUT_MAJOR or _MINOR, the map below, the assertions and
 * docs/layout.md in the same commit.
 *
 *   offset            what                    who writes                    who reads
 *   0                 header        (256 B)   the creator, once             everybody, once, at attach
 *   256               sync line     (128 B)   everybody (atomics)           everybody
 *   384               bitmap        (512 B)   claimers and reapers          everybody
 *   4096              hot[slots]    (128 B)   owner; routers: load, cells   everybody
 *   .. record_offset  record[slots] (640 B)   the slot's owner: a node's    everybody
 *                                             status, a router's decisions
 *   .. lease_offset   lease[slots][leases]    CAS by whoever may (below)    everybody
 *   .. meta_offset    meta[slots]   (1024 B)  the claimer, once per claim   everybody
 *
 * All integers are in the byte order of the host, naturally aligned; there are no implicit holes:
 * what is not used is named `reserved` and is zero. Readers trust nothing: offsets are compared
 * with what this header computes from the two counts, and the counts are bounded.
 *
 * Load word (hot.load), one u64:
 *
 *    63        48 47     44 43     40 39            20 19             0
 *   | generation | state   | flags   | waiting        | in flight      |
 *
 *   A single relaxed load is a tear-free sample for routing. It is a hint: routers and the owner
 *   move it by CAS loops which refuse to touch a word of another generation and clamp each field;
 *   the lease cells are the truth, and the owner's beat recounts them. `in flight` is the sum of
 *   the costs of the cells taken (cost 1 unless the router said otherwise).
 *
 * Lease cell, one u64; 0 is free:
 *
 *    63   62 61       50 49              40 39     24 23      0
 *   | state | owner slot| owner generation | cost    | op      |
 *
 *   Taken and freed only by CAS, freed only from the exact value that was put there: by its owner,
 *   by the adopting node (RESERVED(router) -> RUNNING(node)), or by anybody once its owner is dead.
 *   `op` counts the owner's leases, so that a stale value matches again only after 2^24 of them, on
 *   the same cell (ABA). Ten bits of the generation are enough beside it: no cell of a former owner
 *   outlives the next claim of its slot.
 *   A cell that a node runs for a router of another host (REMOTE) has that host's id in `op`: only
 *   its owner frees it, by what it remembers, so it needs no number; whoever publishes the node to
 *   other hosts counts by it whose requests they are.
 *
 * Mirror (sync.mirror): a segment of another host, kept up to date by a bridge process of this one
 *
 *   The bridge owns every node in it, on behalf of the real one: it publishes what the real one
 *   published, moves beats and progress only when news arrives (so their age is the age of what is
 *   known), and holds, as RUNNING(node), as many cells as requests of other hosts the real node has.
 *   Routers reserve here as anywhere; the lease is a reservation among the routers of this host.
 *   Requests of others that find no free cell below the capacity, since routers of this host have
 *   them, stand above it, or nowhere where the row is full: hot.owed counts both, and routers leave
 *   so many free cells alone. Else two hosts that once took the same place would both keep it.
 *   sync.mirror is the id of the host that looks, which the token of a lease carries away.
 *
 * Turns (hot.turn of a router): who waits for capacity, in which order
 *
 *   A router whose callers wait publishes, per group, the ticket of its oldest one (sync.tickets
 *   counts them) and the hash of the group's name. Whoever frees a cell looks for the oldest ticket
 *   of the node's group, makes hot.wake of that router odd and wakes it; a router that was told (its
 *   wake is odd) and has not run yet is passed over. The router makes it even before it looks at the
 *   cells. Where hot.bell is 1 it is woken by a datagram to its socket instead of the futex, so that
 *   an event loop wakes without a thread in between; if the datagram cannot be sent, by the futex. Group hash 0 stands for every group.
 *
 * Death word (hot.death), one u32, a robust futex (see set_robust_list(2)):
 *
 *   0 nobody | thread id of the owner's beat thread: alive | FUTEX_OWNER_DIED set by the kernel: dead
 *
 *   The owner writes it at claim and leave, the kernel at the owner's death, everybody reads it.
 *   hot.robust_next is the owner's private link for the kernel; nobody else looks at it.
 */
#ifndef SHMCOORD_LAYOUT_H
#define SHMCOORD_LAYOUT_H

#include <stddef.h>
#include <stdint.h>

#define SHMC_MAGIC 0x44524f4f434d4853ull /* "SHMCOORD" in little-endian memory */
#define SHMC_LAYOUT_MAJOR 1
#define SHMC_LAYOUT_MINOR 2

#define SHMC_SLOTS_MAX 4096u  /* owner slot has 12 bits in a lease cell */
#define SHMC_LEASES_MAX 1024u /* cells per slot */
#define SHMC_TABLES_OFFSET 4096u
#define SHMC_NAME_BYTES 64u /* node and group names, NUL included */
#define SHMC_ENDPOINT_BYTES 256u
#define SHMC_GAUGES_MAX 16u
#define SHMC_GAUGE_NAME_BYTES 32u
#define SHMC_RECORD_WORDS 32u

/* hot.kind */
#define SHMC_KIND_NODE 1u
#define SHMC_KIND_ROUTER 2u

/* State field of the load word. IDLE and BUSY are not stored: they follow from the numbers. */
#define SHMC_STATE_OPEN 0u
#define SHMC_STATE_DRAINING 1u
#define SHMC_STATE_SHUTDOWN 2u

/* Flags of the load word. */
#define SHMC_FLAG_BUSY 1u /* busy with work of its own */

#define SHMC_FIELD_MAX 0xFFFFFu /* largest `waiting` and `in flight` */
#define SHMC_COST_MAX 0xFFFFu
#define SHMC_OP_MAX 0xFFFFFFu
#define SHMC_CELL_GENERATION_MASK 0x3FFu

/* State field of a lease cell. */
#define SHMC_CELL_RESERVED 1u
#define SHMC_CELL_RUNNING 2u
#define SHMC_CELL_REMOTE 3u /* running, for a router of the host whose id is in `op` */

/* Bytes of the file that carry open-file-description locks; no data is ever there.
 * Slot i's owner lock is byte i. */
#define SHMC_LOCK_INIT (1u << 20)
#define SHMC_LOCK_MEMBERSHIP ((1u << 20) + 1u)

typedef struct {
    uint64_t magic;
    uint16_t layout_major;
    uint16_t layout_minor;
    uint32_t header_bytes;
    uint64_t signature; /* SHMC_SIGNATURE: sizes of all structs as the creator compiled them */
    uint32_t slots;
    uint32_t leases; /* cells per slot */
    uint64_t hot_offset;
    uint64_t record_offset;
    uint64_t lease_offset;
    uint64_t meta_offset;
    uint64_t total_bytes;
    uint8_t boot_id[16];
    uint32_t creator_uid;
    uint32_t creator_pid;
    uint64_t created_mono_ns; /* CLOCK_MONOTONIC */
    uint64_t created_wall_ns; /* CLOCK_REALTIME, for people */
    uint64_t incarnation;     /* random, never 0: tells this segment from its namesakes */
    uint32_t mode;            /* permission bits asked for at creation */
    uint32_t ready;           /* SHMC_READY, stored last, with release order */
    uint8_t reserved[128];
} shmc_header;
#define SHMC_READY 0x59444552u

typedef struct {
    uint64_t epoch;        /* moved when a node is claimed, leaves or is reaped: tables are stale */
    uint32_t reserved0;
    uint32_t waiters;      /* routers that wait for capacity */
    uint64_t late_releases;
    uint64_t tickets;      /* +1 per caller who begins to wait */
    uint64_t retry_debt;   /* thousandths of a retry that the routers have not earned yet; CAS */
    uint64_t mirror;       /* 0, or in a mirror the id of this host; the bridge, before any node */
    uint8_t reserved[80];
} shmc_sync;

/* One group that a router's callers wait for: written by the router, read by whoever frees. */
typedef struct {
    uint64_t ticket; /* of its oldest waiting caller; 0: nobody waits */
    uint64_t group;  /* shmc_hash of the group's name; 0: any group */
} shmc_turn;
#define SHMC_TURNS 2u

typedef struct {
    uint64_t load;        /* see above; owner and routers, CAS */
    uint64_t beats;       /* owner's beat thread only: +1 per interval */
    uint64_t beat_ns;     /* owner's beat thread only: its CLOCK_MONOTONIC at the last beat */
    uint64_t progress_ns; /* owner's Python side only: its CLOCK_MONOTONIC when it last ran */
    uint32_t generation;  /* claimer, under the owner lock: +1 per claim, never 0 */
    uint32_t kind;        /* claimer: SHMC_KIND_* */
    uint32_t death;       /* see above */
    uint32_t waiting_now; /* a router's threads counted in sync.waiters; the reaper takes them off */
    uint64_t robust_next; /* the owner's, for its kernel */
    uint64_t refused;     /* adopts refused by this node (LeaseLost) */
    uint32_t latency_us;  /* node's owner only: smoothed latency, for policies; 0: unknown */
    uint32_t failures;    /* node's owner only: requests that failed since the last that did not */
    uint32_t wake;        /* futex; a router's, see the turns above */
    uint32_t bell;        /* a router's: 1 if a datagram to its socket wakes it, 0 if the futex */
    uint64_t group;       /* claimer: shmc_hash of the node's group */
    shmc_turn turn[SHMC_TURNS]; /* a router's */
    uint64_t owed; /* of a mirrored node, its bridge only: see Mirror above; 0 of all others */
} shmc_hot;

/* From a link to its futex word, as set_robust_list(2) wants it. */
#define SHMC_FUTEX_OFFSET ((long)offsetof(shmc_hot, death) - (long)offsetof(shmc_hot, robust_next))

/* The words of a status record; f64 are stored by their bits. */
enum {
    SHMC_R_PUBLISHED_MONO_NS = 0,
    SHMC_R_MEMORY_BYTES = 1,
    SHMC_R_CPU_PERCENT = 2, /* f64 */
    SHMC_R_SERVED = 3,
    SHMC_R_FAILED = 4,
    SHMC_R_LATENCY_S = 5, /* f64, smoothed */
    SHMC_R_GENERATION = 6,
    SHMC_R_PUBLISHED_WALL_NS = 7,
    SHMC_R_STARTED_MONO_NS = 8,
    SHMC_R_RESERVED = 9, /* 9 .. 15 */
    SHMC_R_GAUGES = 16   /* f64, 16 .. 31 */
};

typedef struct {
    uint64_t seq; /* never goes back, also across owners; copy[seq & 1] is the committed one */
    uint64_t reserved[7];
    uint64_t copy[2][SHMC_RECORD_WORDS];
    uint64_t reserved_tail[8];
} shmc_record;

/* The record of a router: its last decisions, a ring. One writer, the router.
 *
 * An entry is written with `number` 0, then the other words, then its number with release order;
 * a reader takes it if `number` is not 0 and the same before and after. */
#define SHMC_DECISIONS 16u
typedef struct {
    uint64_t number;  /* 1, 2, ...; entry (number - 1) % SHMC_DECISIONS */
    uint64_t time_ns; /* the router's CLOCK_MONOTONIC_COARSE */
    uint64_t group;   /* shmc_hash of the group's name */
    uint64_t what;    /* see below */
} shmc_decision;
typedef struct {
    uint64_t seq; /* of the latch that a node has here: not touched, since it never goes back */
    uint64_t reserved[7];
    shmc_decision entry[SHMC_DECISIONS];
    uint64_t reserved_tail[8];
} shmc_decisions;
/* shmc_decision.what:
 *
 *    63      61 60    49 48        40 39         20 19         0
 *   | outcome  | slot   | waited     | queue      | candidates |
 *
 *   outcome: SHMC_DECIDED_*; slot of the node that was taken; waited: log2 of the microseconds
 *   since the caller asked, times 16 (0: not at all); queue of the node before; candidates of the
 *   group. */
#define SHMC_DECIDED_LEASE 1u
#define SHMC_DECIDED_SATURATED 2u
#define SHMC_DECIDED_NOBODY 3u

typedef struct {
    char name[SHMC_NAME_BYTES]; /* UTF-8, padded with NUL */
    char group[SHMC_NAME_BYTES];
    char endpoint[SHMC_ENDPOINT_BYTES];
    uint32_t pid; /* for display: pids repeat */
    uint32_t uid;
    uint64_t time_ns_id; /* inode of the owner's time namespace: whose clock the times are of */
    uint64_t started_wall_ns;
    uint64_t interval_ns; /* heartbeat interval */
    double weight;
    uint32_t capacity; /* cells that routers may use, 1 .. leases */
    uint32_t gauge_count;
    uint64_t slow_start_ns; /* routers give it its full share this long after it joined */
    uint64_t origin_incarnation; /* of the segment whose node this one mirrors; 0: a real node */
    char gauge_names[SHMC_GAUGES_MAX][SHMC_GAUGE_NAME_BYTES];
    uint32_t origin_slot; /* of the mirrored node, where it lives */
    uint32_t origin_generation;
    uint8_t reserved_tail[56];
} shmc_meta;

/* Hash of a name for turns, decisions and affinity: FNV-1a, then the finisher of SplitMix64 so that
 * every bit depends on every byte. The same in all processes; never 0. */
static inline uint64_t shmc_mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}
static inline uint64_t shmc_hash(const char *bytes, size_t length) {
    uint64_t h = 0xcbf29ce484222325ull;
    for (size_t i = 0; i < length; i++)
        h = (h ^ (uint8_t)bytes[i]) * 0x100000001b3ull;
    h = shmc_mix(h);
    return h ? h : 1;
}

/* One number that differs when any struct differs in size: a second check beside the version. */
#define SHMC_SIGNATURE                                                                            \
    ((uint64_t)sizeof(shmc_header) | (uint64_t)sizeof(shmc_sync) << 12 |                          \
     (uint64_t)sizeof(shmc_hot) << 22 | (uint64_t)sizeof(shmc_record) << 32 |                     \
     (uint64_t)sizeof(shmc_meta) << 44 | (uint64_t)_Alignof(uint64_t) << 60)

#define SHMC_SYNC_OFFSET 256u
#define SHMC_BITMAP_OFFSET 384u
#define SHMC_BITMAP_BYTES (SHMC_SLOTS_MAX / 8u)

_Static_assert(sizeof(void *) == 8, "64-bit hosts only: words of 64 bits hold addresses");
_Static_assert(sizeof(shmc_header) == 256, "header size");
_Static_assert(offsetof(shmc_header, signature) == 16, "signature");
_Static_assert(offsetof(shmc_header, slots) == 24, "slots");
_Static_assert(offsetof(shmc_header, leases) == 28, "leases");
_Static_assert(offsetof(shmc_header, hot_offset) == 32, "hot_offset");
_Static_assert(offsetof(shmc_header, record_offset) == 40, "record_offset");
_Static_assert(offsetof(shmc_header, lease_offset) == 48, "lease_offset");
_Static_assert(offsetof(shmc_header, meta_offset) == 56, "meta_offset");
_Static_assert(offsetof(shmc_header, total_bytes) == 64, "total_bytes");
_Static_assert(offsetof(shmc_header, boot_id) == 72, "boot_id");
_Static_assert(offsetof(shmc_header, creator_uid) == 88, "creator_uid");
_Static_assert(offsetof(shmc_header, created_mono_ns) == 96, "created_mono_ns");
_Static_assert(offsetof(shmc_header, created_wall_ns) == 104, "created_wall_ns");
_Static_assert(offsetof(shmc_header, incarnation) == 112, "incarnation");
_Static_assert(offsetof(shmc_header, mode) == 120, "mode");
_Static_assert(offsetof(shmc_header, ready) == 124, "ready");

_Static_assert(sizeof(shmc_sync) == 128, "sync size");
_Static_assert(offsetof(shmc_sync, waiters) == 12, "waiters");
_Static_assert(offsetof(shmc_sync, tickets) == 24, "tickets");
_Static_assert(offsetof(shmc_sync, retry_debt) == 32, "retry_debt");
_Static_assert(offsetof(shmc_sync, mirror) == 40, "mirror");
_Static_assert(offsetof(shmc_sync, late_releases) == 16, "late_releases");

_Static_assert(sizeof(shmc_hot) == 128, "hot size");
_Static_assert(offsetof(shmc_hot, beats) == 8, "beats");
_Static_assert(offsetof(shmc_hot, beat_ns) == 16, "beat_ns");
_Static_assert(offsetof(shmc_hot, progress_ns) == 24, "progress_ns");
_Static_assert(offsetof(shmc_hot, generation) == 32, "generation");
_Static_assert(offsetof(shmc_hot, kind) == 36, "kind");
_Static_assert(offsetof(shmc_hot, death) == 40, "death");
_Static_assert(offsetof(shmc_hot, waiting_now) == 44, "waiting_now");
_Static_assert(offsetof(shmc_hot, robust_next) == 48, "robust_next");
_Static_assert(offsetof(shmc_hot, refused) == 56, "refused");

_Static_assert(offsetof(shmc_hot, latency_us) == 64, "latency_us");
_Static_assert(offsetof(shmc_hot, failures) == 68, "failures");
_Static_assert(offsetof(shmc_hot, wake) == 72, "wake");
_Static_assert(offsetof(shmc_hot, bell) == 76, "bell");
_Static_assert(offsetof(shmc_hot, group) == 80, "group");
_Static_assert(offsetof(shmc_hot, turn) == 88, "turn");
_Static_assert(offsetof(shmc_hot, owed) == 120, "owed");

_Static_assert(sizeof(shmc_decisions) == sizeof(shmc_record), "a router's record");
_Static_assert(offsetof(shmc_decisions, entry) == 64, "entry");
_Static_assert(sizeof(shmc_record) == 640, "record size");
_Static_assert(offsetof(shmc_record, copy) == 64, "copy");

_Static_assert(sizeof(shmc_meta) == 1024, "meta size");
_Static_assert(offsetof(shmc_meta, group) == 64, "group");
_Static_assert(offsetof(shmc_meta, endpoint) == 128, "endpoint");
_Static_assert(offsetof(shmc_meta, pid) == 384, "pid");
_Static_assert(offsetof(shmc_meta, uid) == 388, "uid");
_Static_assert(offsetof(shmc_meta, time_ns_id) == 392, "time_ns_id");
_Static_assert(offsetof(shmc_meta, started_wall_ns) == 400, "started_wall_ns");
_Static_assert(offsetof(shmc_meta, interval_ns) == 408, "interval_ns");
_Static_assert(offsetof(shmc_meta, weight) == 416, "weight");
_Static_assert(offsetof(shmc_meta, capacity) == 424, "capacity");
_Static_assert(offsetof(shmc_meta, gauge_count) == 428, "gauge_count");
_Static_assert(offsetof(shmc_meta, slow_start_ns) == 432, "slow_start_ns");
_Static_assert(offsetof(shmc_meta, origin_incarnation) == 440, "origin_incarnation");
_Static_assert(offsetof(shmc_meta, gauge_names) == 448, "gauge_names");
_Static_assert(offsetof(shmc_meta, origin_slot) == 960, "origin_slot");
_Static_assert(offsetof(shmc_meta, origin_generation) == 964, "origin_generation");

_Static_assert(SHMC_SYNC_OFFSET == sizeof(shmc_header), "sync line follows the header");
_Static_assert(SHMC_BITMAP_OFFSET == SHMC_SYNC_OFFSET + sizeof(shmc_sync), "bitmap follows");
_Static_assert(SHMC_BITMAP_OFFSET + SHMC_BITMAP_BYTES <= SHMC_TABLES_OFFSET, "bitmap fits");

/* Offsets derive from the two counts alone. */
static inline uint64_t shmc_record_offset(uint64_t slots) {
    return SHMC_TABLES_OFFSET + slots * sizeof(shmc_hot);
}
static inline uint64_t shmc_lease_offset(uint64_t slots) {
    return shmc_record_offset(slots) + slots * sizeof(shmc_record);
}
static inline uint64_t shmc_meta_offset(uint64_t slots, uint64_t leases) {
    uint64_t end = shmc_lease_offset(slots) + slots * leases * 8u;
    return (end + 127u) & ~(uint64_t)127u;
}
static inline uint64_t shmc_total_bytes(uint64_t slots, uint64_t leases) {
    uint64_t end = shmc_meta_offset(slots, leases) + slots * sizeof(shmc_meta);
    return (end + 4095u) & ~(uint64_t)4095u;
}

#endif /* SHMCOORD_LAYOUT_H */
