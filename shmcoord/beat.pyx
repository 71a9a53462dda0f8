# cython: language_level=3, boundscheck=False, wraparound=False
"""The beat thread: one native thread per process that shows that its participants live.

It holds the death words of all participants of the process (the kernel marks them when this thread
ends, however that happens), moves their heartbeats, sweeps their cells and corrects their load
words. It never takes the GIL.
"""
from libc.stdint cimport uint32_t, uint64_t

from shmcoord._atomics cimport *
from shmcoord._layout cimport *
from shmcoord._posix cimport *
from shmcoord._steps cimport step
from shmcoord.cells cimport cell_cost, sweep_row
from shmcoord.status cimport word_generation, word_inflight

# `_entries`, `_head` and the robust links are changed with `_registry` held. The kernel reads
# `_head` and the links when the beat thread ends; the order of the stores in `hold` and
# `let_go` keeps the list whole at every instant, since that instant may be the last.

cdef pthread_mutex_t _registry
cdef pthread_cond_t _changed
cdef entry_t* _entries = NULL
cdef robust_list_head _head
cdef uint32_t _beat_tid = 0
cdef bint _beat_started = False
cdef bint _beat_refused = False  # the kernel, or a sandbox, knows no robust list
cdef uint32_t _held = 0          # words in the list
cdef enum:
    HELD_MAX = 2048  # the kernel's ROBUST_LIST_LIMIT: it marks no more than that


cdef void _init_sync() noexcept nogil:
    cdef pthread_condattr_t attr
    pthread_mutex_init(&_registry, NULL)
    pthread_condattr_init(&attr)
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC)
    pthread_cond_init(&_changed, &attr)


cdef void _fork_prepare() noexcept nogil:
    pthread_mutex_lock(&_registry)


cdef void _fork_parent() noexcept nogil:
    pthread_mutex_unlock(&_registry)


cdef void _fork_child() noexcept nogil:
    # The child has no beat thread and no participants. The entries belong to Participant objects,
    # which free them.
    global _entries, _beat_tid, _beat_started, _held
    _entries = NULL
    _held = 0
    _beat_tid = 0
    _beat_started = False
    _init_sync()


_init_sync()
pthread_atfork(_fork_prepare, _fork_parent, _fork_child)


cdef void* _beat_main(void* unused) noexcept nogil:
    global _beat_refused, _beat_tid
    cdef uint64_t now, wake
    cdef timespec until
    cdef entry_t* entry
    pthread_mutex_lock(&_registry)
    _head.list.next = &_head.list
    _head.futex_offset = SHMC_FUTEX_OFFSET
    _head.list_op_pending = NULL
    # This thread's own list replaces libc's, which it will never use: it locks no robust mutex.
    if syscall(SYS_set_robust_list, &_head, sizeof(robust_list_head)) != 0:
        _beat_refused = True
    _beat_tid = <uint32_t>syscall(SYS_gettid)
    pthread_cond_broadcast(&_changed)
    while True:
        now = mono_ns()
        wake = <uint64_t>-1
        entry = _entries
        while entry != NULL:
            if entry.due_ns <= now:
                _beat(entry, now)
                entry.due_ns += entry.interval_ns
                if entry.due_ns <= now:  # we were stopped for long: no burst of old beats
                    entry.due_ns = now + entry.interval_ns
            if entry.due_ns < wake:
                wake = entry.due_ns
            entry = entry.next
        if wake == <uint64_t>-1:
            pthread_cond_wait(&_changed, &_registry)
        else:
            until.tv_sec = wake // 1000000000u
            until.tv_nsec = wake % 1000000000u
            pthread_cond_timedwait(&_changed, &_registry, &until)
    return NULL


cdef void _beat(entry_t* entry, uint64_t now) noexcept nogil:
    cdef shmc_hot* hot = &entry.m.hot[entry.slot]
    if not entry.is_mirror:
        store_relaxed_u64(&hot.beat_ns, now)
        store_release_u64(&hot.beats, load_relaxed_u64(&hot.beats) + 1)
    if entry.is_node:
        sweep_row(entry.m, entry.slot)
        _recount(entry)


