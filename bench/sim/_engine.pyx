# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The simulation's event loop: requests, routers and nodes in memory of its own.

Where a request goes is decided by the scan of `shmcoord.picker` that routers call, over tables as
routers have them; only what the tables point to is not a segment but an array of this module. No
Python runs in the loop. Single-threaded: the words are moved by plain stores.
"""
cimport cython
from libc.math cimport INFINITY, ceil, pow
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memset

from bench.sim._cache cimport cache_t, cache_use
from bench.sim._heap cimport event_t, heap_pop, heap_push, heap_t
from bench.sim._histogram cimport BUCKETS, bucket_of, histogram_quantile
from bench.sim._random cimport (
    mix,
    random_below,
    random_exponential,
    random_lognormal,
    random_seed,
    random_t,
    random_unit,
)
from shmcoord._layout cimport SHMC_FIELD_MAX, SHMC_STATE_OPEN, shmc_hash, shmc_hot
from shmcoord.picker cimport (
    allocate,
    candidate_t,
    candidates_t,
    find_policy,
    pick_t,
    policy_t,
    random_unit as pick_unit,
    release,
)
from shmcoord.status cimport word_make, word_queue

cdef extern from "<stdlib.h>" nogil:
    void* aligned_alloc(size_t alignment, size_t size)

cdef enum:
    NOBODY = 0xFFFFFFFFu
    GENERATION = 1
    BATCHES = 20           # for standard errors: the requests in this many consecutive parts
    LEVELS = 64            # queue lengths told apart

# What an event is.
cdef enum:
    FINISH = 0             # index: a request
    REFRESH_VIEW = 1       # index: a view
    REFRESH_NODE = 2       # index: a node
    BEAT = 3               # index: a node

# Since when a node's latency counts: since the request was sent to it, or since work on it began
# (a handler that starts when a thread is free sees no more).
LATENCIES = ("work", "queue")

WORKS = ("deterministic", "exponential", "bimodal", "lognormal")
cdef enum:
    DETERMINISTIC = 0
    EXPONENTIAL = 1
    BIMODAL = 2
    LOGNORMAL = 3

BINDINGS = ("early", "late", "late-random", "bound")
cdef enum:
    EARLY = 0              # at once, to queue inside the node
    LATE = 1               # when a node has room; one first-come queue of all routers
    LATE_RANDOM = 2        # the same, but any router that waits may be the one that is woken
    BOUND = 3              # one first-come queue, no routers at all

PHASES = ("routers", "same", "nodes")
cdef enum:
    BY_ROUTER = 0          # each router copies all words, at its own times
    SAME = 1               # all routers at the same times
    BY_NODE = 2            # each node publishes its word, at its own times

# Bimodal work, as parts of the mean: 95 % of 5 ms and 5 % of 100 ms have a mean of 9.75 ms.
cdef double _SHORT = 5.0 / 9.75, _LONG = 100.0 / 9.75, _LONG_PART = 0.05
# Gain of a node's smoothed latency, and how often one that served nothing halves it: as
# shmcoord.node has it.
cdef double _GAIN = 0.125, _INTERVAL_S = 2.0


cdef struct request_t:
    double arrived_s
    double bound_s         # when it came to its node
    double began_s
    double work_s
    uint64_t serial
    uint32_t router
    uint32_t node
    uint32_t cost
    uint32_t key
    uint32_t next          # in a queue, or in the list of free ones


cdef struct queue_t:
    uint32_t head
    uint32_t tail


cdef struct node_t:
    queue_t queue
    uint32_t busy
    uint32_t servers
    uint32_t held          # requests on it, queued and in work
    uint64_t cost          # of those
    double speed
    double latency_s
    bint has_served        # since its last beat


cdef inline int call_policy(policy_t scan, candidates_t* table, uint32_t skip, uint32_t cost,
                            uint64_t key, uint64_t* rng) noexcept nogil:
    """The one place where the picker is called."""
    cdef pick_t pick
    pick.skip = skip
    pick.cost = cost
    pick.key = key
    pick.rng = rng
    return scan(table, &pick)


cdef int _first_least(candidates_t* table, const pick_t* pick) noexcept nogil:
    """Not in shmcoord: the least queue, and of equals the first. How many simple routers choose."""
    cdef uint32_t i, queue, least = 0
    cdef int found = -1
    cdef const candidate_t* c
    for i in range(table.count):
        c = &table.items[i]
        queue = word_queue(c.hot.load)
        if c.skip != pick.skip and (found < 0 or queue < least):
            found, least = <int>i, queue
    return found


cdef policy_t _policy_of(str name) except NULL:
    """The production scan of this name; one that is not in shmcoord is here to be compared with."""
    if name == "least-first":
        return _first_least
    return find_policy(name)


cdef inline void set_candidate(candidates_t* table, uint32_t node, const shmc_hot* hot,
                               double weight, uint32_t capacity) noexcept nogil:
    """A table's entry as `shmcoord.table.make_table` writes it, for nodes of the same capacity."""
    cdef candidate_t* c = &table.items[node]
    c.hot = hot
    c.inverse_weight = 1.0 / weight
    c.open_tag = GENERATION << 4 | SHMC_STATE_OPEN
    c.capacity = <unsigned short>capacity
    table.hashes[node] = mix(~<uint64_t>node)


