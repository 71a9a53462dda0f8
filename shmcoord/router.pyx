# cython: language_level=3, boundscheck=False, wraparound=False
"""The sending side: pick and reserve. Knows policies, knows no network.

A router keeps a private table per group: pointers to the nodes' hot lines and copies of what they
wrote once. The membership epoch of each segment says when to build it anew; a heartbeat is judged
a few times per interval, by a coarse clock that is read once per pick.
"""
cimport cython
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from shmcoord._atomics cimport *
from shmcoord._layout cimport *
from shmcoord._posix cimport mono_coarse_ns, mono_ns
from shmcoord.backend cimport Backend, make_backend
from shmcoord.cells cimport sweep_row
from shmcoord.explain cimport Frozen, freeze
from shmcoord.lease cimport Lease, reserve
from shmcoord.liveness cimport Judge, Participant, claim
from shmcoord.picker cimport (
    LOAD_BITS,
    NativePolicy,
    candidate_t,
    find_policy,
    is_open,
    pick_t,
    random_unit,
)
from shmcoord.segment cimport MAPPING_FORKED, MAPPING_OPEN, Mapping
from shmcoord.status cimport NodeInfo, read_info, word_inflight, word_queue
from shmcoord.table cimport Rules, Table, make_table
from shmcoord.trace cimport note_decision
from shmcoord.turns cimport Turns

import itertools
import logging
import os
import threading

from shmcoord.budget import RetryBudget
from shmcoord.errors import NoBackend, Saturated, ShmcoordError

_log = logging.getLogger("shmcoord.router")
_serial = itertools.count(1)

cdef uint64_t _STALE_EVERY_NS = 1_000_000_000
# No attempt has this number: nothing is skipped.
cdef uint32_t _NO_SKIP = 0xFFFFFFFFu


cdef uint64_t _hash_of(key) except? 0:
    """Hash of a caller's key, the same in every process."""
    cdef bytes raw
    if isinstance(key, str):
        raw = (<str>key).encode()
    elif isinstance(key, bytes):
        raw = key
    elif isinstance(key, int) and not isinstance(key, bool):
        raw = b"%d" % key
    else:
        raise TypeError(f"key must be a str, bytes or int, not {type(key).__name__}")
    return shmc_hash(raw, len(raw))


@cython.freelist(16)
@cython.no_gc  # it lives as long as one acquire, and its router outlives that
cdef class Ask:
    """What one acquire asks for."""


cdef object _try_once(Ask ask):
    """What a waiting caller is tried with."""
    def attempt():
        return ask.router._attempt(ask)
    return attempt


