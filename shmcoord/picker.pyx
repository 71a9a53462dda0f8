# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Score and scan: the native half of every policy.

A policy is a function over an array of candidates. It reads two words of shared memory per
candidate (load word and death word, in one cache line), no clock and no global state: the random
state is passed in, and what a clock had to say (who is suspect) stands in `penalty` already. The
same function serves production, tests, `explain` (over a private copy of the words) and
simulation.
"""
from libc.math cimport INFINITY
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from shmcoord._atomics cimport load_acquire_u32, load_relaxed_u64
from shmcoord._layout cimport SHMC_STATE_OPEN
from shmcoord.cells cimport death_is_alive
from shmcoord.status cimport (
    HEALTH_SUSPECT,
    word_queue,
)


cdef inline uint32_t _random_below(uint64_t* rng, uint32_t n) noexcept nogil:
    """Uniform in [0, n): xorshift64* (Vigna 2016), scaled as in Lemire 2019."""
    cdef uint64_t x = rng[0]
    x ^= x >> 12
    x ^= x << 25
    x ^= x >> 27
    rng[0] = x
    return <uint32_t>(((x * 0x2545F4914F6CDD1Du) >> 32) * n >> 32)


cdef inline bint _is_eligible(const candidate_t* c, uint64_t word) noexcept nogil:
    """Open for work, of the generation that the table knows, and alive."""
    return (word >> 44) == c.open_tag and death_is_alive(load_acquire_u32(&c.hot.death))


cdef inline bint _is_open(const candidate_t* c, uint32_t skip, uint64_t* word) noexcept nogil:
    """Whether an acquire that skips `skip` may take it; `word` gets its load word."""
    word[0] = load_relaxed_u64(&c.hot.load)
    return c.skip != skip and _is_eligible(c, word[0])


cdef inline uint32_t _tier(const candidate_t* c, uint64_t word) noexcept nogil:
    """IDLE before BUSY, penalised ones behind all others; the lower tier wins, whatever the queues.

    For an eligible candidate: its state field is 0, so all that is below the tag tells IDLE.
    """
    return c.penalty << 1 | <uint32_t>((word & LOAD_BITS) != 0)


cdef inline double _score(const candidate_t* c, uint64_t word) noexcept nogil:
    """Queue relative to weight; the lower wins within a tier."""
    return word_queue(word) * c.inverse_weight


cdef bint score_of(const candidate_t* c, double* score) noexcept nogil:
    """Whether a candidate is eligible, and its score."""
    cdef uint64_t word = load_relaxed_u64(&c.hot.load)
    score[0] = _score(c, word)
    return _is_eligible(c, word)


cdef int _least_loaded(candidates_t* table, uint32_t skip, uint64_t* rng) noexcept nogil:
    cdef uint32_t _draw, i, tier, best_tier = 0xFFFFFFFFu, ties = 0
    cdef uint64_t word
    cdef double score, best = 0.0, limit = INFINITY
    cdef candidate_t* items = table.items  # locals: no store in the loop can be to them
    cdef uint32_t* scratch = table.scratch
    cdef uint32_t count = table.count
    cdef candidate_t* c
    # Nobody beats an IDLE node without penalty, and all of those tie. In a large group a few draws
    # usually find one, each as likely as any other; only else is everybody looked at.
    if table.count > DRAWS:
        for _draw in range(<uint32_t>DRAWS):
            c = &table.items[_random_below(rng, table.count)]
            if _is_open(c, skip, &word) and _tier(c, word) == 0:
                return <int>(c - table.items)
    for i in range(count):
        c = &items[i]
        word = load_relaxed_u64(&c.hot.load)
        score = _score(c, word)
        # Most of many end here: worse than the best so far, whatever else they are. (A score says
        # nothing against a better tier: while the best is penalised, `limit` lets everybody pass.)
        if score > limit:
            continue
        if c.skip == skip or not _is_eligible(c, word):
            continue
        tier = _tier(c, word)
        if tier != best_tier or score != best:
            if tier > best_tier or (tier == best_tier and score > best):
                continue
            ties = 0
            best = score
            best_tier = tier
            if tier < 2:
                limit = score
        if ties < KEPT:
            scratch[ties] = i
        ties += 1
    if ties == 0:
        return -1
    if ties <= KEPT:
        return <int>table.scratch[_random_below(rng, ties) if ties > 1 else 0]
    return _draw_tie(table, skip, rng, ties, best_tier, best)


cdef inline bint _is_as_good(const candidate_t* c, uint32_t skip, uint32_t tier,
                             double score) noexcept nogil:
    cdef uint64_t word
    return (
        _is_open(c, skip, &word)
        and _tier(c, word) <= tier
        and (_tier(c, word) < tier or _score(c, word) <= score)
    )


cdef int _draw_tie(candidates_t* table, uint32_t skip, uint64_t* rng, uint32_t ties,
                   uint32_t tier, double score) noexcept nogil:
    """One of many candidates that are as good as the best found, each as likely.

    Loads move meanwhile; who is as good by now is as good a choice.
    """
    cdef uint32_t _draw, i, left
    for _draw in range(<uint32_t>DRAWS):
        left = _random_below(rng, table.count)
        if _is_as_good(&table.items[left], skip, tier, score):
            return <int>left
    left = _random_below(rng, ties)
    for i in range(table.count):
        if _is_as_good(&table.items[i], skip, tier, score):
            if left == 0:
                return <int>i
            left -= 1
    return <int>table.scratch[0]


cdef int _random(candidates_t* table, uint32_t skip, uint64_t* rng) noexcept nogil:
    cdef uint32_t i, penalty, found
    cdef uint64_t word
    cdef candidate_t* c
    for penalty in range(2):
        found = 0
        for i in range(table.count):
            c = &table.items[i]
            if c.penalty == penalty and _is_open(c, skip, &word):
                table.scratch[found] = i
                found += 1
        if found:
            return <int>table.scratch[_random_below(rng, found)]
    return -1


cdef int _round_robin(candidates_t* table, uint32_t skip, uint64_t* rng) noexcept nogil:
    cdef uint32_t i, step, penalty
    cdef uint64_t word
    cdef candidate_t* c
    for penalty in range(2):
        for step in range(table.count):
            i = (table.cursor + step) % table.count
            c = &table.items[i]
            if c.penalty == penalty and _is_open(c, skip, &word):
                table.cursor = i + 1
                return <int>i
    return -1


cdef policy_t find_policy(str name) except NULL:
    """The scan of a policy by its name."""
    if name == "least-loaded":
        return _least_loaded
    if name == "round-robin":
        return _round_robin
    if name == "random":
        return _random
    from shmcoord.policy import POLICIES
    raise ValueError(f"no policy {name!r}; there are {', '.join(POLICIES)}")


cdef Table make_table(list backends, list segments_of, list judges, uint32_t cursor):
    """The table of a group.

    Args:
        backends: its nodes.
        segments_of: for each, the index of its segment.
        judges: one `Judge` per segment.
        cursor: where round-robin goes on.
    """
    cdef Table self = Table.__new__(Table)
    cdef Backend backend
    cdef candidate_t* c
    cdef uint32_t i
    cdef uint64_t shortest = 1_000_000_000
    self.backends = backends
    self.judges = judges
    self.candidates.count = <uint32_t>len(backends)
    self.candidates.cursor = cursor
    self.candidates.items = <candidate_t*>calloc(len(backends) + 1, sizeof(candidate_t))
    self.candidates.scratch = <uint32_t*>calloc(len(backends) + 1, sizeof(uint32_t))
    if self.candidates.items == NULL or self.candidates.scratch == NULL:
        raise MemoryError()
    for i in range(self.candidates.count):
        backend = backends[i]
        c = &self.candidates.items[i]
        c.hot = backend.hot
        c.inverse_weight = 1.0 / backend.info.weight
        c.open_tag = (backend.info.generation & 0xFFFF) << 4 | SHMC_STATE_OPEN
        c.segment = segments_of[i]
        shortest = min(shortest, backend.info.interval_ns)
    self.judge_every_ns = max(shortest // 4, <uint64_t>1_000_000)
    return self


cdef class Table:
    """One group's candidates, private to one router."""

    def __dealloc__(self):
        free(self.candidates.items)
        free(self.candidates.scratch)

    cdef void judge(self, uint64_t now_ns, dict unreachable) except *:
        """Set each candidate's penalty from its heartbeat and from what could not be reached.

        `unreachable` maps backends to the time (ns) until which they are passed over.
        """
        cdef uint32_t i
        cdef candidate_t* c
        cdef Backend backend
        cdef Judge judge
        self.judge_at_ns = now_ns + self.judge_every_ns
        for i in range(self.candidates.count):
            c = &self.candidates.items[i]
            backend = <Backend>self.backends[i]
            judge = <Judge>self.judges[c.segment]
            c.penalty = judge.health(backend.info, now_ns, NULL) == HEALTH_SUSPECT
            if unreachable:
                until = unreachable.get(backend)
                if until is not None:
                    if until > now_ns:
                        c.penalty = 1
                        self.judge_at_ns = min(self.judge_at_ns, <uint64_t>until)
                    else:
                        del unreachable[backend]
