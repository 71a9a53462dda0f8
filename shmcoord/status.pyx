# cython: language_level=3, boundscheck=False, wraparound=False
"""Publish and read what one node says of itself; the load word.

Three kinds of memory make up a status. `meta` (name, group, endpoint, capacity ...) is written
once per claim and cached by readers per generation. The *load word* moves with each request and
is read in one load. The *record* (memory, CPU, counters, gauges) is a two-copy latch: the owner
fills the copy that is not current and then moves the sequence; a reader that was overtaken tries
again, and a writer that dies in the middle leaves the last committed copy readable. See the
functions in status.pxd, which are inline so that other native code can use them.
"""
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memchr

from shmcoord._posix cimport mono_ns

import enum

GAUGES_MAX = SHMC_GAUGES_MAX
INTERVAL_MIN_NS = 1_000_000
INTERVAL_MAX_NS = 3_600_000_000_000
WEIGHT_MIN = 1e-6
WEIGHT_MAX = 1e6


class State(enum.IntEnum):
    """What a node takes. IDLE and BUSY follow from its numbers; the others are set by its owner."""

    IDLE = STATE_IDLE
    BUSY = STATE_BUSY
    DRAINING = STATE_DRAINING
    SHUTDOWN = STATE_SHUTDOWN

    def __str__(self):
        return self.name


class Health(enum.IntEnum):
    """ALIVE; SUSPECT: its heartbeat is late; DEAD: the kernel says that its process ended."""

    ALIVE = HEALTH_ALIVE
    SUSPECT = HEALTH_SUSPECT
    DEAD = HEALTH_DEAD

    def __str__(self):
        return self.name


#: From which state a node may go to which, and by what.
TRANSITIONS = {
    (State.IDLE, State.BUSY): "a request begins or is reserved; waiting or busy is set",
    (State.BUSY, State.IDLE): "the last request ends",
    (State.IDLE, State.DRAINING): "drain()",
    (State.BUSY, State.DRAINING): "drain()",
    (State.DRAINING, State.IDLE): "resume(), nothing in flight",
    (State.DRAINING, State.BUSY): "resume(), requests in flight",
    (State.IDLE, State.SHUTDOWN): "shutdown() or leave()",
    (State.BUSY, State.SHUTDOWN): "shutdown() or leave()",
    (State.DRAINING, State.SHUTDOWN): "shutdown() or leave()",
}

cdef tuple _STATES = tuple(State)
cdef tuple _HEALTHS = tuple(Health)


# Set around the only places that make these objects: they are made of memory, never of arguments
# (and never by copying). Put back to what it was, since making one may run the garbage collector,
# and that anything.
cdef bint _making = False


cdef object state_enum(int state):
    return _STATES[state]


cdef object health_enum(int health):
    return _HEALTHS[health]


cdef object state_of(uint64_t word):
    return _STATES[word_public_state(word)]


cdef str _text(const char* raw, size_t size):
    """Text up to the first NUL of a fixed field; never reads past it, never fails."""
    cdef const char* end = <const char*>memchr(raw, 0, size)
    cdef size_t length = size if end == NULL else <size_t>(end - raw)
    return raw[:length].decode("utf-8", "replace")


