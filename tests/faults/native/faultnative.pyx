# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""What the fault harness needs at compiled speed, and the wrong protocols that it must find.

Built against the installed package's .pxd files and headers, as any module of a user would be:
what writes and reads here is the library's own latch, not a copy of it.

A record that is written here has the number `n` of its commit in every word (`n` plus a constant
of the word's own), so each read tells whether all its words are of one commit, and of which.
"""
from libc.stdint cimport uint32_t, uint64_t
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec
from posix.unistd cimport usleep

from shmcoord._atomics cimport *
from shmcoord._layout cimport *
from shmcoord.backend cimport Backend
from shmcoord.lease cimport take_cell
from shmcoord.cells cimport cell_make
from shmcoord.node cimport Node
from shmcoord.status cimport record_read, record_write, word_add_inflight

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from *:
    '''
    #define WORDS 32u
    #define STRIDE ((uint64_t)0x10001)
    '''
    const uint32_t WORDS
    const uint64_t STRIDE

# The latch of the library, and three ways without one of its protections.
LATCH = 0
NO_RECHECK = 1    # two copies; the reader does not look at the sequence again
ODD_EVEN = 2      # one copy; the sequence is odd while it is written
ONE_COPY = 3      # one copy; nothing says that it is being written
cdef enum:
    _LATCH = 0
    _NO_RECHECK = 1
    _ODD_EVEN = 2
    _ONE_COPY = 3


cdef inline uint64_t now_ns() noexcept nogil:
    cdef timespec at
    clock_gettime(CLOCK_MONOTONIC, &at)
    return <uint64_t>at.tv_sec * 1000000000u + <uint64_t>at.tv_nsec


# --- records

cdef inline void fill(uint64_t* words, uint64_t n) noexcept nogil:
    cdef uint32_t i
    for i in range(WORDS):
        words[i] = n + i * STRIDE


cdef inline bint is_whole(const uint64_t* words) noexcept nogil:
    cdef uint32_t i
    for i in range(1, WORDS):
        if words[i] - i * STRIDE != words[0]:
            return False
    return True


cdef inline void write_one(shmc_record* record, int kind) noexcept nogil:
    """Write the next record; its number is that of the sequence behind it."""
    cdef uint64_t words[32]
    cdef uint64_t seq = load_relaxed_u64(&record.seq)
    cdef uint32_t i
    if kind == _LATCH or kind == _NO_RECHECK:
        fill(words, seq + 1)
        record_write(record, words, WORDS)
        return
    seq &= ~<uint64_t>1
    fill(words, seq + 2)
    if kind == _ODD_EVEN:
        store_relaxed_u64(&record.seq, seq + 1)
        fence_release()
    for i in range(WORDS):
        store_relaxed_u64(&record.copy[0][i], words[i])
    store_release_u64(&record.seq, seq + 2)


cdef inline bint read_one(const shmc_record* record, int kind, uint64_t* words) noexcept nogil:
    """Read it the way that belongs to `kind`; False if no try succeeded."""
    cdef uint64_t seq
    cdef uint32_t i
    cdef int _attempt
    cdef const uint64_t* copy
    if kind == _LATCH:
        return record_read(record, words, WORDS)
    for _attempt in range(64):
        seq = load_acquire_u64(&record.seq)
        if kind == _ODD_EVEN and seq & 1:
            continue
        copy = record.copy[seq & 1 if kind == _NO_RECHECK else 0]
        for i in range(WORDS):
            words[i] = load_relaxed_u64(&copy[i])
        if kind != _ODD_EVEN:
            return True
        fence_acquire()
        if load_relaxed_u64(&record.seq) == seq:
            return True
    return False


def write(Node node not None, int kind, double seconds, uint64_t burst, uint32_t pause_us):
    """Write `burst` records, pause, and so on for some seconds; how many were written.

    One burst at least, also within 0 seconds: a reader then finds a record with a number.

    Without a pause the writer is flat out. Nobody else may write meanwhile (`interval_s` large).
    """
    cdef shmc_record* record = node.record
    cdef uint64_t written = 0, _i, end = now_ns() + <uint64_t>(seconds * 1e9)
    with nogil:
        while written == 0 or now_ns() < end:
            for _i in range(burst):
                write_one(record, kind)
            written += burst
            if pause_us:
                usleep(pause_us)
    return written


def read(Backend backend not None, int kind, uint64_t reads, double seconds):
    """Read and check until so many reads were accepted, or the time is over.

    Returns a dict: `reads` accepted, `torn` and `backwards` among them, `commits` that were seen,
    `refused` reads (every try was disturbed) and the most `in_a_row` of those.
    """
    cdef const shmc_record* record = &backend.m.record[backend.info.slot]
    cdef uint64_t words[32]
    cdef uint64_t accepted = 0, torn = 0, backwards = 0, commits = 0, refused = 0
    cdef uint64_t row = 0, most = 0, last = 0
    cdef uint64_t end = now_ns() + <uint64_t>(seconds * 1e9)
    with nogil:
        while accepted < reads:
            if ((accepted + refused) & 0xFFF) == 0 and now_ns() > end:
                break
            if not read_one(record, kind, words):
                refused += 1
                row += 1
                if row > most:
                    most = row
                continue
            row = 0
            accepted += 1
            if not is_whole(words):
                torn += 1
                continue
            if words[0] < last:
                backwards += 1
            elif words[0] > last:
                commits += 1
            last = words[0]
    return {
        "reads": accepted, "torn": torn, "backwards": backwards, "commits": commits,
        "refused": refused, "in_a_row": most,
    }


def look(Backend backend not None, int kind):
    """One look at a record that nobody writes now.

    Returns:
        (outcome, number, inside): outcome is "whole", "torn" or "unreadable"; whether the number
        is that of the last commit is for the caller to ask (`seq`); `inside` tells whether the
        copy that is not current was left half-written.
    """
    cdef const shmc_record* record = &backend.m.record[backend.info.slot]
    cdef uint64_t words[32]
    cdef uint64_t seq = load_acquire_u64(&record.seq)
    if not read_one(record, kind, words):
        return "unreadable", seq, True
    inside = not is_whole(record.copy[(seq + 1) & 1 if kind == _LATCH else 0])
    return "whole" if is_whole(words) else "torn", words[0], inside


def seq(Backend backend not None):
    """The sequence of the record."""
    return load_acquire_u64(&backend.m.record[backend.info.slot].seq)


def usurp(Backend backend not None):
    """Write a record into a slot that is another's, as a takeover on a late heartbeat would."""
    write_one(&backend.m.record[backend.info.slot], _LATCH)


# --- leases and load words, without what protects them

cdef uint64_t* row_of(Backend backend) noexcept:
    return backend.m.cells + <size_t>backend.info.slot * backend.m.leases


def take_ownerless(Backend backend not None):
    """Take a cell in nobody's name, which is what a plain counter does; its index or -1."""
    cdef uint64_t value = cell_make(
        SHMC_CELL_RUNNING, backend.info.slot, backend.info.generation, 1, 1
    )
    cdef int index = take_cell(row_of(backend), 0, backend.info.capacity, value)
    if index >= 0:
        word_add_inflight(backend.hot, backend.info.generation, 1)
    return index


def take_by_count(Backend backend not None, uint32_t op):
    """Look whether there is room, then take: two steps. Index and value of the cell, or None."""
    cdef uint64_t* row = row_of(backend)
    cdef uint64_t value = cell_make(
        SHMC_CELL_RUNNING, backend.info.slot, backend.info.generation, 1, op
    )
    cdef uint32_t i, taken = 0
    cdef int index
    for i in range(backend.m.leases):
        taken += load_acquire_u64(&row[i]) != 0
    if taken >= backend.info.capacity:
        return None
    with nogil:
        sched_yield()
    index = take_cell(row, 0, backend.m.leases, value)
    return None if index < 0 else (index, value)


def free_plainly(Backend backend not None, uint32_t index):
    """Free a cell with a plain store, whoever has it."""
    store_relaxed_u64(&row_of(backend)[index], 0)


def sweep_everything(Backend backend not None):
    """A sweep that does not ask who is dead."""
    cdef uint32_t i
    for i in range(backend.m.leases):
        store_relaxed_u64(&row_of(backend)[i], 0)


def adopt_by_state(Node node not None, uint32_t index):
    """Adopt whatever is reserved in the cell, without comparing it with the token."""
    cdef uint64_t cell = load_acquire_u64(&node.row[index])
    return cell >> 62 == SHMC_CELL_RESERVED


def trusting_cell(Backend backend not None):
    """A node's first lease cell, found by what the header says now instead of what was checked."""
    cdef const shmc_header* header = <const shmc_header*>backend.m.base
    cdef const uint64_t* cells
    cdef uint64_t row = backend.info.slot % load_relaxed_u32(&header.slots)
    cells = <const uint64_t*>(backend.m.base + load_relaxed_u64(&header.lease_offset))
    return cells[row * load_relaxed_u32(&header.leases)]


def claim_death_word(Backend backend not None, uint32_t thread_id):
    """Say in the death word that a thread lives, without the kernel's knowing of it."""
    store_release_u32(&backend.hot.death, thread_id)


def move_load(Node node not None, uint64_t times, bint atomically):
    """Add to and take off `in flight`, without the GIL."""
    cdef uint64_t i, word
    cdef uint32_t generation = node.hot.generation
    with nogil:
        for i in range(2 * times):
            if atomically:
                word_add_inflight(node.hot, generation, 1 if i & 1 == 0 else -1)
            else:
                word = load_relaxed_u64(&node.hot.load)
                if i & 0xFF == 0:
                    sched_yield()  # where others have no processor of their own
                store_relaxed_u64(&node.hot.load, word + 1 if i & 1 == 0 else word - 1)


def place(Backend backend not None):
    """Slot and generation of a node: what its leases' tokens name it by."""
    return backend.info.slot, backend.info.generation
