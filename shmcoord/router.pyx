# cython: language_level=3, boundscheck=False, wraparound=False
"""The sending side: pick and reserve, or wait for capacity. Knows policies, knows no network."""
cimport cython
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

from shmcoord._atomics cimport *
from shmcoord._layout cimport *
from shmcoord._posix cimport mono_ns
from shmcoord.backend cimport Backend
from shmcoord.cells cimport sweep_row
from shmcoord.groups cimport NO_SKIP, Groups, hash_of
from shmcoord.lease cimport Lease, reserve
from shmcoord.liveness cimport Participant, claim
from shmcoord.picker cimport LOAD_BITS, candidate_t, is_open, pick_t, segment_of
from shmcoord.segment cimport MAPPING_FORKED, MAPPING_OPEN, Mapping
from shmcoord.status cimport word_inflight, word_queue
from shmcoord.table cimport Table
from shmcoord.trace cimport note_decision
from shmcoord.turns cimport Turns

import itertools
import os
import threading

from shmcoord.budget import RetryBudget
from shmcoord.errors import Saturated

_serial = itertools.count(1)


@cython.freelist(16)
@cython.no_gc  # it lives as long as one acquire, and its router outlives that
cdef class Ask:
    """What one acquire asks for."""


cdef object _try_once(Ask ask):
    """What a waiting caller is tried with."""
    def attempt():
        return ask.router._attempt(ask)
    return attempt