cdef inline void set_hot(shmc_hot* hot, uint64_t cost) noexcept nogil:
    """The load word of a living, open node with so much in flight."""
    hot.load = word_make(
        GENERATION, SHMC_STATE_OPEN, 0, 0,
        <uint32_t>(cost if cost < SHMC_FIELD_MAX else SHMC_FIELD_MAX),
    )


cdef shmc_hot* make_hot(uint64_t count) except NULL:
    cdef uint64_t i
    cdef shmc_hot* hot = <shmc_hot*>aligned_alloc(128, (count + 1) * sizeof(shmc_hot))
    if hot == NULL:
        raise MemoryError()
    memset(hot, 0, count * sizeof(shmc_hot))
    for i in range(count):
        hot[i].generation = GENERATION
        hot[i].death = 1
        set_hot(&hot[i], 0)
    return hot


@cython.final
cdef class Engine:
    """One simulation; `engine.Point` says what the arguments mean."""

    cdef policy_t scan
    cdef uint32_t nodes, routers, binding, phases, work, views, attempt
    cdef double arrival_rate, mean_s, sigma, age_s, burst, hit_factor
    cdef bint is_own, is_work_cost, is_work_latency
    cdef uint64_t requests, warmup
    # The words as they are, and as routers see them: `views` copies, or the same array.
    cdef shmc_hot* hot
    cdef shmc_hot* seen
    cdef uint32_t* view_of
    cdef candidates_t* tables
    cdef uint64_t* rngs
    cdef node_t* node
    cdef request_t* pool
    cdef uint32_t pool_room, pool_free
    cdef heap_t heap
    # Free servers, of each of two kinds of nodes, fast before slow (the bound takes the fastest).
    cdef uint32_t* idle
    cdef uint32_t idle_slow, idle_fast, servers_fast
    # Requests that wait for room: one queue, or one per router and the routers that have any.
    cdef queue_t* waiting
    cdef uint32_t* waiters
    cdef uint32_t waiters_count
    cdef uint64_t room, servers
    cdef double speed_total
    # Keys.
    cdef uint32_t keys
    cdef double* key_limits
    cdef cache_t cache
    cdef uint64_t hits, looked_up
    # Streams of random numbers: what arrives is the same whatever the policy.
    cdef random_t arrivals, works, others
    # Measured.
    cdef double now_s, counted_s, area, busy, begin_s, end_s, begin_area, begin_busy
    cdef double end_area, end_busy, sojourn_sum, max_s, work_done
    cdef double batch_sum[BATCHES]
    cdef uint64_t batch_count[BATCHES]
    cdef uint64_t* counts
    cdef uint64_t in_system, finished, waited
    cdef double busy_speed
    cdef uint64_t level[LEVELS + 1]
    cdef double level_since[LEVELS + 1]
    cdef double level_area[LEVELS + 1]
    cdef uint64_t* sent
    cdef bint is_measuring, is_out_of_memory

    def __cinit__(self, **options):
        self.pool_free = NOBODY

    def __dealloc__(self):
        cdef uint32_t i
        if self.seen != self.hot:
            free(self.seen)
        free(self.hot)
        free(self.view_of)
        if self.tables != NULL:
            for i in range(self.routers):
                release(&self.tables[i])
        free(self.tables)
        free(self.rngs)
        free(self.node)
        free(self.pool)
        free(self.heap.events)
        free(self.idle)
        free(self.waiting)
        free(self.waiters)
        free(self.key_limits)
        free(self.cache.after)
        free(self.cache.before)
        free(self.cache.filled)
        free(self.counts)
        free(self.sent)

    def __init__(self, *, str policy, uint32_t nodes, uint32_t routers, double load, str work,
                 double mean_s, double sigma, uint32_t capacity, uint32_t slow, double slow_speed,
                 bint weights, double age_s, bint own, str phases, str binding, double burst,
                 uint32_t keys, double zipf, uint32_t cache, double hit_factor, str cost,
                 str latency, uint64_t requests, uint64_t warmup, uint64_t seed):
        cdef uint32_t i
        self.scan = _policy_of(policy)
        self.nodes, self.routers = nodes, routers
        self.work = WORKS.index(work)
        self.binding = BINDINGS.index(binding)
        self.phases = PHASES.index(phases)
        self.mean_s, self.sigma = mean_s, sigma
        self.age_s, self.is_own, self.burst = age_s, own, burst
        self.keys, self.hit_factor, self.is_work_cost = keys, hit_factor, cost == "work"
        self.is_work_latency = latency == "work"
        self.requests, self.warmup = requests, warmup
        random_seed(&self.arrivals, seed, 1)
        random_seed(&self.works, seed, 2)
        random_seed(&self.others, seed, 3)
        self._make_nodes(capacity, slow, slow_speed)
        self.arrival_rate = load * self.speed_total / mean_s
        self._make_views()
        self._make_tables(weights, capacity, slow, slow_speed, seed)
        self._make_keys(zipf, cache)
        self.counts = <uint64_t*>calloc(BATCHES * BUCKETS, sizeof(uint64_t))
        self.sent = <uint64_t*>calloc(nodes, sizeof(uint64_t))
        self.waiting = <queue_t*>calloc(routers, sizeof(queue_t))
        self.waiters = <uint32_t*>calloc(routers, sizeof(uint32_t))
        if (
            self.counts == NULL or self.sent == NULL or self.waiting == NULL
            or self.waiters == NULL
        ):
            raise MemoryError()
        for i in range(routers):
            self.waiting[i].head = self.waiting[i].tail = NOBODY
        self._plan_refreshes()
        if self.is_out_of_memory:
            raise MemoryError()
        self.level[0] = nodes

    cdef int _make_nodes(self, uint32_t capacity, uint32_t slow, double slow_speed) except -1:
        """The first `slow` nodes are the slow ones."""
        cdef uint32_t i, k
        self.servers = <uint64_t>self.nodes * capacity
        self.node = <node_t*>calloc(self.nodes, sizeof(node_t))
        self.idle = <uint32_t*>calloc(self.servers, sizeof(uint32_t))
        if self.node == NULL or self.idle == NULL:
            raise MemoryError()
        for i in range(self.nodes):
            self.node[i].queue.head = self.node[i].queue.tail = NOBODY
            self.node[i].servers = capacity
            self.node[i].speed = slow_speed if i < slow else 1.0
            self.speed_total += capacity * self.node[i].speed
            for k in range(capacity):
                self.idle[<uint64_t>i * capacity + k] = i
        self.idle_slow = slow * capacity
        self.servers_fast = self.idle_fast = <uint32_t>(self.servers - self.idle_slow)
        self.room = self.servers
        return 0

    cdef int _make_views(self) except -1:
        self.hot = make_hot(self.nodes)
        self.view_of = <uint32_t*>calloc(self.routers, sizeof(uint32_t))
        if self.view_of == NULL:
            raise MemoryError()
        if self.age_s == 0.0:
            self.seen = self.hot
            self.views = 0
            return 0
        # Who sees the same may share a copy.
        self.views = self.routers if self.is_own or self.phases == BY_ROUTER else 1
        self.seen = make_hot(<uint64_t>self.views * self.nodes)
        if self.views > 1:
            for i in range(self.routers):
                self.view_of[<uint32_t>i] = <uint32_t>i
        return 0

    cdef int _make_tables(self, bint weights, uint32_t capacity, uint32_t slow,
                          double slow_speed, uint64_t seed) except -1:
        cdef uint32_t i, k
        cdef shmc_hot* seen
        cdef candidates_t* table
        # Who binds early fills no node: leases queue inside it.
        cdef uint32_t most = 0xFFFF if self.binding == EARLY else capacity
        self.tables = <candidates_t*>calloc(self.routers, sizeof(candidates_t))
        self.rngs = <uint64_t*>calloc(self.routers, sizeof(uint64_t))
        if self.tables == NULL or self.rngs == NULL:
            raise MemoryError()
        for i in range(self.routers):
            self.rngs[i] = mix(mix(seed) + i) | 1
            seen = self.seen + <size_t>self.view_of[i] * self.nodes
            table = &self.tables[i]
            if not allocate(table, self.nodes):
                raise MemoryError()
            for k in range(self.nodes):
                set_candidate(
                    table, k, &seen[k], slow_speed if weights and k < slow else 1.0, most
                )
                table.turns[k] = pick_unit(&self.rngs[i]) / table.items[k].inverse_weight
        return 0

    cdef int _make_keys(self, double zipf, uint32_t cache) except -1:
        """Key k (from 0) is asked for in proportion to (k + 1) ** -zipf."""
        cdef uint32_t i, k
        cdef size_t row = self.keys + 1
        cdef double total = 0.0
        if self.keys == 0:
            return 0
        self.key_limits = <double*>calloc(self.keys, sizeof(double))
        if self.key_limits == NULL:
            raise MemoryError()
        for k in range(self.keys):
            total += pow(k + 1.0, -zipf)
            self.key_limits[k] = total
        for k in range(self.keys):
            self.key_limits[k] /= total
        if cache == 0:
            return 0
        self.cache.keys, self.cache.room = self.keys, cache
        self.cache.after = <uint32_t*>calloc(row * self.nodes, sizeof(uint32_t))
        self.cache.before = <uint32_t*>calloc(row * self.nodes, sizeof(uint32_t))
        self.cache.filled = <uint32_t*>calloc(self.nodes, sizeof(uint32_t))
        if self.cache.after == NULL or self.cache.before == NULL or self.cache.filled == NULL:
            raise MemoryError()
        memset(self.cache.after, 0xFF, row * self.nodes * sizeof(uint32_t))
        for i in range(self.nodes):
            self.cache.after[i * row + self.keys] = self.keys
            self.cache.before[i * row + self.keys] = self.keys
        return 0

    cdef void _plan_refreshes(self) noexcept nogil:
        cdef uint32_t i
        for i in range(self.nodes):
            self._at(_INTERVAL_S * random_unit(&self.others), BEAT, i)
        if self.age_s == 0.0 or self.age_s == INFINITY:
            return
        if self.phases == BY_NODE:
            for i in range(self.nodes):
                self._at(self.age_s * random_unit(&self.others), REFRESH_NODE, i)
        elif self.phases == BY_ROUTER:
            for i in range(self.views):
                self._at(self.age_s * random_unit(&self.others), REFRESH_VIEW, i)
        else:
            for i in range(self.views):
                self._at(self.age_s, REFRESH_VIEW, i)

    # --- the loop

    def run(self):
        """Runs to the end: until the last request has left. Returns what was measured."""
        with nogil:
            self._run()
        if self.is_out_of_memory:
            raise MemoryError()
        return self._result()

    cdef void _run(self) noexcept nogil:
        cdef uint64_t serial = 0, together = 0
        cdef event_t event
        cdef double arrival_s = self._next_group(&together)
        while serial < self.requests or self.in_system:
            if self.is_out_of_memory:
                return
            if serial < self.requests and (
                self.heap.count == 0 or arrival_s < self.heap.events[0].at_s
            ):
                self._count_time(arrival_s)
                if serial == self.warmup:
                    self._begin()
                self._arrive(serial)
                serial += 1
                together -= 1
                if together == 0:
                    arrival_s = self.now_s + self._next_group(&together)
                if serial == self.requests:
                    self._end()
                continue
            event = heap_pop(&self.heap)
            self._count_time(event.at_s)
            if event.kind == FINISH:
                self._finish(event.index)
            elif event.kind == REFRESH_VIEW:
                self._refresh_view(event.index)
            elif event.kind == REFRESH_NODE:
                self._refresh_node(event.index)
            else:
                self._beat(event.index)

    cdef inline void _at(self, double at_s, uint32_t kind, uint32_t index) noexcept nogil:
        if not heap_push(&self.heap, at_s, kind, index):
            self.is_out_of_memory = True

    cdef inline double _next_group(self, uint64_t* together) noexcept nogil:
        """Time to the next arrival, and how many come in it: geometric with the mean `burst`."""
        together[0] = 1
        if self.burst > 1.0:
            while random_unit(&self.arrivals) > 1.0 / self.burst:
                together[0] += 1
        return self.burst * random_exponential(&self.arrivals) / self.arrival_rate

    cdef inline double _draw_work(self) noexcept nogil:
        if self.work == EXPONENTIAL:
            return self.mean_s * random_exponential(&self.works)
        if self.work == BIMODAL:
            return self.mean_s * (_LONG if random_unit(&self.works) <= _LONG_PART else _SHORT)
        if self.work == LOGNORMAL:
            return self.mean_s * random_lognormal(&self.works, self.sigma)
        return self.mean_s

    cdef inline uint32_t _draw_key(self) noexcept nogil:
        cdef double u = random_unit(&self.works)
        cdef uint32_t low = 0, high = self.keys - 1, middle
        while low < high:
            middle = (low + high) >> 1
            if self.key_limits[middle] < u:
                low = middle + 1
            else:
                high = middle
        return low

    cdef uint32_t _new_request(self) noexcept nogil:
        cdef uint32_t i, room
        cdef request_t* grown
        if self.pool_free == NOBODY:
            room = 2 * self.pool_room + 256
            grown = <request_t*>realloc(self.pool, room * sizeof(request_t))
            if grown == NULL:
                self.is_out_of_memory = True
                return NOBODY
            self.pool = grown
            for i in range(self.pool_room, room):
                grown[i].next = self.pool_free
                self.pool_free = i
            self.pool_room = room
        i = self.pool_free
        self.pool_free = self.pool[i].next
        return i

    cdef void _arrive(self, uint64_t serial) noexcept nogil:
        cdef uint32_t index = self._new_request()
        cdef request_t* r
        if index == NOBODY:
            return
        r = &self.pool[index]
        r.arrived_s = self.now_s
        r.serial = serial
        r.work_s = self._draw_work()
        r.router = random_below(&self.arrivals, self.routers) if self.routers > 1 else 0
        r.cost = 1
        if self.is_work_cost:
            r.cost = <uint32_t>ceil(8.0 * r.work_s / self.mean_s)
            if r.cost == 0:
                r.cost = 1
            elif r.cost > 0xFFFF:
                r.cost = 0xFFFF
        r.key = self._draw_key() if self.keys else 0
        self.in_system += 1
        if self.binding == EARLY:
            self._put(index, <uint32_t>self._pick(r, NOBODY))
        elif self.room == 0:
            self.waited += 1
            self._wait(index)
        else:
            self._put(index, self._find_room(r))

    cdef inline int _pick(self, const request_t* r, uint32_t skip) noexcept nogil:
        return call_policy(
            self.scan, &self.tables[r.router], skip, r.cost,
            mix(r.key) | 1 if self.keys else 0, &self.rngs[r.router],
        )

    cdef uint32_t _find_room(self, const request_t* r) noexcept nogil:
        """A node with a free place, which there must be: as `Router.acquire` finds it."""
        cdef int index
        if self.binding == BOUND:
            if self.idle_fast:
                self.idle_fast -= 1
                return self.idle[self.servers - self.servers_fast + self.idle_fast]
            self.idle_slow -= 1
            return self.idle[self.idle_slow]
        self.attempt += 1
        if self.attempt == NOBODY:
            self.attempt = 1
        while True:
            index = self._pick(r, self.attempt)
            if self.node[index].busy < self.node[index].servers:
                return <uint32_t>index
            self.tables[r.router].items[index].skip = self.attempt

    cdef inline void _append(self, queue_t* queue, uint32_t index) noexcept nogil:
        self.pool[index].next = NOBODY
        if queue.tail == NOBODY:
            queue.head = index
        else:
            self.pool[queue.tail].next = index
        queue.tail = index

    cdef inline uint32_t _take(self, queue_t* queue) noexcept nogil:
        cdef uint32_t index = queue.head
        queue.head = self.pool[index].next
        if queue.head == NOBODY:
            queue.tail = NOBODY
        return index

    cdef void _wait(self, uint32_t index) noexcept nogil:
        """Wait for room: in the one queue, or in the router's own."""
        cdef uint32_t router = self.pool[index].router if self.binding == LATE_RANDOM else 0
        if self.waiting[router].head == NOBODY:
            self.waiters[self.waiters_count] = router
            self.waiters_count += 1
        self._append(&self.waiting[router], index)

    cdef uint32_t _next_waiting(self) noexcept nogil:
        """Who gets the room that has come: of the one queue, or of any router that waits."""
        cdef uint32_t place = 0, router, index
        if self.waiters_count > 1:
            place = random_below(&self.others, self.waiters_count)
        router = self.waiters[place]
        index = self._take(&self.waiting[router])
        if self.waiting[router].head == NOBODY:
            self.waiters_count -= 1
            self.waiters[place] = self.waiters[self.waiters_count]
        return index

    cdef void _put(self, uint32_t index, uint32_t node) noexcept nogil:
        """A request comes to its node: its reservation is in the shared word from now on."""
        cdef request_t* r = &self.pool[index]
        cdef node_t* n = &self.node[node]
        r.node = node
        r.bound_s = self.now_s
        n.cost += r.cost
        self._move_word(r, True)
        n.held += 1
        if n.held < LEVELS:
            self._move_level(n.held, True)
        if self.is_measuring:
            self.sent[node] += 1
        if n.busy < n.servers:
            self._start(index, n)
        else:
            self._append(&n.queue, index)

    cdef inline void _move_word(self, const request_t* r, bint is_more) noexcept nogil:
        """The node's word as it is, and in the view of who counts his own."""
        cdef shmc_hot* own
        cdef uint32_t inflight
        set_hot(&self.hot[r.node], self.node[r.node].cost)
        if self.is_own and self.views:
            own = &self.seen[<size_t>self.view_of[r.router] * self.nodes + r.node]
            inflight = <uint32_t>own.load & SHMC_FIELD_MAX
            if is_more:
                set_hot(own, <uint64_t>inflight + r.cost)
            else:
                set_hot(own, inflight - r.cost if inflight > r.cost else 0)

    cdef inline void _move_level(self, uint32_t level, bint is_more) noexcept nogil:
        """How many nodes hold at least so many has changed by one."""
        if self.is_measuring:
            self.level_area[level] += self.level[level] * (self.now_s - self.level_since[level])
            self.level_since[level] = self.now_s
        if is_more:
            self.level[level] += 1
        else:
            self.level[level] -= 1

    cdef void _start(self, uint32_t index, node_t* n) noexcept nogil:
        cdef request_t* r = &self.pool[index]
        cdef double work_s = r.work_s
        r.began_s = self.now_s
        n.busy += 1
        self.room -= 1
        self.busy_speed += n.speed
        if self.cache.room:
            self.looked_up += 1
            if cache_use(&self.cache, r.node, r.key):
                self.hits += 1
                work_s *= self.hit_factor
        self.work_done += work_s
        self._at(self.now_s + work_s / n.speed, FINISH, index)

    cdef void _finish(self, uint32_t index) noexcept nogil:
        cdef request_t* r = &self.pool[index]
        cdef uint32_t node = r.node
        cdef node_t* n = &self.node[node]
        n.busy -= 1
        self.room += 1
        self.busy_speed -= n.speed
        n.cost -= r.cost
        if n.held < LEVELS:
            self._move_level(n.held, False)
        n.held -= 1
        self.in_system -= 1
        self._move_word(r, False)
        self._smooth_latency(
            node, self.now_s - (r.began_s if self.is_work_latency else r.bound_s)
        )
        self._record(r)
        if self.binding == BOUND:
            if n.speed == 1.0:
                self.idle[self.servers - self.servers_fast + self.idle_fast] = node
                self.idle_fast += 1
            else:
                self.idle[self.idle_slow] = node
                self.idle_slow += 1
        r.next = self.pool_free
        self.pool_free = index
        if self.binding == EARLY:
            if n.queue.head != NOBODY:
                self._start(self._take(&n.queue), n)
        elif self.waiters_count:
            index = self._next_waiting()
            self._put(index, self._find_room(&self.pool[index]))

    cdef inline void _smooth_latency(self, uint32_t node, double latency_s) noexcept nogil:
        """What a node writes beside its word when a request ends: as shmcoord.node does."""
        cdef node_t* n = &self.node[node]
        n.has_served = True
        if n.latency_s == 0.0:
            n.latency_s = latency_s
        else:
            n.latency_s += _GAIN * (latency_s - n.latency_s)
        self.hot[node].latency_us = <uint32_t>min(max(n.latency_s * 1e6, 1.0), 4e9)

    cdef void _beat(self, uint32_t node) noexcept nogil:
        """Forget half of a latency that no request has renewed, for those who look at it."""
        cdef uint32_t latency_us = self.hot[node].latency_us
        if not self.node[node].has_served and latency_us > 1:
            self.hot[node].latency_us = latency_us // 2
        self.node[node].has_served = False
        self._at(self.now_s + _INTERVAL_S, BEAT, node)

    cdef void _refresh_view(self, uint32_t view) noexcept nogil:
        cdef uint32_t i
        cdef shmc_hot* seen = self.seen + <size_t>view * self.nodes
        for i in range(self.nodes):
            self._copy_hot(&seen[i], i)
        self._at(self.now_s + self.age_s, REFRESH_VIEW, view)

    cdef void _refresh_node(self, uint32_t node) noexcept nogil:
        cdef uint32_t view
        for view in range(self.views):
            self._copy_hot(&self.seen[<size_t>view * self.nodes + node], node)
        self._at(self.now_s + self.age_s, REFRESH_NODE, node)

    cdef inline void _copy_hot(self, shmc_hot* seen, uint32_t node) noexcept nogil:
        seen.load = self.hot[node].load
        seen.latency_us = self.hot[node].latency_us

    # --- measuring

    cdef inline void _count_time(self, double now_s) noexcept nogil:
        cdef double passed_s = now_s - self.now_s
        self.area += self.in_system * passed_s
        self.busy += self.busy_speed * passed_s
        self.now_s = now_s

    cdef void _begin(self) noexcept nogil:
        """The warm-up is over."""
        cdef uint32_t k
        self.is_measuring = True
        self.begin_s, self.begin_area, self.begin_busy = self.now_s, self.area, self.busy
        for k in range(<uint32_t>LEVELS + 1):
            self.level_area[k] = 0.0
            self.level_since[k] = self.now_s
        self.hits = self.looked_up = self.waited = 0

    cdef void _end(self) noexcept nogil:
        """The last request has come; what follows only lets everybody leave."""
        cdef uint32_t k
        self.is_measuring = False
        self.end_s, self.end_area, self.end_busy = self.now_s, self.area, self.busy
        for k in range(<uint32_t>LEVELS + 1):
            self.level_area[k] += self.level[k] * (self.now_s - self.level_since[k])

    cdef inline void _record(self, const request_t* r) noexcept nogil:
        cdef double sojourn_s = self.now_s - r.arrived_s
        cdef uint64_t batch
        self.finished += 1
        self.sojourn_sum += sojourn_s
        if r.serial < self.warmup:
            return
        batch = (r.serial - self.warmup) * BATCHES // (self.requests - self.warmup)
        self.counts[batch * BUCKETS + bucket_of(sojourn_s)] += 1
        self.batch_sum[batch] += sojourn_s
        self.batch_count[batch] += 1
        if sojourn_s > self.max_s:
            self.max_s = sojourn_s

    cdef dict _result(self):
        cdef uint64_t* merged = <uint64_t*>calloc(BUCKETS, sizeof(uint64_t))
        cdef uint64_t* one
        cdef uint32_t batch, i
        cdef uint64_t measured = self.requests - self.warmup
        cdef double total = 0.0, window_s = self.end_s - self.begin_s
        if merged == NULL:
            raise MemoryError()
        try:
            batches = []
            for batch in range(<uint32_t>BATCHES):
                one = self.counts + <size_t>batch * BUCKETS
                for i in range(<uint32_t>BUCKETS):
                    merged[i] += one[i]
                total += self.batch_sum[batch]
                batches.append(
                    self._summary(one, self.batch_count[batch], self.batch_sum[batch])
                )
            summary = self._summary(merged, measured, total)
        finally:
            free(merged)
        return {
            "summary": summary,
            "batches": batches,
            "max_s": self.max_s,
            "measured": measured,
            "finished": self.finished,
            "window_s": window_s,
            "arrival_rate": measured / window_s,
            "in_system": (self.end_area - self.begin_area) / window_s,
            "utilisation": (self.end_busy - self.begin_busy) / window_s / self.speed_total,
            "whole_area": self.area,
            "whole_sojourn": self.sojourn_sum,
            "whole_busy": self.busy,
            "whole_work": self.work_done,
            "waited": self.waited / <double>measured,
            "hit_ratio": self.hits / <double>self.looked_up if self.looked_up else 0.0,
            "at_least": [
                self.level_area[i] / window_s / self.nodes for i in range(1, <uint32_t>LEVELS)
            ],
            "sent": [self.sent[i] for i in range(self.nodes)],
        }

    cdef dict _summary(self, const uint64_t* counts, uint64_t total, double sum_s):
        return {
            "mean_s": sum_s / total,
            "p50_s": histogram_quantile(counts, total, 0.5),
            "p90_s": histogram_quantile(counts, total, 0.9),
            "p99_s": histogram_quantile(counts, total, 0.99),
            "p999_s": histogram_quantile(counts, total, 0.999),
        }


