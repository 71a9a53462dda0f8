# cython: language_level=3, boundscheck=False, wraparound=False
"""Who is alive: owner lock, claim, leave, reap; judging who makes progress.

Three questions, three answers (docs/layout.md has the bytes):

* May I route to it? The *death word*, a robust futex that the kernel marks when the thread that
  holds it ends, however its process dies. One load.
* May I take its slot? The *owner lock*, an open-file-description lock on the byte numbered like
  the slot, which the kernel frees when the process is really gone.
* Does it make progress? The *heartbeat*, a counter that the beat thread moves, and the progress
  stamp, which Python moves. Late ones make a node SUSPECT and never cost it its slot.

The thread that holds the death words and moves the heartbeats is in `beat.pyx`.
"""
cimport cython
from libc.errno cimport EACCES, EAGAIN
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from shmcoord._atomics cimport *
from shmcoord._layout cimport *
from shmcoord._posix cimport *
from shmcoord._steps cimport step
from shmcoord.beat cimport entry_t, hold, is_ours, let_go, why_not_held
from shmcoord.cells cimport (
    count_waiter_out,
    death_is_alive,
    free_owned,
    free_row,
    notify_all,
    slot_is_alive,
    sweep_row,
)
from shmcoord.segment cimport MAPPING_FORKED, Mapping, mapping_t
from shmcoord.status cimport (
    HEALTH_ALIVE,
    HEALTH_DEAD,
    HEALTH_SUSPECT,
    meta_write,
    read_info,
    record_write,
    slot_is_live,
    word_generation,
    word_make,
)

cdef extern from "<string.h>" nogil:
    size_t strnlen(const char* text, size_t most)

import atexit
import os
import threading
import time
import weakref

from shmcoord.errors import NodeExists, SegmentFull, SegmentForbidden, ShmcoordError

#: A heartbeat is late after this many intervals.
SUSPECT_INTERVALS = 3
cdef uint64_t _SUSPECT_INTERVALS = SUSPECT_INTERVALS
cdef uint64_t _MIRROR_SWEEP_NS = 2_000_000_000
_CLAIM_PATIENCE_S = 5.0


# --- reap ----------------------------------------------------------------------------------

cdef void _move_epoch(mapping_t* m, uint32_t slot) noexcept nogil:
    """Members have changed, and with them perhaps capacity. Routers are nobody's members."""
    if load_relaxed_u32(&m.hot[slot].kind) == SHMC_KIND_NODE:
        add_seqcst_u64(&m.sync.epoch, 1)
    notify_all(m)


cdef void _close_word(shmc_hot* hot) noexcept nogil:
    """SHUTDOWN with nothing waiting or in flight, for the handles that still look at this slot."""
    cdef uint64_t word
    while True:
        word = load_relaxed_u64(&hot.load)
        if cas_seqcst_u64(
            &hot.load, word, word_make(word_generation(word), SHMC_STATE_SHUTDOWN, 0, 0, 0)
        ):
            return


cdef uint32_t _clear_slot(mapping_t* m, uint32_t slot) noexcept nogil:
    """Give back what the former owner of a slot held. The caller has its owner lock.

    Any prefix of this may be all that happens: the next one does it again from the start.
    """
    cdef shmc_hot* hot = &m.hot[slot]
    cdef uint32_t freed
    freed = free_owned(m, slot, load_relaxed_u32(&hot.generation))
    step(b"reap.owned")
    freed += free_row(m, slot)
    step(b"reap.row")
    if load_relaxed_u32(&hot.waiting_now) != 0:
        store_relaxed_u32(&hot.waiting_now, 0)
        count_waiter_out(m)
    _close_word(hot)
    step(b"reap.word")
    and_seqcst_u64(&m.bitmap[slot >> 6], ~(<uint64_t>1 << (slot & 63)))
    step(b"reap.bitmap")
    store_release_u32(&hot.death, 0)
    step(b"reap.death")
    _move_epoch(m, slot)
    step(b"reap.epoch")
    return freed


cdef object _membership = threading.Lock()


def _new_membership():
    global _membership
    _membership = threading.Lock()


os.register_at_fork(after_in_child=_new_membership)


