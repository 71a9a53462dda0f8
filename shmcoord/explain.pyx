# cython: language_level=3, boundscheck=False, wraparound=False
"""Why a node was picked and the others were not; and policies written in Python.

Both look at a private copy of the words of all candidates: the policy's own scan runs over the
copy, so what is explained is what was decided.
"""
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from shmcoord._atomics cimport load_acquire_u32, load_acquire_u64, load_relaxed_u32
from shmcoord._layout cimport SHMC_STATE_SHUTDOWN
from shmcoord._posix cimport mono_ns
from shmcoord.backend cimport Backend
from shmcoord.cells cimport death_is_alive
from shmcoord.liveness cimport Judge
from shmcoord.picker cimport (
    REMOTE,
    affinity_bound,
    allocate,
    candidate_t,
    is_open,
    random_unit,
    release,
    score_of,
    segment_of,
    tier_of,
)
from shmcoord.status cimport (
    HEALTH_DEAD,
    STATE_BUSY,
    STATE_IDLE,
    health_enum,
    state_enum,
    word_generation,
    word_inflight,
    word_public_state,
    word_queue,
)
from shmcoord.table cimport (
    PASSED_EJECTED,
    PASSED_UNREACHABLE,
    Table,
    Watch,
)


cdef class RandomSource:
    """Random numbers for a policy in Python; go on where the router's own stood."""


cdef object _drawer(RandomSource source):
    """A callable that gives the next number in [0, 1)."""
    def draw():
        return random_unit(&source.state)
    return draw


cdef Frozen freeze(Table table):
    """The table as it is now."""
    cdef Frozen self = Frozen.__new__(Frozen)
    cdef uint32_t i, count = table.candidates.count
    cdef const shmc_hot* hot
    self.table = table
    self.hot = <shmc_hot*>calloc(count + 1, sizeof(shmc_hot))
    if not allocate(&self.view, count) or self.hot == NULL:
        raise MemoryError()
    self.view.hot_quantile = table.candidates.hot_quantile
    self.view.bound = table.candidates.bound
    memcpy(self.view.items, table.candidates.items, count * sizeof(candidate_t))
    memcpy(self.view.hashes, table.candidates.hashes, count * sizeof(uint64_t))
    memcpy(self.view.remote, table.candidates.remote, count * sizeof(uint32_t))
    self.view.remote_count = table.candidates.remote_count
    memcpy(self.view.turns, table.candidates.turns, count * sizeof(double))
    for i in range(count):
        hot = table.candidates.items[i].hot
        self.hot[i].load = load_acquire_u64(&hot.load)
        self.hot[i].death = load_acquire_u32(&hot.death)
        self.hot[i].generation = load_acquire_u32(&hot.generation)
        self.hot[i].latency_us = load_relaxed_u32(&hot.latency_us)
        self.hot[i].failures = load_relaxed_u32(&hot.failures)
        self.view.items[i].hot = &self.hot[i]
    return self


