# cython: language_level=3, boundscheck=False, wraparound=False
"""A segment of this host as other hosts are told of it: who is there, and what has changed.

Reads, never writes. The words of an entry are in `_entry.pxd`.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy

from shmcoord._atomics cimport load_acquire_u64, load_relaxed_u32, load_relaxed_u64
from shmcoord._entry cimport *
from shmcoord._layout cimport *
from shmcoord._posix cimport mono_ns
from shmcoord.cells cimport cell_cost, cell_state, slot_is_alive
from shmcoord.liveness cimport Judge
from shmcoord.segment cimport Mapping, mapping_t
from shmcoord.status cimport (
    HEALTH_ALIVE,
    HEALTH_DEAD,
    NodeInfo,
    read_info,
    record_read,
    slot_is_live,
    word_generation,
)

import sys

from typing import NamedTuple

if sys.byteorder != "little":
    raise ImportError("entries for other hosts are little-endian, and this host is not")


class Member(NamedTuple):
    """What a node wrote once, as other hosts are told of it."""

    slot: int
    generation: int
    node: str
    group: str
    endpoint: str
    capacity: int
    weight: float
    gauges: list[str]
    slow_start_s: float


def host_id(str host):
    """The number under which a host's requests are counted elsewhere, 1 to 2^24 - 1.

    Of the name alone, so that all hosts agree. Two names may have one number; whoever knows all
    hosts can tell.
    """
    cdef bytes raw = host.encode()
    return (shmc_hash(raw, len(raw)) & SHMC_OP_MAX) or 1


cdef class Origin:
    """One segment as it is told to other hosts.

    Args:
        mapping: the segment; reading is enough.

    Not for several threads at once.
    """

    def __cinit__(self, Mapping mapping not None):
        self.mapping = mapping
        self.judge = Judge(mapping)
        self.infos = [None] * mapping.m.slots
        self.told = <uint64_t*>calloc(<size_t>mapping.m.slots * E_WORDS_MAX, sizeof(uint64_t))
        self.changed = <uint8_t*>calloc(mapping.m.slots, 1)
        self.found = <uint64_t*>calloc(E_WORDS_MAX, sizeof(uint64_t))
        if self.told == NULL or self.changed == NULL or self.found == NULL:
            raise MemoryError()

    def __dealloc__(self):
        free(self.told)
        free(self.changed)
        free(self.found)

    @property
    def incarnation(self):
        """Random number of the segment: another one is another segment."""
        return self.mapping.m.incarnation

    def mark(self):
        """A number that differs when nodes came, went or died, or when one began or ceased to take
        work: what other hosts should be told of at once."""
        cdef mapping_t* m
        cdef uint64_t mark = 0, word
        cdef uint32_t slot
        self.mapping.check()
        m = self.mapping.m
        for slot in range(m.slots):
            if (
                slot_is_live(m, slot)
                and load_relaxed_u32(&m.hot[slot].kind) == SHMC_KIND_NODE
                and slot_is_alive(m, slot)
            ):
                word = load_relaxed_u64(&m.hot[slot].load)
                # Generation and state of the word; the slot in place of the numbers.
                mark ^= shmc_mix((word & ~<uint64_t>0xFFFFFFFFFFF) | (slot + 1))
        return mark

    def members(self):
        """Every living node, a `Member` each."""
        cdef NodeInfo info
        cdef uint32_t slot
        self.mapping.check()
        found = []
        for slot in range(self.mapping.m.slots):
            info = self._info(slot)
            if info is None or not slot_is_alive(self.mapping.m, slot):
                continue
            found.append(
                Member(
                    slot, info.generation, info.node, info.group, info.endpoint, info.capacity,
                    info.weight, list(info.gauge_names), info.slow_start_ns / 1e9,
                )
            )
        return found

    def entries(self, bint full):
        """The entries of all living nodes (`full`), or of those that changed since all were told.

        What changed stays in it until all are told again, so that a lost frame loses nothing but
        time.
        """
        cdef NodeInfo info
        cdef uint32_t slot, count
        cdef uint64_t now
        cdef uint64_t* told
        cdef bytearray out = bytearray()
        self.mapping.check()
        now = mono_ns()
        for slot in range(self.mapping.m.slots):
            info = self._info(slot)
            if info is None:
                continue
            count = self._read(info, now)
            if count == 0:
                continue
            told = self.told + <size_t>slot * E_WORDS_MAX
            if full:
                memcpy(told, self.found, count * sizeof(uint64_t))
                self.changed[slot] = 0
            elif not self.changed[slot]:
                # How long it has been up is no change.
                if (
                    memcmp(told, self.found, E_UPTIME_NS * sizeof(uint64_t)) == 0
                    and memcmp(
                        told + E_FIXED, self.found + E_FIXED,
                        (count - E_FIXED) * sizeof(uint64_t),
                    ) == 0
                ):
                    continue
                self.changed[slot] = 1
            out += (<char*>self.found)[: count * sizeof(uint64_t)]
        return bytes(out)

    cdef NodeInfo _info(self, uint32_t slot):
        cdef mapping_t* m = self.mapping.m
        cdef NodeInfo info = <NodeInfo>self.infos[slot]
        if not slot_is_live(m, slot):
            return None
        if info is None or info.generation != load_relaxed_u32(&m.hot[slot].generation):
            info = self.infos[slot] = read_info(m, slot)
        if info is not None and info.origin_incarnation != 0:
            return None  # of another host: nobody passes on what he was told
        return info

    cdef uint32_t _read(self, NodeInfo info, uint64_t now) noexcept:
        """Write the node's entry into `found`; how many words, 0 if it is gone or going."""
        cdef mapping_t* m = self.mapping.m
        cdef shmc_hot* hot = &m.hot[info.slot]
        cdef uint64_t* row = m.cells + <size_t>info.slot * m.leases
        cdef uint64_t* out = self.found
        cdef uint64_t words[32]
        cdef uint64_t word, cell, until
        cdef uint32_t gauges = <uint32_t>len(info.gauge_names)
        cdef uint32_t i, taken = 0, shares = 0
        cdef uint64_t* share
        cdef int health = self.judge.health(info, now, NULL)
        if health == HEALTH_DEAD:
            return 0
        if not record_read(&m.record[info.slot], words, SHMC_R_GAUGES + gauges):
            return 0
        word = load_acquire_u64(&hot.load)
        if word_generation(word) != (info.generation & 0xFFFF):
            return 0
        if words[SHMC_R_GENERATION] != info.generation:
            return 0
        out[E_TROUBLE] = (
            <uint64_t>load_relaxed_u32(&hot.latency_us) << 32 | load_relaxed_u32(&hot.failures)
        )
        out[E_HEALTH] = health != HEALTH_ALIVE
        out[E_MEMORY] = words[SHMC_R_MEMORY_BYTES]
        out[E_CPU] = words[SHMC_R_CPU_PERCENT]
        out[E_SERVED] = words[SHMC_R_SERVED]
        out[E_FAILED] = words[SHMC_R_FAILED]
        out[E_LATENCY] = words[SHMC_R_LATENCY_S]
        # The clock of another time namespace is not ours: its own time of its last publication.
        until = now if info.same_clock else words[SHMC_R_PUBLISHED_MONO_NS]
        out[E_UPTIME_NS] = until - min(words[SHMC_R_STARTED_MONO_NS], until)
        for i in range(gauges):
            out[E_FIXED + i] = words[SHMC_R_GAUGES + i]
        share = out + E_FIXED + gauges
        for i in range(m.leases):
            cell = load_relaxed_u64(&row[i])
            if cell != 0:
                taken += 1
                if cell_state(cell) == SHMC_CELL_REMOTE:
                    shares = _count(share, shares, cell)
        out[E_WHO] = (
            info.slot | <uint64_t>gauges << 16 | <uint64_t>shares << 24
            | <uint64_t>info.generation << 32
        )
        out[E_LOAD] = (word & <uint64_t>0xFFFFFFFFFFFF) | <uint64_t>taken << 48
        return E_FIXED + gauges + shares


cdef uint32_t _count(uint64_t* share, uint32_t shares, uint64_t cell) noexcept:
    """Add a cell to its host's share; how many shares there are then.

    Of more hosts than fit, the rest are nobody's: their requests count as the node's own.
    """
    cdef uint64_t host = cell & SHMC_OP_MAX
    cdef uint32_t i
    for i in range(shares):
        if share[i] >> 40 == host:
            break
    else:
        if shares == E_SHARES_MAX:
            return shares
        i = shares
        shares += 1
        share[i] = host << 40
    share[i] += <uint64_t>1 << 28
    share[i] += cell_cost(cell)
    return shares