cdef uint32_t reap_all(Mapping mapping) except? 0xFFFFFFFF:
    """Clear the slots of the dead and free their leases; how many slots and leases.

    Whether a slot may be cleared is asked of its owner lock alone. Where the death word is marked
    and the lock is not free yet (a large process takes a while to go), the leases go now, the slot
    at the next call.
    """
    cdef mapping_t* m
    cdef uint32_t slot, freed = 0
    mapping.check()
    m = mapping.m
    if not m.writable:
        raise SegmentForbidden(
            f"segment {mapping.name} is attached read-only; use Segment.open to reap"
        )
    with _membership:
        for slot in range(m.slots):
            if not slot_is_live(m, slot) or is_ours(m, slot):
                continue
            if ofd_lock(m.fd, slot, F_WRLCK) == 0:
                freed += _clear_slot(m, slot) + 1
                ofd_lock(m.fd, slot, F_UNLCK)
        for slot in range(m.slots):
            freed += sweep_row(m, slot)
    return freed


# --- claim and leave ------------------------------------------------------------------------

cdef Participant claim(Mapping mapping, uint32_t kind, shmc_meta* meta, str name):
    """Take a slot. `meta` is filled but for its identity; `name` is checked among living nodes.

    Raises:
        NodeExists: a living node has this name.
        SegmentFull: every slot is held.
    """
    cdef Participant self
    cdef mapping_t* m
    cdef int64_t slot
    cdef int err = 0
    mapping.check()
    m = mapping.m
    if not m.writable:
        raise SegmentForbidden(
            f"segment {mapping.name} is attached read-only; use Segment.open to take part"
        )
    deadline = time.monotonic() + _CLAIM_PATIENCE_S
    while True:
        with _membership:
            mapping.check()
            err = ofd_lock(m.fd, SHMC_LOCK_MEMBERSHIP, F_WRLCK)
            if err == 0:
                step(b"claim.membership")
                try:
                    slot = _take_slot(mapping, kind, name)
                    step(b"claim.slot")
                    try:
                        self = _occupy(mapping, kind, meta, <uint32_t>slot)
                    except BaseException:
                        ofd_lock(m.fd, slot, F_UNLCK)
                        raise
                finally:
                    ofd_lock(m.fd, SHMC_LOCK_MEMBERSHIP, F_UNLCK)
        if err == 0:
            # Python code, in which a signal handler may run and join: not with a lock held.
            _participants.add(self)
            return self
        if err not in (EAGAIN, EACCES):
            raise OSError(err, os.strerror(err), f"{mapping.name}: membership lock")
        if time.monotonic() > deadline:
            raise ShmcoordError(
                f"{mapping.name}: another process has held the membership lock for "
                f"{_CLAIM_PATIENCE_S:g} s (stopped inside a join?); continue or end it"
            )
        time.sleep(0.0005)


cdef int64_t _take_slot(Mapping mapping, uint32_t kind, str name) except -1:
    """A slot whose owner lock we hold now, cleared. The caller has the membership lock."""
    cdef mapping_t* m = mapping.m
    cdef uint32_t slot
    cdef int want
    cdef bint alive
    cdef NodeInfo info
    if kind == SHMC_KIND_NODE:
        for slot in range(m.slots):
            info = read_info(m, slot)
            if info is None or info.node != name:
                continue
            if is_ours(m, slot) or ofd_lock(m.fd, slot, F_WRLCK) != 0:
                if slot_is_alive(m, slot):
                    raise NodeExists(
                        f"{mapping.name}: a living node is called {name!r} (pid {info.pid}, "
                        f"{info.endpoint}); choose another name, or end it"
                    )
                continue  # it is dying: its slot is not free yet, its name is
            _clear_slot(m, slot)
            return slot
    # Never used or left, then those of the dead, then those whose word still claims a living owner:
    # what decides is the owner lock.
    for want in range(3):
        for slot in range(m.slots):
            alive = slot_is_live(m, slot)
            if (want == 0) == alive:
                continue
            if want == 1 and slot_is_alive(m, slot):
                continue
            if is_ours(m, slot) or ofd_lock(m.fd, slot, F_WRLCK) != 0:
                continue
            _clear_slot(m, slot)
            return slot
    raise SegmentFull(
        f"{mapping.name}: all {m.slots} slots are taken by living participants; "
        "make the segment anew with more slots"
    )


# Set around the only places that make these objects: they are made of memory, never of arguments
# (and never by copying). Put back to what it was, since making one may run the garbage collector,
# and that anything.
cdef bint _making = False