cdef void _recount(entry_t* entry) noexcept nogil:
    """Correct the load word from the cells, unless it moves meanwhile (then at the next beat)."""
    cdef shmc_hot* hot = &entry.m.hot[entry.slot]
    cdef uint64_t* row = entry.m.cells + <size_t>entry.slot * entry.m.leases
    cdef uint64_t word, cell, total
    cdef uint32_t i
    cdef int _attempt
    for _attempt in range(3):
        word = load_seqcst_u64(&hot.load)
        if word_generation(word) != (entry.generation & 0xFFFF):
            return
        total = load_relaxed_u64(&entry.overflow)
        for i in range(entry.m.leases):
            cell = load_acquire_u64(&row[i])
            if cell != 0:
                total += cell_cost(cell)
        if total > SHMC_FIELD_MAX:
            total = SHMC_FIELD_MAX
        if total == word_inflight(word):
            return
        if cas_seqcst_u64(&hot.load, word, (word & ~<uint64_t>SHMC_FIELD_MAX) | total):
            return


cdef bint _start_beat_thread() noexcept nogil:
    """Start the thread if there is none and wait for its list; the caller has `_registry`."""
    global _beat_started
    cdef pthread_t thread
    cdef sigset_t every, before
    cdef int err
    if not _beat_started:
        # Signals are for the threads of the application.
        sigfillset(&every)
        pthread_sigmask(SIG_SETMASK, &every, &before)
        err = pthread_create(&thread, NULL, _beat_main, NULL)
        pthread_sigmask(SIG_SETMASK, &before, NULL)
        if err != 0:
            return False
        pthread_detach(thread)
        _beat_started = True
    while _beat_tid == 0:
        pthread_cond_wait(&_changed, &_registry)
    return not _beat_refused


cdef bint hold(entry_t* entry) noexcept nogil:
    """Have the beat thread hold the death word of `entry` and move its heartbeat."""
    global _entries, _held
    cdef shmc_hot* hot = &entry.m.hot[entry.slot]
    pthread_mutex_lock(&_registry)
    if _held >= HELD_MAX or not _start_beat_thread():
        pthread_mutex_unlock(&_registry)
        return False
    # Linked first, then locked: a death in between leaves a word of 0, which nobody takes for a
    # living owner; the other order would leave a locked word that nobody marks.
    hot.robust_next = <uint64_t>_head.list.next
    fence_seqcst()
    _head.list.next = <robust_list*>&hot.robust_next
    fence_seqcst()
    step(b"claim.link")
    store_release_u32(&hot.death, _beat_tid)
    step(b"claim.death")
    entry.next = _entries
    _entries = entry
    _held += 1
    pthread_cond_broadcast(&_changed)
    pthread_mutex_unlock(&_registry)
    return True


cdef void let_go(entry_t* entry) noexcept nogil:
    """The reverse of `hold`: the word is emptied first, then unlinked."""
    global _entries, _held
    cdef robust_list* after = &_head.list
    cdef entry_t* before = NULL
    cdef entry_t* at
    pthread_mutex_lock(&_registry)
    store_release_u32(&entry.m.hot[entry.slot].death, 0)
    fence_seqcst()
    step(b"leave.death")
    # The kernel's list has the order of ours, so the neighbours are found in private memory, never
    # by following addresses that stand in the segment.
    at = _entries
    while at != NULL and at != entry:
        before = at
        at = at.next
    if at == entry:
        _held -= 1
        if entry.next != NULL:
            after = <robust_list*>&entry.next.m.hot[entry.next.slot].robust_next
        if before == NULL:
            _entries = entry.next
            _head.list.next = after
        else:
            before.next = entry.next
            before.m.hot[before.slot].robust_next = <uint64_t>after
    pthread_mutex_unlock(&_registry)


cdef str why_not_held():
    if _held >= HELD_MAX:
        return f"it takes part {HELD_MAX} times already, the most that the kernel marks"
    if _beat_refused:
        return "set_robust_list was refused (a sandbox?)"
    return "the beat thread could not be started (limit of threads?)"


cdef bint is_ours(mapping_t* m, uint32_t slot) noexcept nogil:
    """Whether a participant of this process claimed the slot through this very mapping.

    Locks of one open file description do not conflict with each other, so for these slots taking
    the owner lock would succeed and mean nothing.
    """
    cdef bint found = False
    cdef entry_t* entry
    pthread_mutex_lock(&_registry)
    entry = _entries
    while entry != NULL:
        if entry.m == m and entry.slot == slot:
            found = True
            break
        entry = entry.next
    pthread_mutex_unlock(&_registry)
    return found
