# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""A router's private table of one group: what the nodes wrote once, and how they are judged.

A few times per heartbeat interval the table is judged by the clock: who is late (suspect), could
not be reached, or fails (ejected) gets a penalty, which every policy respects; who has just joined
gets a share of its traffic. Between two judgements a pick only reads load and death words.
"""
from libc.math cimport exp2
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from shmcoord._atomics cimport load_relaxed_u32
from shmcoord._layout cimport (
    SHMC_R_FAILED,
    SHMC_R_SERVED,
    SHMC_R_STARTED_MONO_NS,
    SHMC_STATE_OPEN,
    shmc_hash,
)
from shmcoord.backend cimport Backend
from shmcoord.liveness cimport Judge
from shmcoord.picker cimport (
    REMOTE,
    allocate,
    candidate_t,
    random_unit,
    release,
    score_of,
    segment_of,
)
from shmcoord.status cimport HEALTH_DEAD, HEALTH_SUSPECT, record_read

# What outlier detection of Envoy has as defaults where it has the same knob: 5 failures in a row;
# the time out of routing doubles each time, up to 300 s.
cdef double _EJECTED_MOST_S = 300.0
cdef double _HALF_LIFE_S = 10.0     # of what counts as recent
cdef double _RECENT_LEAST = 20.0    # requests before a rate says anything
cdef double _RATE_ABOVE = 0.3       # by how much a rate must exceed that of the others
cdef double _OTHERS_FAIL = 0.5      # where the others fail this often, failing is no fault
cdef double _SHARE_LEAST = 0.1      # of a node that has just joined


cdef class Rules:
    """What a router's user may set; every value has a default that need not be touched."""

    def __init__(self, *, local=None, remote_margin=1.0, panic_threshold=0.2, eject_after=5,
                 eject_s=5.0, hot_quantile=0.84, affinity_bound=1.25):
        if local is not None:
            if isinstance(local, str):
                local = (local,)
            local = frozenset(local)
            if not all(isinstance(name, str) for name in local):
                raise TypeError("local must be names of segments")
        self.local = local
        self.remote_margin = _between("remote_margin", remote_margin, 0.0, 1e6)
        self.panic_threshold = _between("panic_threshold", panic_threshold, 0.0, 1.0)
        if not isinstance(eject_after, int) or isinstance(eject_after, bool):
            raise TypeError(f"eject_after must be an int, not {type(eject_after).__name__}")
        self.eject_after = <uint32_t>_between("eject_after", eject_after, 0, 1e6)
        self.eject_s = _between("eject_s", eject_s, 0.001, _EJECTED_MOST_S)
        self.hot_quantile = _between("hot_quantile", hot_quantile, 0.0, 1.0)
        self.affinity_bound = _between("affinity_bound", affinity_bound, 1.0, 1e6)


def _between(what, value, low, high):
    value = float(value)
    if not low <= value <= high:
        raise ValueError(f"{what} must be between {low:g} and {high:g}, not {value}")
    return value


cdef class Watch:
    """What one router has seen of one node's failures; outlives the tables.

    A node that fails fast is always idle, so it would draw all traffic (a black hole).
    """

    cdef void note(self, uint64_t served, uint64_t failed, uint64_t now_ns) noexcept:
        """Take in the node's counters: requests ended, and those of them that failed."""
        cdef double decay
        if self.seen_ns == 0:
            self.first_seen_ns = now_ns
        elif served >= self.served and failed >= self.failed:
            decay = exp2((self.seen_ns - <double>now_ns) / 1e9 / _HALF_LIFE_S)
            self.recent = self.recent * decay + (served - self.served)
            self.recent_failed = self.recent_failed * decay + (failed - self.failed)
        self.seen_ns = now_ns
        self.served = served
        self.failed = failed

    cdef bint fails(self, uint32_t in_row, double others, Rules rules) noexcept:
        """Whether it fails so much more than the `others` (their rate) that it is to be ejected."""
        cdef double rate
        if in_row < self.forgiven:
            self.forgiven = 0  # it has served one since
        if in_row - self.forgiven >= rules.eject_after and others < _OTHERS_FAIL:
            return True
        if self.recent < _RECENT_LEAST:
            return False
        rate = self.recent_failed / self.recent
        if rate < _RATE_ABOVE / 2:
            self.times = 0
        return rate >= others + _RATE_ABOVE