cdef Participant _occupy(Mapping mapping, uint32_t kind, shmc_meta* meta, uint32_t slot):
    """Become the owner of a slot whose owner lock we hold."""
    global _making
    cdef bint before
    cdef mapping_t* m = mapping.m
    cdef shmc_hot* hot = &m.hot[slot]
    cdef uint64_t words[32]
    cdef uint64_t now = mono_ns()
    cdef uint32_t i, generation = load_relaxed_u32(&hot.generation) + 1
    cdef entry_t* entry
    cdef Participant self
    before = _making
    _making = True
    self = Participant.__new__(Participant)
    _making = before
    if (generation & 0xFFFF) == 0:
        generation += 1
    entry = <entry_t*>calloc(1, sizeof(entry_t))
    if entry == NULL:
        raise MemoryError()
    self.entry = entry
    self.mapping = mapping
    self.slot = slot
    self.generation = generation
    self.left = True  # until all of it is done
    # Readers look at the generation before and after everything else they read of the slot.
    store_release_u32(&hot.generation, generation)
    step(b"claim.generation")
    meta.pid = os.getpid()
    meta.uid = os.geteuid()
    meta.time_ns_id = m.time_ns_id
    meta.started_wall_ns = wall_ns()
    meta_write(&m.meta[slot], meta)
    step(b"claim.meta")
    store_relaxed_u32(&hot.kind, kind)
    store_relaxed_u32(&hot.waiting_now, 0)
    store_relaxed_u64(&hot.refused, 0)
    store_relaxed_u32(&hot.latency_us, 0)
    store_relaxed_u32(&hot.failures, 0)
    store_relaxed_u32(&hot.wake, 0)
    store_relaxed_u32(&hot.bell, 0)
    store_relaxed_u64(&hot.owed, 0)
    store_relaxed_u64(&hot.group, shmc_hash(meta.group, strnlen(meta.group, SHMC_NAME_BYTES)))
    for i in range(<uint32_t>SHMC_TURNS):
        store_relaxed_u64(&hot.turn[i].ticket, 0)
        store_relaxed_u64(&hot.turn[i].group, 0)
    store_relaxed_u64(&hot.beat_ns, now)
    store_relaxed_u64(&hot.progress_ns, now)
    store_release_u64(&hot.load, word_make(generation, SHMC_STATE_OPEN, 0, 0, 0))
    step(b"claim.load")
    memset(words, 0, sizeof(words))
    if kind == SHMC_KIND_NODE:  # a router has its decisions there: none so far
        words[SHMC_R_GENERATION] = generation
        words[SHMC_R_PUBLISHED_MONO_NS] = now
        words[SHMC_R_PUBLISHED_WALL_NS] = wall_ns()
        words[SHMC_R_STARTED_MONO_NS] = now
    # Both copies, so that what an owner publishes later may be a prefix of the words.
    record_write(&m.record[slot], words, SHMC_RECORD_WORDS)
    record_write(&m.record[slot], words, SHMC_RECORD_WORDS)
    step(b"claim.record")
    entry.m = m
    entry.slot = slot
    entry.generation = generation
    entry.is_node = kind == SHMC_KIND_NODE
    entry.is_mirror = meta.origin_incarnation != 0
    entry.interval_ns = meta.interval_ns
    # A mirrored node's beats come with the news; all that time asks for is the cells of the dead.
    if entry.is_mirror:
        entry.interval_ns = _MIRROR_SWEEP_NS
    entry.due_ns = now + entry.interval_ns
    if not hold(entry):
        raise ShmcoordError(
            f"{mapping.name}: this process cannot have its death noticed, so it may not take part: "
            f"{why_not_held()}"
        )
    self.left = False
    or_seqcst_u64(&m.bitmap[slot >> 6], <uint64_t>1 << (slot & 63))
    step(b"claim.bitmap")
    _move_epoch(m, slot)
    step(b"claim.epoch")
    return self