def choose(str policy, list loads, uint64_t rng, uint32_t count, list names, list keys):
    """What a router would pick, so many times in a row: indices into `loads`.

    Args:
        policy: a name of shmcoord.POLICIES.
        loads: what each node has in flight.
        rng: the router's random state.
        count: so many picks.
        names: of the nodes.
        keys: asked for in turn; empty: no keys.
    """
    cdef bytes name
    cdef policy_t scan = _policy_of(policy)
    cdef uint32_t i, n = <uint32_t>len(loads)
    cdef candidates_t table
    cdef shmc_hot* hot = make_hot(n)
    memset(&table, 0, sizeof(table))
    try:
        if not allocate(&table, n):
            raise MemoryError()
        for i in range(n):
            set_hot(&hot[i], <uint64_t>loads[i])
            set_candidate(&table, i, &hot[i], 1.0, 0xFFFF)
            table.turns[i] = pick_unit(&rng)
            name = names[i].encode()
            table.hashes[i] = shmc_hash(name, len(name))
        hashes = [0]
        if keys:
            hashes = []
            for key in keys:
                name = key.encode()
                hashes.append(shmc_hash(name, len(name)))
        return [
            call_policy(scan, &table, NOBODY, 1, hashes[k % len(hashes)], &rng)
            for k in range(count)
        ]
    finally:
        free(hot)
        release(&table)


def scan_address(str policy):
    """Where the machine code of a policy's scan begins."""
    return <size_t><void*>_policy_of(policy)


def quantile_of(list values, double q):
    """The quantile as the histogram has it; for tests of the histogram."""
    cdef uint64_t* counts = <uint64_t*>calloc(BUCKETS, sizeof(uint64_t))
    if counts == NULL:
        raise MemoryError()
    try:
        for value in values:
            counts[bucket_of(value)] += 1
        return histogram_quantile(counts, len(values), q)
    finally:
        free(counts)