cdef void meta_write(shmc_meta* target, const shmc_meta* source) noexcept nogil:
    """Copy a whole meta entry into the segment, word by word. Caller: the claimer of the slot.

    The claimer has moved the slot's generation before; the fence lets no word of the new entry be
    seen by a reader that does not see the new generation on its second look.
    """
    cdef const uint64_t* words = <const uint64_t*>source
    cdef uint64_t* to = <uint64_t*>target
    cdef uint32_t i
    fence_release()
    for i in range(sizeof(shmc_meta) // 8):
        store_relaxed_u64(&to[i], words[i])


cdef NodeInfo read_info(const mapping_t* m, uint32_t slot):
    """What the node in `slot` wrote at its claim; None if there is no node."""
    global _making
    cdef bint before
    cdef shmc_meta meta
    cdef uint64_t* words = <uint64_t*>&meta
    cdef const uint64_t* source = <const uint64_t*>&m.meta[slot]
    cdef const shmc_hot* hot = &m.hot[slot]
    cdef uint32_t i, generation, count
    cdef int _attempt
    cdef NodeInfo info
    for _attempt in range(STATUS_READ_TRIES):
        generation = load_acquire_u32(&hot.generation)
        if not slot_is_live(m, slot) or load_relaxed_u32(&hot.kind) != SHMC_KIND_NODE:
            return None
        for i in range(sizeof(shmc_meta) // 8):
            words[i] = load_relaxed_u64(&source[i])
        fence_acquire()
        if load_relaxed_u32(&hot.generation) == generation:
            break
    else:
        return None
    before = _making
    _making = True
    info = NodeInfo.__new__(NodeInfo)
    _making = before
    info.slot = slot
    info.generation = generation
    info.node = _text(meta.name, SHMC_NAME_BYTES)
    info.group = _text(meta.group, SHMC_NAME_BYTES)
    info.endpoint = _text(meta.endpoint, SHMC_ENDPOINT_BYTES)
    info.pid = meta.pid
    info.started_at = meta.started_wall_ns / 1e9
    info.same_clock = meta.time_ns_id == m.time_ns_id
    # Everything below comes from memory that others can write: bounded before use.
    info.weight = meta.weight if 1e-6 <= meta.weight <= 1e6 else 1.0
    info.capacity = min(max(meta.capacity, 1), m.leases)
    info.interval_ns = min(
        max(meta.interval_ns, <uint64_t>INTERVAL_MIN_NS), <uint64_t>INTERVAL_MAX_NS
    )
    info.slow_start_ns = min(meta.slow_start_ns, <uint64_t>INTERVAL_MAX_NS)
    info.origin_incarnation = meta.origin_incarnation
    info.origin_slot = meta.origin_slot
    info.origin_generation = meta.origin_generation
    count = min(meta.gauge_count, <uint32_t>SHMC_GAUGES_MAX)
    names = []
    for i in range(count):
        names.append(_text(meta.gauge_names[i], SHMC_GAUGE_NAME_BYTES))
    info.gauge_names = tuple(names)
    return info


cdef Status read_status(const mapping_t* m, NodeInfo info, int health, double heartbeat_age_s):
    """The status of the node that `info` describes; None if the slot has changed hands."""
    global _making
    cdef bint before
    cdef uint64_t words[32]
    cdef uint64_t word
    cdef shmc_hot* hot = &m.hot[info.slot]
    cdef uint32_t count = SHMC_R_GAUGES + <uint32_t>len(info.gauge_names)
    cdef uint32_t i
    cdef int _attempt
    cdef int64_t up_ns
    cdef Status status
    for _attempt in range(STATUS_READ_TRIES):
        word = load_acquire_u64(&hot.load)
        if not record_read(&m.record[info.slot], words, count):
            continue
        fence_acquire()
        if load_relaxed_u32(&hot.generation) != info.generation:
            return None
        if (
            word_generation(word) == info.generation & 0xFFFF
            and words[SHMC_R_GENERATION] == info.generation
        ):
            break
    else:
        return None
    before = _making
    _making = True
    status = Status.__new__(Status)
    _making = before
    status.info = info
    status.waiting = word_waiting(word)
    status.inflight = word_inflight(word)
    status._state = word_public_state(word)
    status._health = health
    status.memory_bytes = words[SHMC_R_MEMORY_BYTES]
    status.cpu_percent = bits_to_double(words[SHMC_R_CPU_PERCENT])
    status.served = words[SHMC_R_SERVED]
    status.failed = words[SHMC_R_FAILED]
    status.latency_s = bits_to_double(words[SHMC_R_LATENCY_S])
    if info.same_clock:
        up_ns = <int64_t>(mono_ns() - words[SHMC_R_STARTED_MONO_NS])
    else:  # another time namespace: its own clock at its own last publication
        up_ns = <int64_t>(words[SHMC_R_PUBLISHED_MONO_NS] - words[SHMC_R_STARTED_MONO_NS])
    status.uptime_s = max(up_ns, 0) / 1e9
    status.heartbeat_age_s = heartbeat_age_s
    for i in range(count - SHMC_R_GAUGES):
        status._gauges[i] = bits_to_double(words[SHMC_R_GAUGES + i])
    return status


cdef class NodeInfo:
    """What a node wrote once, at its claim. Cached by readers per slot and generation."""

    def __cinit__(self):
        if not _making:
            raise TypeError("NodeInfo is made by reading a segment")


cdef class Status:
    """An immutable view of one node, consistent in itself.

    Attributes:
        node, group, endpoint: what the node joined with.
        state: IDLE, BUSY, DRAINING or SHUTDOWN.
        health: ALIVE, SUSPECT (heartbeat late) or DEAD (process ended).
        queue: waiting + in flight, in units of cost (1 per request unless a router said otherwise).
        waiting: work queued inside the process.
        inflight: reserved and running requests.
        capacity: leases that it takes at once.
        weight: share of the load relative to others (queue is divided by it).
        memory_bytes, cpu_percent: resident memory, and CPU since the last beat (100 = one core).
        served, failed: requests ended, and those of them that failed.
        latency_s: smoothed time from begin to end of a request, seconds; 0 before the first.
        gauges: user gauges by name.
        pid: process id, for display.
        uptime_s: since it joined, seconds.
        heartbeat_age_s: since its last evidence of life, seconds.
    """

    def __cinit__(self):
        if not _making:
            raise TypeError("Status is made by reading a segment")

    @property
    def node(self):
        return self.info.node

    @property
    def group(self):
        return self.info.group

    @property
    def endpoint(self):
        return self.info.endpoint

    @property
    def state(self):
        return _STATES[self._state]

    @property
    def health(self):
        return _HEALTHS[self._health]

    @property
    def queue(self):
        return self.waiting + self.inflight

    @property
    def capacity(self):
        return self.info.capacity

    @property
    def weight(self):
        return self.info.weight

    @property
    def pid(self):
        return self.info.pid

    @property
    def gauges(self):
        return {name: self._gauges[i] for i, name in enumerate(self.info.gauge_names)}

    def _as_tuple(self):
        return tuple(getattr(self, name) for name in FIELDS)

    def __eq__(self, other):
        if not isinstance(other, Status):
            return NotImplemented
        return self._as_tuple() == (<Status>other)._as_tuple()

    def __hash__(self):
        return hash(
            (self.info.node, self.info.generation, self.waiting, self.inflight, self.served)
        )

    def __repr__(self):
        return (
            f"<Status {self.node} of {self.group}: {self.state.name}, queue {self.queue}, "
            f"{self.health.name}>"
        )


#: Attributes of `Status`, in the order in which documents and tables list them.
FIELDS = (
    "node", "group", "endpoint", "state", "health", "queue", "waiting", "inflight", "capacity",
    "weight", "memory_bytes", "cpu_percent", "served", "failed", "latency_s", "gauges", "pid",
    "uptime_s", "heartbeat_age_s",
)