@cython.no_gc_clear  # __dealloc__ needs the mapping
cdef class Participant:
    """A claimed slot. Whoever drops the last reference leaves it; so does a regular exit."""

    def __cinit__(self):
        if not _making:
            raise TypeError("a slot is taken with Segment.join or by a Router")

    def __dealloc__(self):
        if self.entry == NULL:
            return
        if not self.left and self.entry.m.state != MAPPING_FORKED:
            self._give_back()
        free(self.entry)

    cdef int leave(self) except -1:
        """Give everything back. Does nothing the second time."""
        if self.left:
            return 0
        if self.mapping.m.state == MAPPING_FORKED:
            self.mapping.check()
        self._give_back()
        return 0

    cdef void _give_back(self) noexcept nogil:
        cdef mapping_t* m = self.entry.m
        cdef uint32_t slot = self.slot
        self.left = True
        free_owned(m, slot, self.generation)
        step(b"leave.owned")
        free_row(m, slot)
        step(b"leave.row")
        _close_word(&m.hot[slot])
        step(b"leave.word")
        if load_relaxed_u32(&m.hot[slot].waiting_now) != 0:  # its queue will not count us out
            store_release_u32(&m.hot[slot].waiting_now, 0)
            count_waiter_out(m)
        and_seqcst_u64(&m.bitmap[slot >> 6], ~(<uint64_t>1 << (slot & 63)))
        step(b"leave.bitmap")
        let_go(self.entry)
        step(b"leave.unlink")
        _move_epoch(m, slot)
        step(b"leave.epoch")
        if m.fd >= 0:
            ofd_lock(m.fd, slot, F_UNLCK)
            step(b"leave.unlock")


_participants = weakref.WeakSet()


def _leave_all():
    """At a regular end of the process nobody stays behind as DEAD."""
    for participant in list(_participants):
        if (<Participant>participant).entry.m.state != MAPPING_FORKED:
            (<Participant>participant).leave()


atexit.register(_leave_all)


# --- judging progress -------------------------------------------------------------------------

cdef class Judge:
    """One reader's view of who makes progress, by this reader's monotonic clock.

    A counter that has not moved for three of its intervals makes its node SUSPECT. When the
    owner's clock is ours (same time namespace, so the same CLOCK_MONOTONIC) its stamps tell at the
    first look when it moved last; else the first look starts the count.
    """

    def __cinit__(self, Mapping mapping):
        self.mapping = mapping
        self.seen = <seen_t*>calloc(mapping.m.slots, sizeof(seen_t))
        if self.seen == NULL:
            raise MemoryError()

    def __dealloc__(self):
        free(self.seen)

    cdef int health(self, NodeInfo info, uint64_t now_ns, double* age_s) noexcept:
        """HEALTH_* of a node; `age_s`, if given, gets the age of its heartbeat in seconds."""
        cdef seen_t* seen = &self.seen[info.slot]
        cdef const shmc_hot* hot = &self.mapping.m.hot[info.slot]
        cdef uint64_t beats = load_acquire_u64(&hot.beats)
        cdef uint64_t beat_ns = load_relaxed_u64(&hot.beat_ns)
        cdef uint64_t progress_ns = load_relaxed_u64(&hot.progress_ns)
        cdef uint64_t beat_age, progress_age, late
        cdef bint fresh = seen.generation != info.generation
        if fresh:
            seen.generation = info.generation
        if fresh or seen.beats != beats:
            seen.beats = beats
            seen.beat_at_ns = _moved_at(info.same_clock, beat_ns, now_ns)
        if fresh or seen.progress != progress_ns:
            seen.progress = progress_ns
            seen.progress_at_ns = _moved_at(info.same_clock, progress_ns, now_ns)
        beat_age = now_ns - seen.beat_at_ns if now_ns > seen.beat_at_ns else 0
        progress_age = now_ns - seen.progress_at_ns if now_ns > seen.progress_at_ns else 0
        if age_s != NULL:
            age_s[0] = beat_age / 1e9
        if load_relaxed_u32(&hot.generation) != info.generation or not death_is_alive(
            load_acquire_u32(&hot.death)
        ):
            return HEALTH_DEAD
        late = _SUSPECT_INTERVALS * info.interval_ns
        if beat_age > late or progress_age > late:
            return HEALTH_SUSPECT
        return HEALTH_ALIVE


cdef inline uint64_t _moved_at(bint same_clock, uint64_t stamp_ns, uint64_t now_ns) noexcept:
    """When a counter moved, on our clock; a stamp from the future cannot be of our clock."""
    return stamp_ns if same_clock and stamp_ns < now_ns else now_ns