cdef class Router:
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
            local ones are busier by more than `remote_margin`. None: all are local.
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
        self.epochs = NULL
        self.scan = NULL
        self.is_closed = True  # until it is whole
        self.segments = []
        self.participants = []
        self.tables = {}
        self.unreachable = {}
        self.watches = {}

    def __init__(self, *segments, policy="least-loaded", seed=None, max_waiters=1024, **rules):
        if not segments:
            raise ValueError("a router needs at least one segment")
        if len(segments) > 128:
            raise ValueError(f"at most 128 segments, not {len(segments)}")
        self._set_policy(policy)
        if not isinstance(max_waiters, int) or isinstance(max_waiters, bool):
            raise TypeError(f"max_waiters must be an int, not {type(max_waiters).__name__}")
        if max_waiters < 0:
            raise ValueError(f"max_waiters must not be negative, not {max_waiters}")
        self.max_waiters = max_waiters
        self.rules = Rules(**rules)
        if seed is None:
            self.rng = int.from_bytes(os.urandom(8), "little") | 1
        else:
            self.rng = (<uint64_t>(seed & 0xFFFFFFFFFFFFFFFF) * 0x9E3779B97F4A7C15u) | 1
        self.segments = [
            segment if isinstance(segment, Mapping) else Mapping.open(segment)
            for segment in segments
        ]
        names = [segment.name for segment in self.segments]
        if len(set(names)) != len(names):
            raise ValueError(f"a segment is named twice: {', '.join(names)}")
        if self.rules.local is not None and not self.rules.local <= set(names):
            raise ValueError(
                f"local names segments that the router does not have: "
                f"{', '.join(sorted(self.rules.local - set(names)))}"
            )
        for segment in self.segments:
            (<Mapping>segment).check()
            if not (<Mapping>segment).m.writable:
                raise ValueError(
                    f"segment {segment.name} is attached read-only; a router reserves, so give "
                    "it a name or a Segment.open"
                )
        self.count = <uint32_t>len(self.segments)
        self.participants = [None] * self.count
        self.turns = Turns(self.segments, self.participants)
        self.claiming = threading.RLock()
        self.judges = [Judge(segment) for segment in self.segments]
        self.tables = {}
        self.unreachable = {}
        self.watches = {}
        self.epochs = <uint64_t*>calloc(self.count, sizeof(uint64_t))
        if self.epochs == NULL:
            raise MemoryError()
        for i in range(self.count):
            self.epochs[<uint32_t>i] = load_acquire_u64(&(<Mapping>self.segments[i]).m.sync.epoch)
        self.stale_at_ns = mono_coarse_ns() + _STALE_EVERY_NS
        self.waiting = None
        self.is_closed = False

    def _set_policy(self, policy):
        if isinstance(policy, str):
            self.scan = find_policy(policy)
            self.policy = policy
        elif isinstance(policy, NativePolicy):
            self.scan = (<NativePolicy>policy).scan
            self.policy = policy.name
            self.asked = policy  # keeps its module
        elif callable(policy):
            self.asked = policy
            self.policy = getattr(policy, "__name__", type(policy).__name__)
        else:
            raise TypeError(
                "policy must be a name, a callable or a NativePolicy, "
                f"not {type(policy).__name__}"
            )

    def __dealloc__(self):
        free(self.epochs)

    # --- tables

    cdef int _check(self) except -1:
        if self.is_closed:
            raise ValueError("the router is closed")
        for segment in self.segments:
            (<Mapping>segment).check()
        return 0

    cdef Table table_of(self, group):
        """The group's table, judged not long ago."""
        cdef uint32_t i
        cdef uint64_t now_ns
        cdef Mapping segment
        cdef Table table
        cdef bint moved = False
        if self.is_closed:
            raise ValueError("the router is closed")
        for i in range(self.count):
            segment = <Mapping>self.segments[i]
            if segment.m.state != MAPPING_OPEN:
                segment.check()
            if load_acquire_u64(&segment.m.sync.epoch) != self.epochs[i]:
                moved = True
        if not moved and self.last_table is not None and group is self.last_group:
            table = self.last_table
        else:
            if not isinstance(group, str):
                raise TypeError(f"group must be a str, not {type(group).__name__}")
            table = None if moved else <Table>self.tables.get(group)
            if table is None:
                table = self._rebuild(<str>group)
        now_ns = self.now_ns = mono_coarse_ns()
        if now_ns >= table.judge_at_ns:
            if now_ns >= self.stale_at_ns and self._look_for_stale(now_ns):
                table = self._rebuild(<str>group)
            table.judge(now_ns, self.unreachable)
        return table

    cdef Table _rebuild(self, str group):
        """Read the members of the group anew; forgets the other tables if the epoch has moved."""
        cdef uint32_t i, slot
        cdef uint64_t epoch, now_ns
        cdef Mapping segment
        cdef NodeInfo info
        cdef Table table, before = <Table>self.tables.get(group)
        cdef bytes raw = group.encode()
        backends = []
        segments_of = []
        for i in range(self.count):
            segment = <Mapping>self.segments[i]
            # The epoch first: members that change while we read them make the next pick rebuild.
            epoch = load_acquire_u64(&segment.m.sync.epoch)
            if epoch != self.epochs[i]:
                self.tables = {}
                self.last_group = None
                self.last_table = None
                self.epochs[i] = epoch
                now_ns = mono_coarse_ns()
                self.unreachable = {
                    backend: until for backend, until in self.unreachable.items() if until > now_ns
                }
                self.watches = {
                    backend: watch for backend, watch in self.watches.items()
                    if (<Backend>backend).m.state == MAPPING_OPEN and backend.alive
                }
            for slot in range(segment.m.slots):
                info = read_info(segment.m, slot)
                if info is not None and info.group == group:
                    backends.append(make_backend(segment, info))
                    segments_of.append(i)
        table = make_table(
            backends,
            segments_of,
            self.judges,
            self.rules,
            self.watches,
            shmc_hash(raw, len(raw)),
            &self.rng,
            before,
        )
        if backends or len(self.tables) < 256:  # names that nobody has must not fill the memory
            self.tables[group] = table
            self.last_group = group
            self.last_table = table
        return table

    cdef int _look_for_stale(self, uint64_t now_ns) except -1:
        """Attach anew where a segment was unlinked and made again; whether that happened."""
        cdef uint32_t i
        cdef int found = 0
        self.stale_at_ns = now_ns + _STALE_EVERY_NS
        for i in range(self.count):
            segment = <Mapping>self.segments[i]
            if not segment.is_stale():
                continue
            try:
                fresh = segment._attach_anew()
            except ShmcoordError:
                continue  # nobody has made it anew, or it is not whole yet
            _log.warning("segment %s was made anew: attached to the new one", segment.name)
            self.segments[i] = fresh
            self.participants[i] = None  # leases on the old one keep theirs alive
            judges = list(self.judges)
            judges[i] = Judge(fresh)
            self.judges = judges
            self.epochs[i] = load_acquire_u64(&(<Mapping>fresh).m.sync.epoch)
            self.tables = {}
            self.last_group = None
            self.last_table = None
            found = 1
        return found

    # --- picking

    cdef int _choose(self, Table table, const pick_t* pick) except -2:
        if self.scan != NULL:
            return self.scan(&table.candidates, pick)
        return freeze(table).choose(NULL, self.asked, pick)

    cdef bint _is_gated(self, Table table, int index):
        """Whether a node that starts slowly is to be passed over this time: chance decides, so
        that it gets its share whatever the policy."""
        return table.shares[index] < 1.0 and random_unit(&self.rng) >= table.shares[index]

    cdef uint32_t _next_skip(self) noexcept:
        self.attempt += 1
        if self.attempt == _NO_SKIP:
            self.attempt = 1  # 0 is what a new table has
        return self.attempt

    def pick(self, group, *, key=None):
        """The node that the policy would take now; reserves nothing.

        Args:
            group: the nodes that can serve the request.
            key: for the policy `affinity`: a str, bytes or int; the same key, the same node.

        Raises:
            NoBackend: nobody is eligible; the message says why for each node.
        """
        cdef Table table = self.table_of(group)
        cdef pick_t pick
        cdef int index, other
        pick.skip = _NO_SKIP
        pick.cost = 1
        pick.key = 0 if key is None else _hash_of(key)
        pick.rng = &self.rng
        index = self._choose(table, &pick)
        if index < 0:
            self._raise_no_backend(group, ())
        if table.is_slow and self._is_gated(table, index):
            pick.skip = self._next_skip()
            table.candidates.items[index].skip = pick.skip
            other = self._choose(table, &pick)
            if other >= 0 and not table.candidates.items[other].penalty:
                index = other
        return <Backend>table.backends[index]

    def explain(self, group, *, key=None, cost=1):
        """What `pick` would do now, and why, for every candidate: a `Decision`."""
        cdef Table table = self.table_of(group)
        cdef pick_t pick
        pick.skip = _NO_SKIP
        pick.cost = cost
        pick.key = 0 if key is None else _hash_of(key)
        pick.rng = &self.rng
        return self._decide(table, group, &pick, (), False)[0]

    cdef tuple _decide(self, Table table, str group, const pick_t* pick, object exclude,
                       bint is_real):
        """A Decision and the index of the chosen candidate (-1: nobody)."""
        cdef Frozen frozen = freeze(table)
        cdef int chosen = frozen.choose(self.scan, self.asked, pick)
        from shmcoord.decision import Decision  # not needed where nobody asks why
        if is_real:  # round-robin goes on behind it
            memcpy(
                table.candidates.turns, frozen.view.turns,
                table.candidates.count * sizeof(double),
            )
        decision = Decision(
            group=group,
            policy=self.policy,
            chosen=table.backends[chosen] if chosen >= 0 else None,
            candidates=frozen.candidates(self.policy, chosen, pick, exclude),
            panic=table.is_panic,
        )
        return decision, chosen

    # --- reserving

    def acquire(self, group, timeout_s=0.0, cost=1, *, key=None, explain=False, exclude=(),
                idle_only=False):
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

        Returns:
            A `Lease`; release it, or use it as a context manager.

        Raises:
            NoBackend: nobody is eligible; the message says why for each node.
            Saturated: all were at capacity until the time-out, too many wait already, or, with
                `idle_only`, none was idle.
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
        return self._wait(ask, wait_s)

    cdef Lease _wait(self, Ask ask, double timeout_s):
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
            lease = future.result()
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
        ask.key = 0 if key is None else _hash_of(key)
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
                owner = <Participant>self.participants[c.segment]
                if owner is None or owner.mapping is not backend.mapping:
                    owner = self._claim(backend.mapping, c.segment)
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
            owner = self.participants[table.candidates.items[i].segment]
            if owner is None or (<Participant>owner).mapping is not backend.mapping:
                self._claim(backend.mapping, table.candidates.items[i].segment)
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
        pick.skip = _NO_SKIP
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
        pick.skip = _NO_SKIP
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

    def _raise_no_backend(self, group, exclude):
        decision = self.explain(group)
        excluded = {backend.node for backend in exclude}
        where = ", ".join(segment.name for segment in self.segments)
        if not decision.candidates:
            raise NoBackend(f"no node of group {group!r} is in {where}; has one joined?")
        why = "; ".join(
            f"{candidate.node}: "
            + ("excluded" if candidate.node in excluded else candidate.passed_over or "just now so")
            for candidate in decision.candidates
        )
        raise NoBackend(f"no eligible node in group {group!r} of {where}: {why}")

    def _raise_saturated(self, Ask ask, timeout_s):
        """`timeout_s` is how long was waited; below 0: too many wait already."""
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

    def mark_unreachable(self, backend, for_s=1.0):
        """Pass a node over while others are eligible, for some seconds (inf: for good).

        It concerns this router only.

        For whoever found that its endpoint does not answer although the process lives.
        """
        if not isinstance(backend, Backend):
            raise TypeError(f"backend must be a Backend, not {type(backend).__name__}")
        for_s = float(for_s)
        if not for_s >= 0:
            raise ValueError(f"for_s must not be negative, not {for_s}")
        self._check()
        self.unreachable[backend] = mono_coarse_ns() + <uint64_t>(min(for_s, 1e9) * 1e9)
        self._judge_soon()

    def mark_reachable(self, backend):
        """Undo `mark_unreachable` early."""
        self._check()
        if self.unreachable.pop(backend, None) is not None:
            self._judge_soon()

    def _judge_soon(self):
        for table in self.tables.values():
            (<Table>table).judge_at_ns = 0

    # --- end

    @property
    def closed(self):
        """Whether `close` was called."""
        return bool(self.is_closed)

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