cdef Table make_table(list backends, list segments_of, list judges, Rules rules, dict watches,
                      uint64_t group_hash, uint64_t* rng, Table before):
    """The table of a group.

    Args:
        backends: its nodes.
        segments_of: for each, the index of its segment.
        judges: one `Judge` per segment.
        rules: the router's.
        watches: by backend, what this router has seen of it; gets those that are new.
        group_hash: of the group's name.
        rng: state of the random numbers.
        before: the table that this one replaces, or None.
    """
    cdef Table self = Table.__new__(Table)
    cdef Backend backend
    cdef candidate_t* c
    cdef bytes name
    cdef uint32_t i, count = <uint32_t>len(backends)
    cdef uint64_t shortest = 1_000_000_000
    cdef double capacities = 0.0
    cdef bint all_given = True
    self.backends = backends
    self.judges = judges
    self.rules = rules
    self.group_hash = group_hash
    self.watches = []
    self.shares = <double*>calloc(count + 1, sizeof(double))
    self.inverses = <double*>calloc(count + 1, sizeof(double))
    self.marks = <uint32_t*>calloc(count + 1, sizeof(uint32_t))
    self.why = <int*>calloc(count + 1, sizeof(int))
    if (
        not allocate(&self.candidates, count) or self.shares == NULL or self.inverses == NULL
        or self.marks == NULL or self.why == NULL
    ):
        raise MemoryError()
    self.candidates.hot_quantile = rules.hot_quantile
    self.candidates.bound = rules.affinity_bound
    for backend in backends:
        capacities += backend.info.capacity
        # No capacity given is as many as there are cells: nothing that a load could be relative to.
        all_given = all_given and backend.info.capacity < backend.m.leases
    credits = {}
    if before is not None:
        for i in range(before.candidates.count):
            credits[before.backends[<int>i]] = before.candidates.turns[i]
    for i in range(count):
        backend = backends[i]
        c = &self.candidates.items[i]
        c.hot = backend.hot
        self.inverses[i] = 1.0 / backend.info.weight
        if all_given:
            self.inverses[i] *= capacities / count / backend.info.capacity
        c.inverse_weight = self.inverses[i]
        self.shares[i] = 1.0
        c.open_tag = (backend.info.generation & 0xFFFF) << 4 | SHMC_STATE_OPEN
        c.capacity = <unsigned short>backend.info.capacity
        c.place = segments_of[i]
        if (
            backend.info.origin_incarnation != 0 if rules.local is None
            else backend.mapping.name not in rules.local
        ):
            c.bias = rules.remote_margin
            c.place |= REMOTE
            self.candidates.remote[self.candidates.remote_count] = i
            self.candidates.remote_count += 1
        name = backend.info.node.encode()
        self.candidates.hashes[i] = shmc_hash(name, len(name))
        # Round-robin goes on where it was; where it begins is chance, or the first node would be
        # everybody's first.
        self.candidates.turns[i] = credits.get(backend, random_unit(rng) / self.inverses[i])
        shortest = min(shortest, backend.info.interval_ns)
        watch = watches.get(backend)
        if watch is None:
            watch = watches[backend] = Watch.__new__(Watch)
        self.watches.append(watch)
    self.judge_every_ns = max(shortest // 4, <uint64_t>1_000_000)
    return self


cdef class Table:
    """One group's candidates, private to one router."""

    def __dealloc__(self):
        release(&self.candidates)
        free(self.shares)
        free(self.inverses)
        free(self.marks)
        free(self.why)

    cdef void judge(self, uint64_t now_ns, dict unreachable) except *:
        """Set each candidate's penalty and share.

        `unreachable` maps backends to the time (ns) until which they are passed over.
        """
        cdef uint32_t i, in_row, eligible = 0, good = 0, ejected = 0, living = 0
        cdef uint64_t words[16]
        cdef uint64_t started_ns
        cdef double score, recent = 0.0, recent_failed = 0.0, others, slow_s
        cdef candidate_t* c
        cdef Backend backend
        cdef Watch watch
        cdef int health
        self.judge_at_ns = now_ns + self.judge_every_ns
        self.is_slow = False
        for i in range(self.candidates.count):
            c = &self.candidates.items[i]
            backend = <Backend>self.backends[<int>i]
            watch = <Watch>self.watches[<int>i]
            health = (<Judge>self.judges[segment_of(c)]).health(backend.info, now_ns, NULL)
            self.why[i] = PASSED_SUSPECT if health == HEALTH_SUSPECT else PASSED_NOT
            if health == HEALTH_DEAD or not record_read(
                &backend.m.record[backend.info.slot], words, 16
            ):
                continue
            living += 1
            watch.note(words[SHMC_R_SERVED], words[SHMC_R_FAILED], now_ns)
            recent += watch.recent
            recent_failed += watch.recent_failed
            self.shares[i] = 1.0
            if backend.info.slow_start_ns:
                started_ns = words[SHMC_R_STARTED_MONO_NS]
                if not backend.info.same_clock or started_ns > now_ns:
                    started_ns = watch.first_seen_ns
                slow_s = backend.info.slow_start_ns / 1e9
                self.shares[i] = min(max((now_ns - started_ns) / 1e9 / slow_s, _SHARE_LEAST), 1.0)
                if self.shares[i] < 1.0:
                    self.is_slow = True
                    self.judge_at_ns = min(
                        self.judge_at_ns, now_ns + backend.info.slow_start_ns // 20
                    )
        for i in range(self.candidates.count):
            ejected += (<Watch>self.watches[<int>i]).ejected_until_ns > now_ns
        for i in range(self.candidates.count):
            c = &self.candidates.items[i]
            backend = <Backend>self.backends[<int>i]
            watch = <Watch>self.watches[<int>i]
            # What others wrote there is bounded, or the sum below would wrap.
            in_row = min(load_relaxed_u32(&c.hot.failures), <uint32_t>0x7FFFFFFF)
            if self.rules.eject_after:
                if watch.ejected_until_ns and watch.ejected_until_ns <= now_ns:
                    watch.ejected_until_ns = 0
                    watch.forgiven = in_row
                if watch.ejected_until_ns == 0:
                    others = recent - watch.recent
                    others = (recent_failed - watch.recent_failed) / others if others >= 1 else 0.0
                    # At most half of those that live, and never one who is alone.
                    if (
                        2 * (ejected + 1) <= living
                        and watch.fails(in_row, others, self.rules)
                    ):
                        watch.ejected_s = min(
                            self.rules.eject_s * exp2(min(watch.times, 16)), _EJECTED_MOST_S
                        )
                        watch.times += 1
                        watch.recent = watch.recent_failed = 0.0
                        watch.ejected_until_ns = now_ns + <uint64_t>(watch.ejected_s * 1e9)
                        ejected += 1
                if watch.ejected_until_ns:
                    self.why[i] = PASSED_EJECTED
                    self.judge_at_ns = min(self.judge_at_ns, watch.ejected_until_ns)
                self.marks[i] = max(in_row, watch.forgiven) + self.rules.eject_after
            else:
                self.marks[i] = 0xFFFFFFFFu
            if unreachable:
                until = unreachable.get(backend)
                if until is not None:
                    if until > now_ns:
                        self.why[i] = PASSED_UNREACHABLE
                        self.judge_at_ns = min(self.judge_at_ns, <uint64_t>until)
                    else:
                        del unreachable[backend]
            c.penalty = self.why[i] != PASSED_NOT
            # A node of another host of which nothing is heard is no reason for panic, and no help.
            if self.why[i] == PASSED_SUSPECT and backend.info.origin_incarnation != 0:
                continue
            if score_of(c, &score):
                eligible += 1
                good += not c.penalty
        self.is_panic = good < self.rules.panic_threshold * eligible
        if self.is_panic:
            for i in range(self.candidates.count):
                backend = <Backend>self.backends[<int>i]
                if self.why[i] != PASSED_SUSPECT or backend.info.origin_incarnation == 0:
                    self.candidates.items[i].penalty = 0
