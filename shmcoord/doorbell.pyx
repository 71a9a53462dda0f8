# cython: language_level=3, boundscheck=False, wraparound=False
"""A doorbell for event loops: descriptors that become readable when a router is told of a cell.

An event loop waits for descriptors, so whoever frees a cell sends a datagram of one byte to a
socket of the loop (`_bell.pxd`). Where it cannot (another network namespace, a sandbox), it wakes a
futex; then a native thread, one per router and loop, makes an eventfd readable. It never takes the
GIL: a Python thread in its place would wait for the loop's thread to let go of it, and the loop
then for the other. While datagrams arrive it sleeps.
"""
cimport cython
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from shmcoord._atomics cimport load_acquire_u32, load_seqcst_u32, store_release_u32
from shmcoord._bell cimport bell_open
from shmcoord._posix cimport *
from shmcoord.liveness cimport Participant
from shmcoord.segment cimport MAPPING_FORKED

import os
import weakref

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int start, int flags)
    enum: EFD_CLOEXEC, EFD_NONBLOCK

cdef extern from "<unistd.h>" nogil:
    ssize_t c_write "write" (int fd, const void* data, size_t size)

cdef extern from "<pthread.h>" nogil:
    int pthread_join(pthread_t thread, void** result)

cdef enum:
    # A thread that missed a telling looks again after this long, whatever happens.
    AGAIN_NS = 1000000000


cdef struct bell_t:
    uint32_t* words[127]  # wake words of the router's slots
    uint32_t count
    uint32_t stop         # futex; set by the owner, once
    int fd


_bells = weakref.WeakSet()


def _close_bells():
    """A forked child must not keep the addresses of its parent's bells."""
    for bell in list(_bells):
        (<Doorbell>bell)._close()
    _bells.clear()


os.register_at_fork(after_in_child=_close_bells)


cdef void* _main(void* argument) noexcept nogil:
    """Ring whenever a wake word has become odd: the router was told of a free cell."""
    cdef bell_t* bell = <bell_t*>argument
    cdef uint32_t* words[128]
    cdef uint32_t seen[128]
    cdef uint32_t rung[128]
    cdef uint32_t i
    cdef uint64_t one = 1
    cdef bint told
    for i in range(bell.count):
        words[i] = bell.words[i]
        rung[i] = 0
    words[bell.count] = &bell.stop
    while True:
        # What is seen here is what the sleep below compares with: nothing is missed in between.
        seen[bell.count] = load_acquire_u32(&bell.stop)
        if seen[bell.count]:
            return NULL
        told = False
        for i in range(bell.count):
            seen[i] = load_seqcst_u32(words[i])
            if seen[i] & 1 and rung[i] != seen[i]:
                rung[i] = seen[i]
                told = True
        if told:
            c_write(bell.fd, &one, sizeof(one))
        futex_wait_any(words, seen, bell.count + 1, AGAIN_NS)
    return NULL


@cython.no_gc_clear  # __dealloc__ needs the participants: their memory is what the thread looks at
cdef class Doorbell:
    """Makes a descriptor readable whenever the router behind some participants is told of a cell.

    Args:
        participants: of one router, not left; at most 127.

    Attributes:
        fds: an eventfd and sockets; reading 8 bytes makes one unreadable, perhaps after some turns.
    """

    cdef tuple participants  # a tuple: nothing clears it before we have let go of the memory
    cdef bell_t* bell
    cdef pthread_t thread
    cdef bint running
    cdef int fd
    cdef readonly tuple fds
    cdef object __weakref__

    def __cinit__(self, list participants):
        cdef sigset_t every, before
        cdef Participant owner
        cdef uint32_t i = 0
        cdef int err
        self.fd = -1
        self.fds = ()
        if len(participants) > 127:
            raise ValueError(f"at most 127 participants, not {len(participants)}")
        self.participants = tuple(participants)
        self.bell = <bell_t*>calloc(1, sizeof(bell_t))
        if self.bell == NULL:
            raise MemoryError()
        for participant in self.participants:
            owner = <Participant>participant
            self.bell.words[i] = &owner.entry.m.hot[owner.slot].wake
            i += 1
        self.bell.count = i
        self.fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.fd < 0:
            raise OSError(errno, os.strerror(errno), "eventfd")
        self.bell.fd = self.fd
        # Signals are for the threads of the application.
        sigfillset(&every)
        pthread_sigmask(SIG_SETMASK, &every, &before)
        err = pthread_create(&self.thread, NULL, _main, self.bell)
        pthread_sigmask(SIG_SETMASK, &before, NULL)
        if err:
            raise OSError(err, os.strerror(err), "a thread that waits for capacity")
        self.running = True
        _bells.add(self)
        fds = [self.fd]
        self.fds = tuple(fds)
        for participant in self.participants:
            owner = <Participant>participant
            # Another loop of the same router may have it already: it serves the callers of all.
            err = bell_open(owner.entry.m.incarnation, owner.slot)
            if err >= 0:
                fds.append(err)
                self.fds = tuple(fds)
                owner.has_bell = True

    def close(self):
        """End the thread and close `fds`, which no loop may watch any more. Idempotent."""
        self._close()

    cdef void _close(self) noexcept:
        cdef bint is_forked = False
        cdef Participant owner
        cdef tuple fds = self.fds  # taken first: two threads may close at once
        cdef int alone = self.fd if not fds else -1
        self.fds = ()
        self.fd = -1
        for participant in self.participants:
            owner = <Participant>participant
            is_forked = owner.entry.m.state == MAPPING_FORKED
            if len(fds) > 1 and not is_forked and not owner.left:
                owner.has_bell = False
                store_release_u32(&owner.entry.m.hot[owner.slot].bell, 0)
        if self.running:
            self.running = False
            if not is_forked:  # in a forked child there is no such thread
                store_release_u32(&self.bell.stop, 1)
                futex_wake_all(&self.bell.stop)
                with nogil:
                    pthread_join(self.thread, NULL)
        for fd in fds:
            c_close(fd)
        if alone >= 0:
            c_close(alone)

    def __dealloc__(self):
        if self.participants is not None:
            self._close()
        free(self.bell)
