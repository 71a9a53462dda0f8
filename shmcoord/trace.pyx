# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The last decisions of each router, in the segment, for whoever wants to look.

A router has no status record; its last 16 decisions stand in that place (docs/layout.md), a ring
that only the router writes. Each entry is written with its number 0, then its words, then its
number: a reader takes an entry whose number is the same before and after, and a router that dies
in between leaves one entry that nobody reads.
"""
from libc.math cimport exp2, log2
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memchr

from shmcoord._atomics cimport *
from shmcoord._layout cimport *
from shmcoord._posix cimport mono_ns
from shmcoord.liveness cimport Participant
from shmcoord.segment cimport Mapping, mapping_t
from shmcoord.status cimport NodeInfo, read_info, slot_is_live

_OUTCOMES = {
    SHMC_DECIDED_LEASE: "lease",
    SHMC_DECIDED_SATURATED: "saturated",
    SHMC_DECIDED_NOBODY: "nobody",
}


cdef void note_decision(Participant owner, uint64_t now_ns, uint64_t group, uint32_t outcome,
                        uint32_t slot, uint64_t waited_ns, uint32_t queue,
                        uint32_t candidates) noexcept nogil:
    """Write one decision. Only the router that owns the slot, with the GIL as its lock."""
    cdef shmc_decisions* ring = <shmc_decisions*>&owner.entry.m.record[owner.slot]
    cdef uint64_t number = owner.decisions + 1
    cdef shmc_decision* entry = &ring.entry[(number - 1) % SHMC_DECISIONS]
    cdef uint64_t waited = 0
    if waited_ns >= 1000:
        waited = min(<uint64_t>(log2(waited_ns / 1e3) * 16) + 1, <uint64_t>511)
    store_relaxed_u64(&entry.number, 0)
    fence_release()
    store_relaxed_u64(&entry.time_ns, now_ns)
    store_relaxed_u64(&entry.group, group)
    store_relaxed_u64(
        &entry.what,
        <uint64_t>outcome << 61 | <uint64_t>(slot & 0xFFF) << 49 | waited << 40
        | <uint64_t>min(queue, <uint32_t>SHMC_FIELD_MAX) << 20
        | <uint64_t>min(candidates, <uint32_t>SHMC_FIELD_MAX)
    )
    store_release_u64(&entry.number, number)
    owner.decisions = number


cdef bint _read(const shmc_decision* from_, shmc_decision* to) noexcept nogil:
    to.number = load_acquire_u64(&from_.number)
    to.time_ns = load_relaxed_u64(&from_.time_ns)
    to.group = load_relaxed_u64(&from_.group)
    to.what = load_relaxed_u64(&from_.what)
    fence_acquire()
    return to.number != 0 and load_relaxed_u64(&from_.number) == to.number


def read_decisions(Mapping mapping, group=None):
    """The last decisions of the routers of a segment, oldest first.

    Args:
        mapping: the segment, read-only or not.
        group: only those for this group.

    Returns:
        A list of `PastDecision`, at most 16 per router. What each router did after its 16th last
        one is whole; older ones are gone.
    """
    cdef mapping_t* m
    cdef uint32_t slot, i, pid, outcome
    cdef uint64_t now_ns, waited
    cdef const shmc_decisions* ring
    cdef const shmc_meta* meta
    cdef const char* end
    cdef shmc_decision seen
    cdef NodeInfo info
    from shmcoord.decision import PastDecision  # not needed where nobody looks
    mapping.check()
    m = mapping.m
    now_ns = mono_ns()
    groups = {}
    nodes = {}
    for slot in range(m.slots):
        info = read_info(m, slot)
        if info is not None:
            nodes[slot] = info.node
            raw = info.group.encode()
            groups[shmc_hash(raw, len(raw))] = info.group
    wanted = None
    if group is not None:
        raw = group.encode()
        wanted = shmc_hash(raw, len(raw))
        groups[wanted] = group
    found = []
    for slot in range(m.slots):
        if (
            not slot_is_live(m, slot)
            or load_relaxed_u32(&m.hot[slot].kind) != SHMC_KIND_ROUTER
        ):
            continue
        ring = <const shmc_decisions*>&m.record[slot]
        meta = &m.meta[slot]
        end = <const char*>memchr(meta.name, 0, SHMC_NAME_BYTES)
        name = meta.name[:SHMC_NAME_BYTES if end == NULL else end - meta.name]
        pid = meta.pid
        for i in range(<uint32_t>SHMC_DECISIONS):
            if not _read(&ring.entry[i], &seen) or (wanted is not None and seen.group != wanted):
                continue
            outcome = <uint32_t>(seen.what >> 61)
            waited = seen.what >> 40 & 0x1FF
            found.append(
                (
                    seen.time_ns,
                    slot,
                    seen.number,
                    PastDecision(
                        router=name.decode("utf-8", "replace"),
                        pid=pid,
                        number=seen.number,
                        age_s=max(<double>now_ns - <double>seen.time_ns, 0.0) / 1e9,
                        group=groups.get(seen.group, "?"),
                        outcome=_OUTCOMES.get(outcome, "?"),
                        node=nodes.get(<uint32_t>(seen.what >> 49) & 0xFFF, "?")
                        if outcome == SHMC_DECIDED_LEASE else "",
                        queue=<uint32_t>(seen.what >> 20) & 0xFFFFF,
                        candidates=<uint32_t>seen.what & 0xFFFFF,
                        waited_s=exp2((waited - 1) / 16.0) / 1e6 if waited else 0.0,
                    ),
                )
            )
    return [entry[3] for entry in sorted(found, key=lambda entry: entry[:3])]