cdef class Router(Groups):
    """Picks and reserves the nodes of one or several segments.

    Args:
        segments: names, or open `Segment` objects. A name is opened as by `Segment.open`, so a
            router may start before the first node.
        policy: a name of `shmcoord.policy.POLICIES`; a callable that gets a `shmcoord.policy.View`
            and returns one of its candidates (or None); or a `NativePolicy`.
        seed: start of the random state, for repeatable tests; by default from the system.
        max_waiters: callers of this router that may wait for capacity at once; the next one is
            `Saturated` immediately.
        local: names of the segments of this host. Nodes of the others are taken only when the
            local ones are busier by more than `remote_margin`, and `least-loaded` compares only two
            of them, drawn by chance. None: all but the mirrors that a bridge keeps are local.
        remote_margin: in requests (of weight 1).
        panic_threshold: where less than this part of the nodes is healthy, all that are not dead
            are used, suspect and ejected ones too. 0: only where nobody healthy is left.
        eject_after: a node with so many failed requests in a row, while the others do not fail
            likewise, is passed over for a while; also one whose recent error rate is 0.3 above
            that of the others. At most half of a group. 0: never.
        eject_s: for how long, seconds; doubled each time that it fails again, up to 300 s.
        hot_quantile: of the loads of the group, above which `hot-cold` takes a node for hot.
        affinity_bound: how many times its share of the load `affinity` gives to a node.

    A context manager: leaving it closes. It may be shared by threads. It claims a participant slot
    in a segment at its first `acquire` there; `pick` and `explain` need none.
    """

    def __cinit__(self, *segments, **options):
        self.participants = []

    def __init__(self, *segments, policy="least-loaded", seed=None, max_waiters=1024, **rules):
        if not isinstance(max_waiters, int) or isinstance(max_waiters, bool):
            raise TypeError(f"max_waiters must be an int, not {type(max_waiters).__name__}")
        if max_waiters < 0:
            raise ValueError(f"max_waiters must not be negative, not {max_waiters}")
        self.max_waiters = max_waiters
        self._open(segments, policy, seed, rules)
        self.participants = [None] * self.count
        self.turns = Turns(self.segments, self.participants)
        self.claiming = threading.RLock()
        self.waiting = None
        self.is_closed = False

    cdef int _has_moved(self, uint32_t i) except -1:
        self.participants[i] = None  # leases on the old one keep theirs alive
        return 0

    # --- reserving

    def acquire(self, group, timeout_s=0.0, cost=1, *, key=None, explain=False, exclude=(),
                idle_only=False, waits=None):
        """Pick and reserve, atomically.

        Args:
            group: the nodes that can serve the request.
            timeout_s: how long to wait while every eligible node is at its capacity, seconds;
                callers of one router are served first come first served, and nearly so those of
                all routers of the host.
            cost: what the lease counts for in the node's queue, 1 to 65535.
            key: for the policy `affinity`: a str, bytes or int; the same key, the same node.
            explain: put the `Decision` into `lease.decision`.
            exclude: backends that this request must not go to, for instance since it went there
                in vain.
            idle_only: take only a node with nothing waiting or in flight; never waits.
            waits: a `shmcoord.waiters.Waits`, by which somebody else may end this wait.

        Returns:
            A `Lease`; release it, or use it as a context manager.

        Raises:
            NoBackend: nobody is eligible; the message says why for each node.
            Saturated: all were at capacity until the time-out, or until the wait was ended; too
                many wait already; or, with `idle_only`, none was idle.
            SegmentFull: there is no participant slot left for this router.
        """
        cdef Lease lease
        cdef Ask ask = self._ask(group, cost, key, explain, exclude, idle_only)
        cdef double wait_s = _check_timeout(timeout_s)
        if idle_only:
            wait_s = 0.0
        if not self._is_behind(ask, wait_s > 0):
            lease = self._attempt(ask)
            if lease is not None:
                return lease
        return self._wait(ask, wait_s, waits)

    def try_acquire(self, group, cost=1, *, key=None, explain=False, exclude=()):
        """`acquire` for who would wait, but not here: None where he would have to.

        It goes behind those who wait already as `acquire` with a `timeout_s` does; without one that
        overtakes the callers of other routers.
        """
        cdef Ask ask = self._ask(group, cost, key, explain, exclude, False)
        if self._is_behind(ask, True):
            return None
        return self._attempt(ask)

    cdef Lease _wait(self, Ask ask, double timeout_s, waits):
        """Stand in the queue, on a thread."""
        cdef Lease lease
        if timeout_s <= 0:
            self._raise_saturated(ask, timeout_s)
        waiter = self._queue(ask).put(
            ask.group, ask.group_hash, _try_once(ask), min(timeout_s, 1e6)
        )
        if waiter is None:
            self._raise_saturated(ask, -1.0)
        future = waiter.future
        try:
            lease = future.result() if waits is None else waits.result(future)
        except BaseException:
            # Interrupted (Ctrl-C): nobody will take what comes.
            if (<Mapping>self.segments[0]).m.state == MAPPING_FORKED:
                raise
            if future.cancel():
                self.waiting.leave(waiter)
            elif future.exception() is None and future.result() is not None:
                future.result().release()
            raise
        if lease is None:
            if future.cancelled():
                self.waiting.leave(waiter)
                self._raise_saturated(ask, timeout_s, True)
            self._raise_saturated(ask, timeout_s)
        return lease

    @cython.binding(True)  # so that inspect.iscoroutinefunction knows it for what it is
    async def acquire_async(self, group, timeout_s=1.0, cost=1, *, key=None, explain=False,
                            exclude=(), idle_only=False):
        """`acquire` on an event loop: waits without blocking it, and can be cancelled."""
        ask = self._ask(group, cost, key, explain, exclude, idle_only)
        timeout_s = _check_timeout(timeout_s)
        if idle_only:
            timeout_s = 0.0
        if not self._is_behind(ask, timeout_s > 0):
            lease = self._attempt(ask)
            if lease is not None:
                return lease
        if timeout_s <= 0:
            self._raise_saturated(ask, timeout_s)
        waiter = self._queue(ask).put_async(
            (<Ask>ask).group, (<Ask>ask).group_hash, _try_once(ask), min(timeout_s, 1e6)
        )
        if waiter is None:
            self._raise_saturated(ask, -1.0)
        future = waiter.future
        try:
            lease = await future
        except BaseException:
            if (<Mapping>self.segments[0]).m.state == MAPPING_FORKED:
                raise  # the queue is the parent's, and its lock may be held for ever here
            self.waiting.leave(waiter)
            # Cancelled between the hand-over and our waking up: what came is given back. (What
            # comes later finds the future cancelled.)
            if future.done() and not future.cancelled() and future.exception() is None:
                lease = future.result()
                if lease is not None:
                    lease.release()
            raise
        if lease is None:
            self._raise_saturated(ask, timeout_s)
        return lease

    cdef Ask _ask(self, group, cost, key, bint explain, exclude, bint idle_only):
        cdef Ask ask
        if not isinstance(group, str):
            raise TypeError(f"group must be a str, not {type(group).__name__}")
        if not isinstance(cost, int) or isinstance(cost, bool):
            raise TypeError(f"cost must be an int, not {type(cost).__name__}")
        if not 1 <= cost <= SHMC_COST_MAX:
            raise ValueError(f"cost must be between 1 and {SHMC_COST_MAX}, not {cost}")
        ask = Ask.__new__(Ask)
        ask.router = self
        ask.group = <str>group
        ask.cost = cost
        ask.key = 0 if key is None else hash_of(key)
        ask.explain = explain
        ask.exclude = exclude
        ask.idle_only = idle_only
        return ask

    cdef bint _is_behind(self, Ask ask, bint can_wait) except -1:
        """Whether callers wait for the group already: then we go behind them.

        Who does not want to wait takes a free cell also where other routers' callers wait.
        """
        cdef uint32_t i
        if self.is_closed or (<Mapping>self.segments[0]).m.state != MAPPING_OPEN:
            self._check()  # in a forked child the memory is not there, and our locks may be held
        if self.waiting is not None and self.waiting.has_ahead(ask.group):
            return True
        if can_wait:
            for i in range(self.count):
                if load_relaxed_u32(&(<Mapping>self.segments[i]).m.sync.waiters) != 0:
                    self._check()
                    ask.group_hash = self.table_of(ask.group).group_hash
                    return self.turns.others_wait(ask.group_hash)
        return False

    cdef Lease _attempt(self, Ask ask):
        """One try; None if every eligible node is at its capacity (or, if asked, none is idle)."""
        cdef Table table = self.table_of(ask.group)
        cdef candidate_t* c
        cdef Backend backend
        cdef Participant owner
        cdef Lease lease
        cdef pick_t pick
        cdef uint32_t i
        cdef int index
        cdef uint64_t waited_ns
        cdef bint full, any_full, gated, gate = table.is_slow, swept = False
        cdef object decision = None
        pick.cost = ask.cost
        pick.key = ask.key
        pick.rng = &self.rng
        while True:
            pick.skip = self._next_skip()
            any_full = gated = False
            if ask.exclude:
                for i in range(table.candidates.count):
                    if table.backends[<int>i] in ask.exclude:
                        table.candidates.items[i].skip = pick.skip
            while True:
                if ask.explain:
                    decision, index = self._decide(table, ask.group, &pick, ask.exclude, True)
                else:
                    index = self._choose(table, &pick)
                if index < 0:
                    break
                c = &table.candidates.items[index]
                if c.penalty and (any_full or gated):
                    break  # healthy nodes are there, full as they are
                if ask.exclude and table.backends[index] in ask.exclude:
                    c.skip = pick.skip  # another thread's attempt has marked it meanwhile
                    continue
                if ask.idle_only and load_relaxed_u64(&c.hot.load) & LOAD_BITS:
                    c.skip = pick.skip
                    any_full = True  # healthy, so no penalised one instead
                    continue
                if gate and self._is_gated(table, index):
                    c.skip = pick.skip
                    gated = True
                    continue
                backend = <Backend>table.backends[index]
                owner = <Participant>self.participants[segment_of(c)]
                if owner is None or owner.mapping is not backend.mapping:
                    owner = self._claim(backend.mapping, segment_of(c))
                full = False
                lease = reserve(backend, owner, ask.cost, &full)
                if lease is not None:
                    lease.decision = decision
                    if load_relaxed_u32(&c.hot.failures) >= table.marks[index]:
                        table.judge_at_ns = 0  # it fails: do not wait for the clock
                    waited_ns = mono_ns() - ask.began_ns if ask.began_ns else 0
                    note_decision(
                        owner, self.now_ns, table.group_hash, SHMC_DECIDED_LEASE,
                        backend.info.slot, waited_ns,
                        max(word_queue(load_relaxed_u64(&c.hot.load)), ask.cost) - ask.cost,
                        table.candidates.count,
                    )
                    return lease
                c.skip = pick.skip
                any_full = any_full or full
            if gated:  # nobody else has room: those that start slowly are taken as well
                gate = False
                continue
            if ask.idle_only:
                return None
            if not any_full:
                self._note_refusal(table, SHMC_DECIDED_NOBODY)
                self._raise_no_backend(ask.group, ask.exclude)
            if swept:
                return None
            # Perhaps some of those leases belong to the dead: look once.
            swept = True
            full = True
            for i in range(table.candidates.count):
                backend = <Backend>table.backends[<int>i]
                if sweep_row(backend.m, backend.info.slot):
                    full = False
            if full:
                return None

    cdef void _note_refusal(self, Table table, uint32_t outcome) noexcept:
        for owner in self.participants:
            if owner is not None and not (<Participant>owner).left:
                note_decision(
                    <Participant>owner, self.now_ns, table.group_hash, outcome, 0, 0, 0,
                    table.candidates.count,
                )
                return

    cdef Participant _claim(self, Mapping mapping, uint32_t index):
        """This router's participant in one segment.

        One thread claims at a time, or each would hold a slot for a moment. A signal handler that
        interrupts a claim may claim too: its participant is the one that stays.
        """
        with self.claiming:
            existing = self.participants[index]
            if existing is None or (<Participant>existing).mapping is not mapping:
                existing = self._claim_one(mapping, index)
            return <Participant>existing

    cdef Participant _claim_one(self, Mapping mapping, uint32_t index):
        cdef shmc_meta meta
        cdef bytes name = f"router-{os.getpid()}-{next(_serial)}".encode()
        memset(&meta, 0, sizeof(meta))
        for i, byte in enumerate(name):
            meta.name[<int>i] = byte
        meta.weight = 1.0
        meta.capacity = 1
        meta.interval_ns = 2_000_000_000
        participant = claim(mapping, SHMC_KIND_ROUTER, &meta, "")
        existing = self.participants[index]
        if existing is not None and (<Participant>existing).mapping is mapping:
            (<Participant>participant).leave()
            return <Participant>existing
        self.participants[index] = participant
        return <Participant>participant

    # --- waiting for capacity

    cdef object _queue(self, Ask ask):
        """The queue of those who wait; from here on `ask` counts its time."""
        cdef Table table = self.table_of(ask.group)
        cdef uint32_t i
        cdef Backend backend
        ask.began_ns = mono_ns()
        ask.group_hash = table.group_hash
        # Who waits is found by his slot: it takes one wherever there is a node to wait for.
        for i in range(table.candidates.count):
            backend = <Backend>table.backends[<int>i]
            owner = self.participants[segment_of(&table.candidates.items[i])]
            if owner is None or (<Participant>owner).mapping is not backend.mapping:
                self._claim(backend.mapping, segment_of(&table.candidates.items[i]))
        if self.waiting is None:
            from shmcoord.waiting import WaitQueue  # not needed where nobody waits
            queue = WaitQueue(self.turns, _release_quietly, self._pass_on, self.max_waiters)
            if self.waiting is None:  # another thread may have made it meanwhile
                self.waiting = queue
        return self.waiting

    def _pass_on(self, group):
        """Tell another router if a node of the group may have room that no caller here needs."""
        cdef Table table
        cdef uint32_t i
        cdef uint64_t word
        cdef pick_t pick
        if group is None or self.is_closed:  # closed meanwhile: none of our callers needs it
            self.turns.pass_on(0)
            return
        table = self.table_of(group)
        pick.skip = NO_SKIP
        for i in range(table.candidates.count):
            if is_open(&table.candidates.items[i], &pick, &word) and (
                word_inflight(word) < table.candidates.items[i].capacity
            ):
                self.turns.pass_on(table.group_hash)
                return

    cdef object _expected_wait_s(self, Ask ask):
        """How long a new caller would wait, as far as the nodes' latencies tell; else None.

        All that wait before him, by the rate at which the group serves: the capacities by the
        smoothed latencies (Little's law).
        """
        cdef Table table = self.table_of(ask.group)
        cdef uint32_t i, latency_us
        cdef uint64_t word
        cdef double rate = 0.0
        cdef pick_t pick
        pick.skip = NO_SKIP
        for i in range(table.candidates.count):
            latency_us = load_relaxed_u32(&table.candidates.items[i].hot.latency_us)
            if latency_us and is_open(&table.candidates.items[i], &pick, &word):
                rate += table.candidates.items[i].capacity / (latency_us / 1e6)
        if rate == 0.0:
            return None
        ahead = self.turns.waiting_elsewhere(table.group_hash)
        if self.waiting is not None:
            ahead += self.waiting.ahead(ask.group)
        return (ahead + 1) / rate

    # --- what cannot be done

    def _raise_saturated(self, Ask ask, timeout_s, ended=False):
        """`timeout_s` is how long was waited; below 0: too many wait already.

        `ended`: or less long, since somebody has ended the wait.
        """
        self._note_refusal(self.table_of(ask.group), SHMC_DECIDED_SATURATED)
        nodes = ", ".join(
            f"{candidate.node} {candidate.queue}/{candidate.capacity}"
            for candidate in self.explain(ask.group).candidates
        )
        expected_s = self._expected_wait_s(ask)
        if ask.idle_only:
            text = f"no eligible node of group {ask.group!r} is idle: {nodes}"
        elif timeout_s < 0:
            text = (
                f"{self.max_waiters} callers of this router wait for capacity already, and every "
                f"eligible node of group {ask.group!r} is at its capacity: {nodes}"
            )
        else:
            waited = f" for {timeout_s:g} s" if timeout_s > 0 else ""
            if ended:
                waited = " until the wait was ended"
            text = (
                f"every eligible node of group {ask.group!r} was at its capacity{waited}: {nodes}"
            )
        if expected_s is not None:
            text += f"; a new caller would wait about {expected_s:.3g} s"
        raise Saturated(text, retry_after_s=expected_s)

    def retry_budget(self, ratio=0.2, burst=100):
        """The budget of retries that all routers of the (first) segment share.

        Args:
            ratio: retries that each request earns.
            burst: retries that may be made before any were earned.
        """
        self._check()
        return RetryBudget(self.segments, ratio, burst)

    # --- end

    def close(self):
        """Give back the participant slots and every lease still held. Idempotent."""
        if self.is_closed:
            return
        for segment in self.segments:
            if (<Mapping>segment).m.state == MAPPING_FORKED:
                (<Mapping>segment).check()
        self.is_closed = True
        try:
            if self.waiting is not None:
                self.waiting.close()
        finally:
            for participant in self.participants:
                if participant is not None:
                    (<Participant>participant).leave()
        self.tables = {}
        self.last_group = None
        self.last_table = None

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def __repr__(self):
        names = ", ".join(segment.name for segment in self.segments)
        return f"<Router over {names}, {self.policy}{', closed' if self.is_closed else ''}>"


cdef double _check_timeout(given) except -1.0:
    cdef double timeout_s = float(given)
    if timeout_s != timeout_s or timeout_s < 0:
        raise ValueError(f"timeout_s must not be negative, not {timeout_s}")
    return timeout_s


def _release_quietly(lease):
    if not lease.released:
        lease.release()
