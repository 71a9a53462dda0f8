# cython: language_level=3, boundscheck=False, wraparound=False
"""The sending side: pick and reserve. Knows policies, knows no network.

A router keeps a private table per group: pointers to the nodes' hot lines and copies of what they
wrote once. The membership epoch of each segment says when to build it anew; a heartbeat is judged
a few times per interval, by a coarse clock that is read once per pick.
"""
cimport cython
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from shmcoord._atomics cimport *
from shmcoord._layout cimport *
from shmcoord._posix cimport mono_coarse_ns, mono_ns
from shmcoord.backend cimport Backend, make_backend
from shmcoord.cells cimport death_is_alive, sweep_row
from shmcoord.lease cimport Lease, reserve
from shmcoord.liveness cimport Judge, Participant, claim
from shmcoord.picker cimport (
    Table,
    candidate_t,
    candidates_t,
    find_policy,
    make_table,
    score_of,
)
from shmcoord.segment cimport MAPPING_FORKED, MAPPING_OPEN, Mapping
from shmcoord.status cimport (
    HEALTH_DEAD,
    STATE_BUSY,
    STATE_IDLE,
    NodeInfo,
    health_enum,
    read_info,
    state_enum,
    word_generation,
    word_public_state,
    word_queue,
)

import itertools
import logging
import os

from shmcoord.errors import NoBackend, Saturated, ShmcoordError
from shmcoord.release import ReleaseWait

_log = logging.getLogger("shmcoord.router")
_serial = itertools.count(1)

cdef uint64_t _STALE_EVERY_NS = 1_000_000_000
# No attempt has this number: nothing is skipped.
cdef uint32_t _NO_SKIP = 0xFFFFFFFFu


