# cython: language_level=3, boundscheck=False, wraparound=False
"""A segment of another host, shown on this one: what a bridge writes so that routers can read it.

The process that makes a `Mirror` owns every node in it, for as long as it lives: `sync.mirror`
marks the segment, so that nodes of this host do not join it. Routers open it and reserve in it as
in any segment. What they see of a node is what its host published without our part (the bridge
holds that much, as cells of its own) plus our part as it is now (the cells of our routers).

Nothing here decides how old is too old: beats and progress are moved to the time that the news is
of, and who reads them judges (`liveness.Judge`).
"""
from cpython.bytes cimport PyBytes_AS_STRING
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from shmcoord._atomics cimport *
from shmcoord._entry cimport *
from shmcoord._layout cimport *
from shmcoord._posix cimport mono_ns, wall_ns
from shmcoord.cells cimport cell_cost, cell_make, notify_all, slot_is_alive
from shmcoord.lease cimport free_cell, take_cell
from shmcoord.liveness cimport Participant, claim, reap_all
from shmcoord.node cimport fill_meta
from shmcoord.segment cimport MAPPING_FORKED, Mapping, mapping_t
from shmcoord.status cimport NodeInfo, read_info, record_write, word_add_inflight, word_state

import logging

from shmcoord.errors import SegmentForbidden, ShmcoordError
from shmcoord.liveness import SUSPECT_INTERVALS

_log = logging.getLogger("shmcoord.mirror")

#: The most that anybody may say he holds in one row: of more, the rest is counted, not held.
cdef uint32_t _CELLS_MAX = SHMC_LEASES_MAX