cdef class Frozen:
    def __dealloc__(self):
        release(&self.view)
        free(self.hot)

    cdef int choose(self, policy_t scan, object ask, const pick_t* pick) except -2:
        """The index that the policy takes, by `scan` or, if that is NULL, by asking `ask`."""
        cdef uint32_t i, best = 8
        cdef uint64_t word
        cdef RandomSource source = RandomSource.__new__(RandomSource)
        if scan != NULL:
            return scan(&self.view, pick)
        from shmcoord.policy import View  # not needed where nobody asks
        for i in range(self.view.count):
            if is_open(&self.view.items[i], pick, &word):
                best = min(best, tier_of(&self.view.items[i], word))
        every = self.candidates("", -1, pick, ())
        offered = {}
        for i in range(self.view.count):
            # Penalised ones only where nobody else is.
            if is_open(&self.view.items[i], pick, &word) and (
                tier_of(&self.view.items[i], word) >> 2 == best >> 2
            ):
                offered[every[<int>i]] = i
        if not offered:
            return -1
        source.state = pick.rng[0]
        chosen = ask(
            View(tuple(offered), pick.key, pick.cost, _drawer(source))
        )
        pick.rng[0] = source.state
        if chosen is None:
            return -1
        index = offered.get(chosen)
        if index is None:
            raise ValueError(
                f"the policy must return one of view.candidates, or None, not {chosen!r}"
            )
        return index

    cdef tuple candidates(self, str policy, int chosen, const pick_t* pick, object exclude):
        """A `Candidate` for each node, with the reason why it was passed over."""
        cdef uint32_t i
        cdef uint64_t word, now_ns = mono_ns()
        cdef double score, age_s
        cdef int health
        cdef Backend backend
        cdef candidate_t* c
        from shmcoord.decision import Candidate
        found = []
        for i in range(self.view.count):
            c = &self.view.items[i]
            backend = <Backend>self.table.backends[<int>i]
            word = self.hot[i].load
            if word_generation(word) != c.open_tag >> 4:
                word = <uint64_t>SHMC_STATE_SHUTDOWN << 44
            age_s = 0.0
            health = (<Judge>self.table.judges[segment_of(c)]).health(backend.info, now_ns, &age_s)
            if (
                not death_is_alive(self.hot[i].death)
                or self.hot[i].generation != backend.info.generation
            ):
                health = HEALTH_DEAD
            score_of(c, &score)
            found.append(
                Candidate(
                    node=backend.info.node,
                    group=backend.info.group,
                    endpoint=backend.info.endpoint,
                    segment=backend.mapping.name,
                    state=state_enum(word_public_state(word)),
                    health=health_enum(health),
                    queue=word_queue(word),
                    capacity=backend.info.capacity,
                    weight=backend.info.weight,
                    score=score,
                    latency_s=self.hot[i].latency_us / 1e6,
                    share=self.table.shares[i],
                    passed_over="" if <int>i == chosen else self._reason(
                        i, word, health, age_s, now_ns, policy, chosen, pick, exclude
                    ),
                )
            )
        return tuple(found)

    cdef str _reason(self, uint32_t i, uint64_t word, int health, double age_s, uint64_t now_ns,
                     str policy, int chosen, const pick_t* pick, object exclude):
        """Why a candidate was passed over."""
        cdef const candidate_t* c = &self.view.items[i]
        cdef Watch watch = <Watch>self.table.watches[<int>i]
        cdef int state = word_public_state(word)
        cdef double score, worse, best = 0.0
        cdef bint is_ours = True  # the chosen one is of this host
        if chosen >= 0:
            score_of(&self.view.items[chosen], &best)
            is_ours = not self.view.items[chosen].place & REMOTE
        score_of(c, &score)
        worse = score - best
        if health == HEALTH_DEAD:
            return "dead"
        if state not in (STATE_IDLE, STATE_BUSY):
            return state_enum(state).name.lower()
        if c.skip == pick.skip:
            if self.table.backends[<int>i] in exclude:
                return "excluded"
            if self.table.shares[i] < 1.0 and word_inflight(word) < c.capacity:
                return f"starting slowly: {self.table.shares[i]:.0%} of its share so far"
            return "at capacity"
        if c.penalty:
            if self.table.why[i] == PASSED_UNREACHABLE:
                return "could not be reached a moment ago"
            if self.table.why[i] == PASSED_EJECTED:
                left_s = max(<double>watch.ejected_until_ns - <double>now_ns, 0.0) / 1e9
                return f"ejected for failing, for another {left_s:.1f} s"
            if (<Backend>self.table.backends[<int>i]).info.origin_incarnation != 0:
                return f"suspect: no news of it for {age_s:.1f} s, or its own host finds it late"
            return f"suspect: no sign of progress, heartbeat {age_s:.1f} s old"
        if policy == "hot-cold":
            return "hot" if worse > 0 else "higher latency, or a tie"
        if policy == "affinity" and pick.key != 0:
            if word_queue(word) + pick.cost > affinity_bound(&self.view, i, pick.cost):
                return "above its bound"
            return "not first for the key"
        if policy == "power-of-two":
            return "not drawn, or the worse of the two"
        if policy not in ("least-loaded", "affinity"):
            return "not its turn" if policy == "round-robin" else "not drawn"
        if word_inflight(word) >= c.capacity and worse <= 0:
            return "at capacity"
        if worse > 0:
            if is_ours and c.bias > 0 and worse <= c.bias:
                return "of another host"
            return "higher score"
        if worse < 0 and c.place & REMOTE and self.view.remote_count > 2:
            return "of another host, and not one of the two that were drawn"
        return "busy with work of its own" if state == STATE_BUSY and worse == 0 and (
            word_queue(word) == 0
        ) else "tie"