cdef class Router:
    """Picks and reserves the nodes of one or several segments.

    Args:
        segments: names, or open `Segment` objects. A name is opened as by `Segment.open`, so a
            router may start before the first node.
        policy: a name of `shmcoord.policy.POLICIES`.
        seed: start of the random state, for repeatable tests; by default from the system.

    A context manager: leaving it closes. It may be shared by threads. It claims a participant slot
    in a segment at its first `acquire` there; `pick` and `explain` need none.
    """

    def __cinit__(self, *segments, **options):
        self.epochs = NULL
        self.is_closed = True  # until it is whole
        self.segments = []
        self.participants = []
        self.tables = {}
        self.unreachable = {}

    def __init__(self, *segments, policy="least-loaded", seed=None):
        if not segments:
            raise ValueError("a router needs at least one segment")
        if not isinstance(policy, str):
            raise TypeError(f"policy must be a str, not {type(policy).__name__}")
        if len(segments) > 128:
            raise ValueError(f"at most 128 segments, not {len(segments)}")
        self.scan = find_policy(policy)
        self.policy = policy
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
        for segment in self.segments:
            (<Mapping>segment).check()
            if not (<Mapping>segment).m.writable:
                raise ValueError(
                    f"segment {segment.name} is attached read-only; a router reserves, so give "
                    "it a name or a Segment.open"
                )
        self.count = <uint32_t>len(self.segments)
        self.participants = [None] * self.count
        self.judges = [Judge(segment) for segment in self.segments]
        self.tables = {}
        self.unreachable = {}
        self.epochs = <uint64_t*>calloc(self.count, sizeof(uint64_t))
        if self.epochs == NULL:
            raise MemoryError()
        for i in range(self.count):
            self.epochs[<uint32_t>i] = load_acquire_u64(&(<Mapping>self.segments[i]).m.sync.epoch)
        self.stale_at_ns = mono_coarse_ns() + _STALE_EVERY_NS
        self.waiting = None
        self.is_closed = False

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
        now_ns = mono_coarse_ns()
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
        cdef Table table, before
        backends = []
        segments_of = []
        before = <Table>self.tables.get(group)
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
            for slot in range(segment.m.slots):
                info = read_info(segment.m, slot)
                if info is not None and info.group == group:
                    backends.append(make_backend(segment, info))
                    segments_of.append(i)
        table = make_table(
            backends,
            segments_of,
            self.judges,
            before.candidates.cursor if before is not None else 0,
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

    def pick(self, group):
        """The node that the policy would take now; reserves nothing.

        Args:
            group: the nodes that can serve the request.

        Raises:
            NoBackend: nobody is eligible; the message says why for each node.
        """
        cdef Table table = self.table_of(group)
        cdef int index = self.scan(&table.candidates, _NO_SKIP, &self.rng)
        if index < 0:
            self._raise_no_backend(group, ())
        return <Backend>table.backends[index]

    def explain(self, group):
        """What `pick` would do now, and why, for every candidate: a `Decision`."""
        cdef Table table = self.table_of(group)
        return self._decide(table, group, _NO_SKIP, ())[0]

    cdef tuple _decide(self, Table table, str group, uint32_t skip, object exclude):
        """A Decision and the index of the chosen candidate (-1: nobody).

        The words of all candidates are copied first, and the policy's own scan runs over the copy,
        so that what is explained is what was decided.
        """
        cdef uint32_t i, count = table.candidates.count
        cdef shmc_hot* frozen = <shmc_hot*>calloc(count + 1, sizeof(shmc_hot))
        cdef candidate_t* items = <candidate_t*>calloc(count + 1, sizeof(candidate_t))
        cdef candidates_t view
        cdef int chosen, health
        cdef uint64_t word, now_ns = mono_ns()
        cdef double score, age_s
        cdef Backend backend
        cdef const shmc_hot* hot
        from shmcoord.decision import Candidate, Decision  # not needed where nobody asks why
        if frozen == NULL or items == NULL:
            free(frozen)
            free(items)
            raise MemoryError()
        try:
            view = table.candidates
            view.items = items
            for i in range(count):
                items[i] = table.candidates.items[i]
                hot = items[i].hot
                frozen[i].load = load_acquire_u64(&hot.load)
                frozen[i].death = load_acquire_u32(&hot.death)
                frozen[i].generation = load_acquire_u32(&hot.generation)
                items[i].hot = &frozen[i]
            chosen = self.scan(&view, skip, &self.rng)
            if skip != _NO_SKIP:  # a real decision: round-robin goes on behind it
                table.candidates.cursor = view.cursor
            best = 0.0
            if chosen >= 0:
                score_of(&items[chosen], &score)
                best = score
            candidates = []
            for i in range(count):
                backend = <Backend>table.backends[i]
                word = frozen[i].load
                if word_generation(word) != items[i].open_tag >> 4:
                    word = <uint64_t>SHMC_STATE_SHUTDOWN << 44
                age_s = 0.0
                health = (<Judge>table.judges[items[i].segment]).health(
                    backend.info, now_ns, &age_s
                )
                if (
                    not death_is_alive(frozen[i].death)
                    or frozen[i].generation != backend.info.generation
                ):
                    health = HEALTH_DEAD
                score_of(&items[i], &score)
                candidates.append(
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
                        passed_over=self._reason(
                            &items[i], backend, <int>i == chosen, health, age_s, word, score,
                            best, skip, exclude,
                        ),
                    )
                )
        finally:
            free(frozen)
            free(items)
        decision = Decision(
            group=group,
            policy=self.policy,
            chosen=table.backends[chosen] if chosen >= 0 else None,
            candidates=tuple(candidates),
        )
        return decision, chosen

    cdef str _reason(self, const candidate_t* c, Backend backend, bint is_chosen, int health,
                     double age_s, uint64_t word, double score, double best, uint32_t skip,
                     object exclude):
        """Why a candidate was passed over; empty for the chosen one."""
        cdef int state = word_public_state(word)
        if is_chosen:
            return ""
        if health == HEALTH_DEAD:
            return "dead"
        if state not in (STATE_IDLE, STATE_BUSY):
            return state_enum(state).name.lower()
        if c.skip == skip:
            return "excluded" if backend in exclude else "at capacity"
        if c.penalty:
            if backend in self.unreachable:
                return "could not be reached a moment ago"
            return f"suspect: no sign of progress, heartbeat {age_s:.1f} s old"
        if self.policy != "least-loaded":
            return "not its turn" if self.policy == "round-robin" else "not drawn"
        if score > best:
            return "higher score"
        return "busy with work of its own" if state == STATE_BUSY and score == 0 else "tie"

    # --- reserving

    def acquire(self, group, timeout_s=0.0, cost=1, *, explain=False, exclude=()):
        """Pick and reserve, atomically.

        Args:
            group: the nodes that can serve the request.
            timeout_s: how long to wait while every eligible node is at its capacity, seconds;
                callers of one router are served first come first served.
            cost: what the lease counts for in the node's queue, 1 to 65535.
            explain: put the `Decision` into `lease.decision`.
            exclude: backends that this request must not go to, for instance since it went there
                in vain.

        Returns:
            A `Lease`; release it, or use it as a context manager.

        Raises:
            NoBackend: nobody is eligible; the message says why for each node.
            Saturated: all were at capacity until the time-out.
            SegmentFull: there is no participant slot left for this router.
        """
        cdef Lease lease
        timeout_s = self._check_acquire(group, timeout_s, cost)
        if self.waiting is None or not self._is_ahead(group):
            lease = self._attempt(<str>group, cost, explain, exclude)
            if lease is not None:
                return lease
        if timeout_s <= 0:
            self._raise_saturated(group, timeout_s)
        future = self._queue(group, timeout_s, cost, explain, exclude)
        try:
            lease = future.result()
        except BaseException:
            # Interrupted (Ctrl-C): nobody will take what comes.
            if not future.cancel() and future.exception() is None and future.result() is not None:
                future.result().release()
            raise
        if lease is None:
            self._raise_saturated(group, timeout_s)
        return lease

    @cython.binding(True)  # so that inspect.iscoroutinefunction knows it for what it is
    async def acquire_async(self, group, timeout_s=1.0, cost=1, *, explain=False, exclude=()):
        """`acquire` on an event loop: waits without blocking it, and can be cancelled."""
        import asyncio  # costs more to import than all of shmcoord
        timeout_s = self._check_acquire(group, timeout_s, cost)
        if self.waiting is None or not self._is_ahead(group):
            lease = self._attempt(<str>group, cost, explain, exclude)
            if lease is not None:
                return lease
        if timeout_s <= 0:
            self._raise_saturated(group, timeout_s)
        future = self._queue(group, timeout_s, cost, explain, exclude)
        try:
            lease = await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            # Cancelled between the hand-over and our waking up: what came is given back.
            if not future.cancel() and future.exception() is None and future.result() is not None:
                future.result().release()
            raise
        if lease is None:
            self._raise_saturated(group, timeout_s)
        return lease

    def _is_ahead(self, group):
        """Whether other callers of this router wait for the group: then we go behind them."""
        self._check()
        return self.waiting.is_ahead(group)

    def _check_acquire(self, group, timeout_s, cost):
        if not isinstance(group, str):
            raise TypeError(f"group must be a str, not {type(group).__name__}")
        if not isinstance(cost, int) or isinstance(cost, bool):
            raise TypeError(f"cost must be an int, not {type(cost).__name__}")
        if not 1 <= cost <= SHMC_COST_MAX:
            raise ValueError(f"cost must be between 1 and {SHMC_COST_MAX}, not {cost}")
        timeout_s = float(timeout_s)
        if timeout_s != timeout_s or timeout_s < 0:
            raise ValueError(f"timeout_s must not be negative, not {timeout_s}")
        return timeout_s

    cdef Lease _attempt(self, str group, uint32_t cost, bint explain, object exclude):
        """One try; None if every eligible node is at its capacity."""
        cdef Table table = self.table_of(group)
        cdef candidate_t* c
        cdef Backend backend
        cdef Participant owner
        cdef Lease lease
        cdef uint32_t skip, i
        cdef int index
        cdef bint full, any_full, swept = False
        cdef object decision = None
        while True:
            self.attempt += 1
            if self.attempt == _NO_SKIP:
                self.attempt = 1  # 0 is what a new table has
            skip = self.attempt
            any_full = False
            if exclude:
                for i in range(table.candidates.count):
                    if table.backends[<int>i] in exclude:
                        table.candidates.items[i].skip = skip
            while True:
                if explain:
                    decision, index = self._decide(table, group, skip, exclude)
                else:
                    index = self.scan(&table.candidates, skip, &self.rng)
                if index < 0:
                    break
                c = &table.candidates.items[index]
                if c.penalty and any_full:
                    break  # healthy nodes are there, full as they are
                backend = <Backend>table.backends[index]
                owner = <Participant>self.participants[c.segment]
                if owner is None or owner.mapping is not backend.mapping:
                    owner = self._claim(backend.mapping, c.segment)
                full = False
                lease = reserve(backend, owner, cost, &full)
                if lease is not None:
                    lease.decision = decision
                    return lease
                c.skip = skip
                any_full = any_full or full
            if not any_full:
                self._raise_no_backend(group, exclude)
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

    def _claim(self, mapping, index):
        """This router's participant in one segment."""
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
            (<Participant>participant).leave()  # another thread of ours was faster
            return existing
        self.participants[index] = participant
        return participant

    # --- waiting for capacity

    def _queue(self, group, timeout_s, cost, explain, exclude):
        if self.waiting is None:
            from shmcoord.waiting import WaitQueue  # not needed where nobody waits
            released = ReleaseWait(self.segments, self.participants)
            self.waiting = WaitQueue(
                released.begin, released.ticket, released.sleep, released.end, _release_quietly,
                released.wake,
            )
        return self.waiting.put(
            group, lambda: self._attempt(<str>group, cost, explain, exclude), min(timeout_s, 1e6)
        )

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

    def _raise_saturated(self, group, timeout_s):
        decision = self.explain(group)
        nodes = ", ".join(
            f"{candidate.node} {candidate.queue}/{candidate.capacity}"
            for candidate in decision.candidates
        )
        waited = f" for {timeout_s:g} s" if timeout_s > 0 else ""
        raise Saturated(
            f"every eligible node of group {group!r} was at its capacity{waited}: {nodes}"
        )

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
        if self.waiting is not None:
            self.waiting.close()
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


def _release_quietly(lease):
    if not lease.released:
        lease.release()