cdef class StandIn:
    """A node of another host in the mirror of its segment: the bridge takes its place."""

    cdef Participant participant
    cdef shmc_hot* hot
    cdef mapping_t* m
    cdef uint64_t* row
    cdef uint64_t late_ns        # a stamp this old is suspect
    cdef uint32_t capacity, gauges
    cdef bint is_suspect         # its own host finds it so, or our bridge does
    cdef uint32_t held           # cells in which we stand for requests of others
    cdef uint32_t* at            # their indices
    cdef uint64_t* value         # what is in them

    def __dealloc__(self):
        free(self.at)
        free(self.value)

    cdef void stamp(self, uint64_t at_ns) noexcept:
        """Show that news of the time `at_ns` (CLOCK_MONOTONIC) has come; late if it is suspect."""
        # Routers judge by the coarse clock, which is up to a tick (10 ms at 100 Hz) behind.
        cdef uint64_t late = mono_ns() - self.late_ns - 20_000_000
        if self.is_suspect:
            # Once, and not again: in another time namespace only a beat that stands still is late.
            if load_relaxed_u64(&self.hot.beat_ns) <= late:
                return
            at_ns = min(at_ns, late)
        store_relaxed_u64(&self.hot.beat_ns, at_ns)
        store_release_u64(&self.hot.beats, load_relaxed_u64(&self.hot.beats) + 1)
        store_release_u64(&self.hot.progress_ns, at_ns)

    cdef void show(self, const uint64_t* entry, uint32_t shares, uint32_t host,
                   uint64_t at_ns) noexcept:
        """Write what its host published at `at_ns`; `entry` has been checked, `host` is ours."""
        cdef uint64_t words[32]
        cdef uint64_t word = entry[E_LOAD]
        cdef int64_t cells = <int64_t>(word >> 48), cost = <int64_t>(word & SHMC_FIELD_MAX)
        cdef const uint64_t* share = entry + E_FIXED + self.gauges
        cdef uint32_t i
        for i in range(shares):
            if share[i] >> 40 == host:  # ours: our routers' own cells say more
                cells -= <int64_t>(share[i] >> 28 & 0xFFF)
                cost -= <int64_t>(share[i] & 0xFFFFFFF)
        self.hold(<uint32_t>min(max(cells, 0), <int64_t>_CELLS_MAX), <uint64_t>max(cost, 0))
        self.set_state(word)
        store_relaxed_u32(&self.hot.latency_us, <uint32_t>(entry[E_TROUBLE] >> 32))
        store_relaxed_u32(&self.hot.failures, <uint32_t>entry[E_TROUBLE])
        memset(words, 0, sizeof(words))
        words[SHMC_R_PUBLISHED_MONO_NS] = at_ns
        words[SHMC_R_PUBLISHED_WALL_NS] = wall_ns()
        words[SHMC_R_MEMORY_BYTES] = entry[E_MEMORY]
        words[SHMC_R_CPU_PERCENT] = entry[E_CPU]
        words[SHMC_R_SERVED] = entry[E_SERVED]
        words[SHMC_R_FAILED] = entry[E_FAILED]
        words[SHMC_R_LATENCY_S] = entry[E_LATENCY]
        words[SHMC_R_GENERATION] = self.participant.generation
        words[SHMC_R_STARTED_MONO_NS] = at_ns - min(entry[E_UPTIME_NS], at_ns)
        for i in range(self.gauges):
            words[SHMC_R_GAUGES + i] = entry[E_FIXED + i]
        record_write(
            &self.m.record[self.participant.slot], words, SHMC_R_GAUGES + self.gauges
        )
        self.is_suspect = entry[E_HEALTH] != 0

    cdef void set_state(self, uint64_t told) noexcept:
        """Take over state, flags and waiting; what is in flight, the cells say."""
        cdef uint64_t mask = <uint64_t>0xFFFFFFF << 20
        cdef uint64_t word
        cdef uint32_t before
        while True:
            word = load_relaxed_u64(&self.hot.load)
            before = word_state(word)
            if cas_seqcst_u64(&self.hot.load, word, (word & ~mask) | (told & mask)):
                break
        if before != SHMC_STATE_OPEN and word_state(told) == SHMC_STATE_OPEN:
            notify_all(self.m)

    cdef void hold(self, uint32_t cells, uint64_t cost) noexcept:
        """Hold that many cells of that cost in sum: the requests of others.

        What the row has no room for is counted in `overflow`, as a node counts its own. What finds
        no free cell below the capacity is owed one: the next that is free is not for our routers.
        """
        cdef uint32_t owner = self.participant.slot, generation = self.participant.generation
        cdef uint32_t i, each, most = min(cells, self.m.leases)
        cdef uint64_t value, in_cells = 0, before, owed = cells
        cdef int index
        while self.held > most:
            self.let_one_go()
        each = <uint32_t>min(max(cost // cells if cells else 1, <uint64_t>1),
                             <uint64_t>SHMC_COST_MAX)
        # First where routers look, so that they find it taken; what stands above goes down when
        # there is room.
        i = 0
        while i < self.held:
            if self.at[i] >= self.capacity:
                value = self.value[i]
                index = take_cell(self.row, 0, self.capacity, value)
                if index < 0:
                    break
                word_add_inflight(self.hot, generation, cell_cost(value))
                free_cell(self.m, self.hot, generation, &self.row[self.at[i]], value,
                          cell_cost(value))
                self.at[i] = <uint32_t>index
            i += 1
        while self.held < most:
            value = cell_make(
                SHMC_CELL_RUNNING, owner, generation, each, self.participant.next_op()
            )
            index = take_cell(self.row, 0, self.m.leases, value)
            if index < 0:
                break
            word_add_inflight(self.hot, generation, each)
            self.at[self.held] = <uint32_t>index
            self.value[self.held] = value
            self.held += 1
        for i in range(self.held):
            # The remainder stands in the first cell.
            before = cell_cost(self.value[i])
            value = each
            if i == 0 and cost > <uint64_t>each * cells:
                value = min(each + (cost - <uint64_t>each * cells), <uint64_t>SHMC_COST_MAX)
            if value != before:
                value = cell_make(
                    SHMC_CELL_RUNNING, owner, generation, <uint32_t>value,
                    self.participant.next_op(),
                )
                if cas_seqcst_u64(&self.row[self.at[i]], self.value[i], value):
                    self.value[i] = value
                    word_add_inflight(
                        self.hot, generation, <int64_t>cell_cost(value) - <int64_t>before
                    )
            in_cells += cell_cost(self.value[i])
            owed -= self.at[i] < self.capacity
        before = load_relaxed_u64(&self.participant.entry.overflow)
        value = cost - in_cells if cost > in_cells else 0
        if value != before:
            store_relaxed_u64(&self.participant.entry.overflow, value)
            word_add_inflight(self.hot, generation, <int64_t>value - <int64_t>before)
        before = load_relaxed_u64(&self.hot.owed)
        if owed != before:
            store_release_u64(&self.hot.owed, owed)
            fence_seqcst()
            if owed < before:
                notify_all(self.m)

    cdef void let_one_go(self) noexcept:
        """Free one of the cells that we hold; those above the capacity first."""
        cdef uint32_t i, last = self.held - 1
        for i in range(self.held):
            if self.at[i] >= self.capacity:
                self.at[i], self.at[last] = self.at[last], self.at[i]
                self.value[i], self.value[last] = self.value[last], self.value[i]
                break
        self.held = last
        free_cell(
            self.m, self.hot, self.participant.generation, &self.row[self.at[last]],
            self.value[last], cell_cost(self.value[last]),
        )


cdef StandIn _stand_in(Mapping mapping, uint64_t incarnation, double suspect_after_s, member):
    """Join the mirror in the place of a node of another host."""
    cdef shmc_meta meta
    cdef StandIn self = StandIn.__new__(StandIn)
    if not 0 <= member.slot < SHMC_SLOTS_MAX:
        raise ValueError(f"no node is in slot {member.slot}")
    capacity = min(max(member.capacity, 1), mapping.m.leases)
    fill_meta(
        &meta, mapping, member.node, member.group, member.endpoint, capacity, member.weight,
        suspect_after_s / SUSPECT_INTERVALS, tuple(member.gauges), member.slow_start_s,
    )
    meta.origin_incarnation = incarnation
    meta.origin_slot = member.slot
    meta.origin_generation = member.generation
    self.at = <uint32_t*>calloc(mapping.m.leases, sizeof(uint32_t))
    self.value = <uint64_t*>calloc(mapping.m.leases, sizeof(uint64_t))
    if self.at == NULL or self.value == NULL:
        raise MemoryError()
    self.participant = claim(mapping, SHMC_KIND_NODE, &meta, member.node)
    self.m = mapping.m
    self.hot = &self.m.hot[self.participant.slot]
    self.row = self.m.cells + <size_t>self.participant.slot * self.m.leases
    self.late_ns = SUSPECT_INTERVALS * meta.interval_ns
    self.capacity = meta.capacity
    self.gauges = meta.gauge_count
    return self


cdef class Mirror:
    """The mirror of one segment of another host, kept by this process.

    Args:
        mapping: the segment of this host that shows the other's.
        host: id of this host (`origin.host_id`), which the tokens of leases carry to the nodes.
        suspect_after_s: news older than this makes its nodes SUSPECT, seconds.

    Raises:
        SegmentForbidden: nodes of this host are in it, or it is attached read-only.
        ValueError: no such host, or time.

    Not for several threads at once.
    """

    cdef Mapping mapping
    cdef uint32_t host
    cdef double suspect_after_s
    cdef readonly uint64_t incarnation  # of the segment that it shows; 0: not known yet
    cdef dict standing           # (slot, generation) of the real node -> StandIn
    cdef dict names              # (slot, generation) -> its name

    def __cinit__(self, Mapping mapping not None, uint32_t host, double suspect_after_s):
        cdef uint32_t slot
        cdef uint64_t before
        cdef NodeInfo info
        mapping.check()
        if not 1 <= host <= SHMC_OP_MAX:
            raise ValueError(f"host must be an id between 1 and {SHMC_OP_MAX}, not {host}")
        if not mapping.m.writable:
            raise SegmentForbidden(f"segment {mapping.name} is attached read-only")
        if not 0.001 <= suspect_after_s / SUSPECT_INTERVALS <= 3600:
            raise ValueError(
                f"suspect_after_s must be between {0.001 * SUSPECT_INTERVALS:g} and "
                f"{3600 * SUSPECT_INTERVALS} seconds, not {suspect_after_s}"
            )
        reap_all(mapping)  # what the bridge before us held, if it was killed
        # Marked first, then looked: a node that joins meanwhile looks at the mark when it is there.
        before = load_relaxed_u64(&mapping.m.sync.mirror)
        store_release_u64(&mapping.m.sync.mirror, host)
        fence_seqcst()
        for slot in range(mapping.m.slots):
            info = read_info(mapping.m, slot)
            if (
                info is not None and info.origin_incarnation == 0
                and slot_is_alive(mapping.m, slot)
            ):
                store_release_u64(&mapping.m.sync.mirror, before)
                raise SegmentForbidden(
                    f"segment {mapping.name} has nodes of this host ({info.node}, pid {info.pid}): "
                    "give the mirror another name"
                )
        self.mapping = mapping
        self.host = host
        self.suspect_after_s = suspect_after_s
        self.standing = {}
        self.names = {}

    @property
    def nodes(self):
        """Names of the nodes that it shows."""
        return tuple(self.names.values())

    def set_members(self, uint64_t incarnation, members):
        """Show these nodes (`origin.Member`), and no others, of the segment `incarnation`.

        Returns:
            For each that could not be shown, the member and the error.
        """
        cdef StandIn one
        self.mapping.check()
        if incarnation == 0:
            raise ValueError("no segment has the incarnation 0")
        wanted = {(member.slot, member.generation): member for member in members}
        if incarnation != self.incarnation:
            self.leave()
            self.incarnation = incarnation
        for key in [key for key in self.standing if key not in wanted]:
            self._drop(key)
        refused = []
        for key, member in wanted.items():
            if key in self.standing:
                continue
            try:
                one = _stand_in(self.mapping, incarnation, self.suspect_after_s, member)
            except (ShmcoordError, OSError, ValueError, TypeError, OverflowError) as error:
                refused.append((member, error))
                continue
            self.standing[key] = one
            self.names[key] = member.node
            _log.info(
                "%s: node %s of group %s is shown", self.mapping.name, member.node, member.group
            )
        return refused

    def apply(self, bytes entries, uint64_t age_ns):
        """Write what the other host published `age_ns` ago.

        All nodes get the time of it; those with an entry also what the entry says.

        Returns:
            How many entries were of nodes that are not shown here (yet).

        Raises:
            ValueError: the entries are cut off or contradict themselves; nothing behind the fault
                was written.
        """
        cdef const uint64_t* at = <const uint64_t*>PyBytes_AS_STRING(entries)
        cdef uint64_t entry[E_WORDS_MAX]
        cdef size_t left = <size_t>len(entries) // sizeof(uint64_t)
        cdef uint64_t at_ns = mono_ns()
        cdef uint32_t unknown = 0, gauges, shares, count
        cdef StandIn one
        self.mapping.check()
        if len(entries) % sizeof(uint64_t):
            raise ValueError(f"entries of {len(entries)} bytes: not a number of words")
        at_ns -= min(age_ns, at_ns)
        while left:
            gauges = <uint32_t>(at[E_WHO] >> 16) & 0xFF
            shares = <uint32_t>(at[E_WHO] >> 24) & 0xFF
            count = E_FIXED + gauges + shares
            if gauges > SHMC_GAUGES_MAX or count > left:
                raise ValueError("an entry is cut off, or has more gauges than there can be")
            one = <StandIn>self.standing.get((at[E_WHO] & 0xFFFF, at[E_WHO] >> 32))
            if one is None or one.gauges != gauges:
                unknown += 1
            else:
                memcpy(entry, at, count * sizeof(uint64_t))
                one.show(entry, shares, self.host, at_ns)
            at += count
            left -= count
        for one in self.standing.values():
            one.stamp(at_ns)
        return unknown

    def suspect(self):
        """Make all its nodes SUSPECT until the next news: its host is said to be gone."""
        cdef StandIn one
        self.mapping.check()
        for one in self.standing.values():
            before = one.is_suspect
            one.is_suspect = True
            one.stamp(load_relaxed_u64(&one.hot.progress_ns))
            one.is_suspect = before

    def leave(self):
        """Show nobody any more.

        Raises:
            ForkedHandle: the mirror is the parent process's.
        """
        if self.mapping.m.state == MAPPING_FORKED:
            self.mapping.check()
        for key in list(self.standing):
            self._drop(key)

    def _drop(self, key):
        cdef StandIn one = <StandIn>self.standing.pop(key)
        _log.info("%s: node %s is no longer shown", self.mapping.name, self.names.pop(key))
        one.participant.leave()
