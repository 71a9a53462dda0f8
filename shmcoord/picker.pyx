# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Score and scan: the native half of every policy.

A policy is a function over an array of candidates. It reads one cache line of shared memory per
candidate (load word, death word, latency), no clock and no global state: the random state is passed
in, and what a clock had to say (who is suspect, ejected, starting slowly) stands in `penalty` and
`inverse_weight` already. The same function serves production, tests, `explain` (over a private copy
of the words) and simulation.
"""
from libc.math cimport INFINITY, ceil, log
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from shmcoord._atomics cimport load_acquire_u32, load_relaxed_u32, load_relaxed_u64
from shmcoord._layout cimport shmc_mix
from shmcoord.cells cimport death_is_alive
from shmcoord.status cimport word_inflight, word_queue


# --- random numbers: xorshift64* (Vigna 2016)

cdef inline uint64_t _random(uint64_t* rng) noexcept nogil:
    cdef uint64_t x = rng[0]
    x ^= x >> 12
    x ^= x << 25
    x ^= x >> 27
    rng[0] = x
    return x * 0x2545F4914F6CDD1Du


cdef inline uint32_t _random_below(uint64_t* rng, uint32_t n) noexcept nogil:
    """Uniform in [0, n), scaled as in Lemire 2019."""
    return <uint32_t>((_random(rng) >> 32) * n >> 32)


cdef double random_unit(uint64_t* rng) noexcept nogil:
    """Uniform in [0, 1)."""
    return (_random(rng) >> 11) * (1.0 / 9007199254740992.0)


# --- candidates

cdef bint allocate(candidates_t* table, uint32_t count) noexcept nogil:
    """Room for `count` candidates, all zero; False if there is no memory."""
    table.items = <candidate_t*>calloc(count + 1, sizeof(candidate_t))
    table.hashes = <uint64_t*>calloc(count + 1, sizeof(uint64_t))
    table.turns = <double*>calloc(count + 1, sizeof(double))
    table.scratch = <uint32_t*>calloc(count + 1, sizeof(uint32_t))
    table.remote = <uint32_t*>calloc(count + 1, sizeof(uint32_t))
    table.remote_count = 0
    table.count = count
    table.hot_quantile = 0.84
    table.bound = 1.25
    return (
        table.items != NULL and table.hashes != NULL and table.turns != NULL
        and table.scratch != NULL and table.remote != NULL
    )


cdef void release(candidates_t* table) noexcept nogil:
    """Free what `allocate` gave."""
    free(table.items)
    free(table.hashes)
    free(table.turns)
    free(table.scratch)
    free(table.remote)


cdef inline bint _is_eligible(const candidate_t* c, uint64_t word) noexcept nogil:
    """Open for work, of the generation that the table knows, and alive."""
    return (word >> 44) == c.open_tag and death_is_alive(load_acquire_u32(&c.hot.death))


cdef inline bint _is_open(const candidate_t* c, uint32_t skip, uint64_t* word) noexcept nogil:
    word[0] = load_relaxed_u64(&c.hot.load)
    return c.skip != skip and _is_eligible(c, word[0])


cdef bint is_open(const candidate_t* c, const pick_t* pick, uint64_t* word) noexcept nogil:
    """Whether this pick may take the candidate; `word` gets its load word."""
    return _is_open(c, pick.skip, word)


cdef inline uint32_t _tier(const candidate_t* c, uint64_t word) noexcept nogil:
    """The lower tier wins, whatever the scores: IDLE, busy, at its capacity; then the same again
    for penalised ones.

    For an eligible candidate: its state field is 0, so all that is below the tag tells IDLE. The
    word sums costs and the capacity counts cells: a node with dear requests may look full and be
    taken last; whether it is, its cells tell.
    """
    if word_inflight(word) >= c.capacity:
        return c.penalty << 2 | 2
    return c.penalty << 2 | <uint32_t>((word & LOAD_BITS) != 0 or c.bias > 0)


cdef uint32_t tier_of(const candidate_t* c, uint64_t word) noexcept nogil:
    """0 idle, 1 busy, 2 at its capacity; +4 if penalised."""
    return _tier(c, word)


cdef inline double _score(const candidate_t* c, uint64_t word) noexcept nogil:
    """Queue relative to weight; the lower wins within a tier."""
    return word_queue(word) * c.inverse_weight + c.bias


cdef bint score_of(const candidate_t* c, double* score) noexcept nogil:
    """Whether a candidate is eligible, and its score."""
    cdef uint64_t word = load_relaxed_u64(&c.hot.load)
    score[0] = _score(c, word)
    return _is_eligible(c, word)


cdef uint32_t _collect(candidates_t* table, uint32_t skip) noexcept nogil:
    """Write the open candidates of the better penalty into `scratch`; how many there are."""
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
            return found
    return 0


# --- least-loaded

cdef inline int _better(const candidates_t* table, const uint32_t* two) noexcept nogil:
    """The better of two that were drawn; a tie goes to the first: who is first is chance."""
    cdef const candidate_t* a = &table.items[two[0]]
    cdef const candidate_t* b = &table.items[two[1]]
    cdef uint64_t word_a = load_relaxed_u64(&a.hot.load)
    cdef uint64_t word_b = load_relaxed_u64(&b.hot.load)
    cdef uint32_t tier_a = _tier(a, word_a), tier_b = _tier(b, word_b)
    return <int>two[
        tier_b < tier_a or (tier_b == tier_a and _score(b, word_b) < _score(a, word_a))
    ]


cdef bint _two_remote(candidates_t* table, const pick_t* pick, uint32_t* two) noexcept nogil:
    """Draw two distinct open ones without penalty among the nodes of other hosts.

    False if that does not come about by a few draws: most are penalised, then.
    """
    cdef uint32_t _draw, i, found = 0
    cdef uint64_t word
    for _draw in range(4 * <uint32_t>DRAWS):
        i = table.remote[_random_below(pick.rng, table.remote_count)]
        if table.items[i].penalty or (found and two[0] == i):
            continue
        if _is_open(&table.items[i], pick.skip, &word):
            two[found] = i
            found += 1
            if found == 2:
                return True
    return False


cdef int _least_loaded(candidates_t* table, const pick_t* pick) noexcept nogil:
    """The lowest tier, then the lowest score; ties by chance.

    Of the nodes of other hosts two are drawn, and only those compared: what is known of them has
    an age, and all routers of all hosts that went for the least would herd (Mitzenmacher 2000, How
    Useful Is Old Information?).
    """
    cdef uint32_t _draw, i, tier, best_tier = 0xFFFFFFFFu, ties = 0
    cdef uint32_t skip = pick.skip
    cdef uint64_t* rng = pick.rng
    cdef uint64_t word
    cdef double score, best = 0.0, limit = INFINITY
    cdef candidate_t* items = table.items  # locals: no store in the loop can be to them
    cdef uint32_t* scratch = table.scratch
    cdef uint32_t count = table.count
    cdef candidate_t* c
    cdef uint32_t two[2]
    cdef bint few = table.remote_count > 2 and _two_remote(table, pick, two)
    if few and table.remote_count == table.count:
        return _better(table, two)
    # Nobody beats an IDLE node without penalty, and all of those tie. In a large group a few draws
    # usually find one, each as likely as any other; only else is everybody looked at.
    if table.count > DRAWS:
        for _draw in range(<uint32_t>DRAWS):
            c = &table.items[_random_below(rng, table.count)]
            if _is_open(c, skip, &word) and _tier(c, word) == 0:
                return <int>(c - table.items)
    for i in range(count):
        c = &items[i]
        if few and c.place & REMOTE and i != two[0] and i != two[1]:
            continue
        word = load_relaxed_u64(&c.hot.load)
        score = _score(c, word)
        # Most of many end here: worse than the best so far, whatever else they are. (A score says
        # nothing against a better tier: while the best is penalised or full, `limit` lets
        # everybody pass.)
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


# --- power of two choices

cdef int _power_of_two(candidates_t* table, const pick_t* pick) noexcept nogil:
    """Two distinct ones by chance, each as likely; the better of them (Mitzenmacher 2001)."""
    cdef uint32_t _draw, i, found = 0
    cdef uint32_t two[2]
    cdef uint64_t word
    cdef candidate_t* c
    if table.count > DRAWS:
        for _draw in range(2 * <uint32_t>DRAWS):
            i = _random_below(pick.rng, table.count)
            c = &table.items[i]
            if c.penalty or not _is_open(c, pick.skip, &word) or (found and two[0] == i):
                continue
            two[found] = i
            found += 1
            if found == 2:
                break
    if found < 2:
        found = _collect(table, pick.skip)
        if found == 0:
            return -1
        if found == 1:
            return <int>table.scratch[0]
        i = _random_below(pick.rng, found)
        two[0] = table.scratch[i]
        table.scratch[i] = table.scratch[found - 1]
        two[1] = table.scratch[_random_below(pick.rng, found - 1)]
    return _better(table, two)


# --- hot-cold

cdef inline int _compare(uint32_t tier, double first, double second, uint32_t other_tier,
                         double other_first, double other_second) noexcept nogil:
    """-1, 0 or 1, as (tier, first, second) is better than, equal to or worse than the other."""
    if tier != other_tier:
        return -1 if tier < other_tier else 1
    if first != other_first:
        return -1 if first < other_first else 1
    if second != other_second:
        return -1 if second < other_second else 1
    return 0


cdef int _hot_cold(candidates_t* table, const pick_t* pick) noexcept nogil:
    """The rule of Prequal (Wydrowski et al., NSDI 2024, section 4.2) over memory, not probes.

    Hot is a load above a quantile of the group's; among the cold the lowest latency wins, if none
    is cold the lowest load. Prequal's servers report the latency that requests had at about the
    present number in flight. A node here publishes one smoothed latency; what one more request
    would have is taken as that times (queue + 1): without it everybody herds to the node that was
    the fastest, until it is hot. IDLE nodes come before busy ones, as in every policy. Of a large
    group a random sample is looked at, as large as Prequal's pool of probes (16).
    """
    cdef uint32_t index[SAMPLE]
    cdef uint32_t tier[SAMPLE]
    cdef double load[SAMPLE]
    cdef double ordered[SAMPLE]
    cdef double latency[SAMPLE]
    cdef uint32_t _draw, i, j, found = 0, ties = 0, best = 0
    cdef uint64_t word
    cdef double limit
    cdef int order
    cdef candidate_t* c
    if table.count > SAMPLE:
        for _draw in range(2 * <uint32_t>SAMPLE):
            i = _random_below(pick.rng, table.count)
            c = &table.items[i]
            if not c.penalty and _is_open(c, pick.skip, &word):
                index[found] = i
                found += 1
                if found == SAMPLE // 2:
                    break
    if found == 0:
        found = _collect(table, pick.skip)
        if found == 0:
            return -1
        if found <= SAMPLE:
            for i in range(found):
                index[i] = table.scratch[i]
        else:
            j = found
            found = SAMPLE // 2
            for i in range(found):
                index[i] = table.scratch[_random_below(pick.rng, j)]
    for i in range(found):
        c = &table.items[index[i]]
        word = load_relaxed_u64(&c.hot.load)
        tier[i] = _tier(c, word)
        load[i] = _score(c, word)
        latency[i] = load_relaxed_u32(&c.hot.latency_us) * (load[i] + 1.0)
        j = i
        while j > 0 and ordered[j - 1] > load[i]:
            ordered[j] = ordered[j - 1]
            j -= 1
        ordered[j] = load[i]
    limit = ordered[<uint32_t>(table.hot_quantile * (found - 1))]
    for i in range(found):
        if load[i] > limit or tier[i] & 2:
            continue
        order = _compare(tier[i], latency[i], load[i], tier[best], latency[best], load[best])
        if ties and order > 0:
            continue
        if ties and order == 0:
            ties += 1
            if _random_below(pick.rng, ties) != 0:
                continue
        else:
            ties = 1
        best = i
    if ties == 0:  # none is cold
        for i in range(found):
            order = _compare(tier[i], load[i], 0.0, tier[best], load[best], 0.0)
            if ties and order > 0:
                continue
            if ties and order == 0:
                ties += 1
                if _random_below(pick.rng, ties) != 0:
                    continue
            else:
                ties = 1
            best = i
    return <int>index[best]


# --- affinity

cdef inline double _rendezvous(const candidate_t* c, uint64_t hash, uint64_t key) noexcept nogil:
    """The weight of a node for a key: rendezvous hashing (Thaler, Ravishankar 1998), weighted by
    the logarithm method. The same in every process; a node that comes or goes moves only its own
    keys."""
    cdef double unit = ((shmc_mix(key ^ hash) >> 11) + 0.5) * (1.0 / 9007199254740992.0)
    return -1.0 / (c.inverse_weight * log(unit))


cdef void _totals(candidates_t* table, uint32_t skip, uint32_t penalty, double* queued,
                  double* weights) noexcept nogil:
    cdef uint32_t i
    cdef uint64_t word
    cdef candidate_t* c
    queued[0] = 0.0
    weights[0] = 0.0
    for i in range(table.count):
        c = &table.items[i]
        if c.penalty == penalty and _is_open(c, skip, &word):
            queued[0] += word_queue(word)
            weights[0] += 1.0 / c.inverse_weight


cdef double affinity_bound(candidates_t* table, uint32_t index, uint32_t cost) noexcept nogil:
    """The most that affinity lets a candidate have queued."""
    cdef double queued, weights
    _totals(table, 0xFFFFFFFFu, table.items[index].penalty, &queued, &weights)
    if weights == 0.0:
        return INFINITY
    return ceil(
        table.bound * (queued + cost) / (weights * table.items[index].inverse_weight)
    )


cdef int _affinity(candidates_t* table, const pick_t* pick) noexcept nogil:
    """The key's own node, unless it has more than `bound` times its share: then the key's next one
    (consistent hashing with bounded loads: Mirrokni, Thorup, Zadimoghaddam 2018). Without a key:
    least-loaded."""
    cdef uint32_t i, penalty
    cdef uint64_t word
    cdef double queued, weights, value, best, best_any, queue
    cdef int chosen, anybody
    cdef bint is_full
    cdef candidate_t* c
    if pick.key == 0:
        return _least_loaded(table, pick)
    for penalty in range(2):
        _totals(table, pick.skip, penalty, &queued, &weights)
        if weights == 0.0:
            continue
        chosen = anybody = -1
        best = best_any = -1.0
        for i in range(table.count):
            c = &table.items[i]
            if c.penalty != penalty or not _is_open(c, pick.skip, &word):
                continue
            value = _rendezvous(c, table.hashes[i], pick.key)
            is_full = word_inflight(word) >= c.capacity
            if is_full:
                value *= 1e-9  # behind all that have room, in the order of the key
            if value > best_any:
                best_any = value
                anybody = <int>i
            queue = word_queue(word)
            if not is_full and value > best and (
                queue == 0.0 or queue + pick.cost
                <= ceil(table.bound * (queued + pick.cost) / (weights * c.inverse_weight))
            ):
                best = value
                chosen = <int>i
        return chosen if chosen >= 0 else anybody
    return -1


# --- random, round-robin: for comparison

cdef int _weighted_random(candidates_t* table, const pick_t* pick) noexcept nogil:
    cdef uint32_t i, found = _collect(table, pick.skip)
    cdef double weights = 0.0, at
    if found == 0:
        return -1
    for i in range(found):
        weights += 1.0 / table.items[table.scratch[i]].inverse_weight
    at = random_unit(pick.rng) * weights
    for i in range(found):
        at -= 1.0 / table.items[table.scratch[i]].inverse_weight
        if at < 0.0:
            break
    return <int>table.scratch[min(i, found - 1)]


cdef int _round_robin(candidates_t* table, const pick_t* pick) noexcept nogil:
    """Smooth weighted round robin (as nginx has it): everybody gains his weight, the richest is
    taken and pays what all have gained."""
    cdef uint32_t i, chosen, found = _collect(table, pick.skip)
    cdef double weight, weights = 0.0
    if found == 0:
        return -1
    chosen = table.scratch[0]
    for i in range(found):
        weight = 1.0 / table.items[table.scratch[i]].inverse_weight
        weights += weight
        table.turns[table.scratch[i]] += weight
        if table.turns[table.scratch[i]] > table.turns[chosen]:
            chosen = table.scratch[i]
    table.turns[chosen] -= weights
    return <int>chosen


# --- by name

cdef policy_t find_policy(str name) except NULL:
    """The scan of a policy by its name."""
    if name == "least-loaded":
        return _least_loaded
    if name == "power-of-two":
        return _power_of_two
    if name == "hot-cold":
        return _hot_cold
    if name == "affinity":
        return _affinity
    if name == "round-robin":
        return _round_robin
    if name == "random":
        return _weighted_random
    from shmcoord.policy import POLICIES
    raise ValueError(f"no policy {name!r}; there are {', '.join(POLICIES)}")


cdef NativePolicy native_policy(str name, policy_t scan):
    """A policy for `Router(policy=...)` from a function of one's own.

    The function gets the candidates of the group and what the pick asks for; it must pass over
    those that are not `is_open`, and may be called from any thread.
    """
    cdef NativePolicy self = NativePolicy.__new__(NativePolicy)
    if not name or scan == NULL:
        raise ValueError("a native policy needs a name and a function")
    self.name = name
    self.scan = scan
    return self


cdef class NativePolicy:
    """A policy written in Cython, for `Router(policy=...)`; made by `native_policy` in Cython."""

    def __repr__(self):
        return f"<NativePolicy {self.name}>"
