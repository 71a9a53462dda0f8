# cython: language_level=3, boundscheck=False, wraparound=False
"""What a router knows of the groups in its segments, and its choice among their nodes.

A private table per group: pointers to the nodes' hot lines and copies of what they wrote once. The
membership epoch of each segment says when to build it anew; a heartbeat is judged a few times per
interval, by a coarse clock that is read once per pick. Nothing here writes to a segment.
"""
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from shmcoord._atomics cimport *
from shmcoord._layout cimport *
from shmcoord._posix cimport mono_coarse_ns
from shmcoord.backend cimport Backend, make_backend
from shmcoord.explain cimport Frozen, freeze
from shmcoord.liveness cimport Judge
from shmcoord.picker cimport NativePolicy, find_policy, pick_t, random_unit
from shmcoord.segment cimport MAPPING_OPEN, Mapping
from shmcoord.status cimport NodeInfo, read_info
from shmcoord.table cimport Rules, Table, make_table

import logging
import os

from shmcoord.errors import NoBackend, ShmcoordError

_log = logging.getLogger("shmcoord.router")

cdef uint64_t _STALE_EVERY_NS = 1_000_000_000


cdef uint64_t hash_of(key) except? 0:
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


cdef class Groups:
    """The groups of one or several segments, as a router sees them; the base of `Router`."""

    def __cinit__(self, *segments, **options):
        self.epochs = NULL
        self.scan = NULL
        self.is_closed = True  # until it is whole
        self.segments = []
        self.tables = {}
        self.unreachable = {}
        self.watches = {}

    cdef int _open(self, tuple segments, object policy, object seed, dict rules) except -1:
        """Attach to the segments; for arguments see `Router`."""
        if not segments:
            raise ValueError("a router needs at least one segment")
        if len(segments) > 128:
            raise ValueError(f"at most 128 segments, not {len(segments)}")
        self._set_policy(policy)
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
        self.judges = [Judge(segment) for segment in self.segments]
        self.epochs = <uint64_t*>calloc(self.count, sizeof(uint64_t))
        if self.epochs == NULL:
            raise MemoryError()
        for i in range(self.count):
            self.epochs[<uint32_t>i] = load_acquire_u64(&(<Mapping>self.segments[i]).m.sync.epoch)
        self.stale_at_ns = mono_coarse_ns() + _STALE_EVERY_NS
        return 0

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

    @property
    def closed(self):
        """Whether `close` was called."""
        return bool(self.is_closed)

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
            self._has_moved(i)
            judges = list(self.judges)
            judges[i] = Judge(fresh)
            self.judges = judges
            self.epochs[i] = load_acquire_u64(&(<Mapping>fresh).m.sync.epoch)
            self.tables = {}
            self.last_group = None
            self.last_table = None
            found = 1
        return found

    cdef int _has_moved(self, uint32_t i) except -1:
        """A segment was made anew; a subclass forgets what it has in the old one."""
        return 0

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
        if self.attempt == NO_SKIP:
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
        pick.skip = NO_SKIP
        pick.cost = 1
        pick.key = 0 if key is None else hash_of(key)
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
        pick.skip = NO_SKIP
        pick.cost = cost
        pick.key = 0 if key is None else hash_of(key)
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
