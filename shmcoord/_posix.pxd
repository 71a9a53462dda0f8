# What the kernel offers and Cython's own libc declarations lack: clocks, file locks that belong to
# an open file description, futexes, threads. Inline wrappers only; nothing here knows the layout.
from libc.errno cimport EAGAIN, EINTR, ETIMEDOUT, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from posix.time cimport timespec

cdef extern from "<time.h>" nogil:
    int clock_gettime(int clock, timespec* out)
    enum: CLOCK_MONOTONIC, CLOCK_MONOTONIC_COARSE, CLOCK_REALTIME

cdef extern from "<fcntl.h>" nogil:
    """
    #include <sys/syscall.h>
    #include <sys/mman.h>
    #include <linux/futex.h>
    #include <unistd.h>
    #include <pthread.h>
    #include <signal.h>
    #ifndef F_OFD_GETLK
    #define F_OFD_GETLK 36
    #define F_OFD_SETLK 37
    #endif
    #ifndef MADV_DONTFORK
    #define MADV_DONTFORK 10
    #endif
    """
    ctypedef struct flock_t "struct flock":
        short l_type
        short l_whence
        int64_t l_start
        int64_t l_len
        int l_pid
    enum: F_OFD_GETLK, F_OFD_SETLK, F_WRLCK, F_UNLCK, SEEK_SET
    int fcntl(int fd, int cmd, ...)
    int c_open "open" (const char* path, int flags, ...)
    enum: O_RDWR, O_RDONLY, O_CLOEXEC

cdef extern from "<unistd.h>" nogil:
    int c_close "close" (int fd)
    long syscall(long number, ...)

cdef extern from "<sys/syscall.h>" nogil:
    enum: SYS_futex, SYS_gettid, SYS_set_robust_list

cdef extern from "<sys/mman.h>" nogil:
    void* c_mmap "mmap" (void* addr, size_t length, int prot, int flags, int fd, int64_t offset)
    int c_munmap "munmap" (void* addr, size_t length)
    int c_madvise "madvise" (void* addr, size_t length, int advice)
    enum: PROT_READ, PROT_WRITE, MAP_SHARED, MADV_DONTFORK

cdef extern from "<linux/futex.h>" nogil:
    enum: FUTEX_WAIT, FUTEX_WAKE, FUTEX_OWNER_DIED, FUTEX_TID_MASK
    ctypedef struct robust_list "struct robust_list":
        robust_list* next
    ctypedef struct robust_list_head "struct robust_list_head":
        robust_list list
        long futex_offset
        robust_list* list_op_pending

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    ctypedef struct pthread_condattr_t:
        pass
    ctypedef unsigned long pthread_t
    ctypedef struct sigset_t:
        pass
    int pthread_mutex_init(pthread_mutex_t* m, void* attr)
    int pthread_mutex_lock(pthread_mutex_t* m)
    int pthread_mutex_unlock(pthread_mutex_t* m)
    int pthread_condattr_init(pthread_condattr_t* a)
    int pthread_condattr_setclock(pthread_condattr_t* a, int clock)
    int pthread_cond_init(pthread_cond_t* c, pthread_condattr_t* a)
    int pthread_cond_wait(pthread_cond_t* c, pthread_mutex_t* m)
    int pthread_cond_timedwait(pthread_cond_t* c, pthread_mutex_t* m, const timespec* until)
    int pthread_cond_broadcast(pthread_cond_t* c)
    int pthread_create(pthread_t* t, void* attr, void* (*start)(void*) noexcept nogil, void* arg)
    int pthread_detach(pthread_t t)
    int pthread_atfork(void (*prepare)() noexcept nogil, void (*parent)() noexcept nogil,
                       void (*child)() noexcept nogil)

cdef extern from "<signal.h>" nogil:
    int sigfillset(sigset_t* s)
    int pthread_sigmask(int how, const sigset_t* new, sigset_t* old)
    enum: SIG_SETMASK


cdef inline uint64_t clock_ns(int clock) noexcept nogil:
    cdef timespec t
    clock_gettime(clock, &t)
    return <uint64_t>t.tv_sec * 1000000000u + <uint64_t>t.tv_nsec


cdef inline uint64_t mono_ns() noexcept nogil:
    """CLOCK_MONOTONIC, ns."""
    return clock_ns(CLOCK_MONOTONIC)


cdef inline uint64_t mono_coarse_ns() noexcept nogil:
    """CLOCK_MONOTONIC at the resolution of the kernel's tick (1-4 ms); about 5 ns to read."""
    return clock_ns(CLOCK_MONOTONIC_COARSE)


cdef inline uint64_t wall_ns() noexcept nogil:
    """CLOCK_REALTIME, ns: for people, never for a decision."""
    return clock_ns(CLOCK_REALTIME)


cdef inline int ofd_lock(int fd, int64_t byte, short kind) noexcept nogil:
    """Set (F_WRLCK) or clear (F_UNLCK) the lock on one byte, never waiting; 0 or errno."""
    cdef flock_t lock
    lock.l_type = kind
    lock.l_whence = SEEK_SET
    lock.l_start = byte
    lock.l_len = 1
    lock.l_pid = 0
    while fcntl(fd, F_OFD_SETLK, &lock) != 0:
        if errno != EINTR:
            return errno
    return 0


cdef inline bint ofd_held(int fd, int64_t byte, int64_t length) noexcept nogil:
    """Whether another open file description holds a lock in this range of bytes."""
    cdef flock_t lock
    lock.l_type = F_WRLCK
    lock.l_whence = SEEK_SET
    lock.l_start = byte
    lock.l_len = length
    lock.l_pid = 0
    return fcntl(fd, F_OFD_GETLK, &lock) == 0 and lock.l_type != F_UNLCK


cdef inline long futex_wait(uint32_t* word, uint32_t seen, uint64_t timeout_ns) noexcept nogil:
    """Sleep while *word is `seen`, at most `timeout_ns`; 0, or -1 with errno set."""
    cdef timespec t
    t.tv_sec = timeout_ns // 1000000000u
    t.tv_nsec = timeout_ns % 1000000000u
    return syscall(SYS_futex, word, FUTEX_WAIT, seen, &t, NULL, 0)


cdef inline void futex_wake_all(uint32_t* word) noexcept nogil:
    syscall(SYS_futex, word, FUTEX_WAKE, 0x7FFFFFFF, NULL, NULL, 0)


cdef extern from *:
    """
    #ifndef SYS_futex_waitv
    #define SYS_futex_waitv 449
    #endif
    /* Of linux/futex.h since 5.16; older headers lack it. */
    struct shmc_futex_waitv { uint64_t val; uint64_t uaddr; uint32_t flags; uint32_t reserved; };
    """
    enum: SYS_futex_waitv
    ctypedef struct futex_waitv_t "struct shmc_futex_waitv":
        uint64_t val
        uint64_t uaddr
        uint32_t flags
        uint32_t reserved


cdef inline long futex_wait_any(uint32_t** words, const uint32_t* seen, uint32_t count,
                                uint64_t timeout_ns) noexcept nogil:
    """Sleep while every one of at most 128 words is as seen, at most `timeout_ns`."""
    cdef futex_waitv_t waits[128]
    cdef timespec until
    cdef uint64_t deadline
    cdef uint32_t i
    cdef long result
    if count == 1:
        return futex_wait(words[0], seen[0], timeout_ns)
    for i in range(count):
        waits[i].val = seen[i]
        waits[i].uaddr = <uint64_t>words[i]
        waits[i].flags = 2  # a 32-bit word, shared between processes
        waits[i].reserved = 0
    deadline = mono_ns() + timeout_ns
    until.tv_sec = deadline // 1000000000u
    until.tv_nsec = deadline % 1000000000u
    result = syscall(SYS_futex_waitv, waits, count, 0, &until, CLOCK_MONOTONIC)
    if result == -1 and errno not in (EAGAIN, EINTR, ETIMEDOUT):
        # Linux before 5.16, or a sandbox that does not know the call, waits on one word only: the
        # first, in short bounded turns.
        return futex_wait(words[0], seen[0], min(timeout_ns, <uint64_t>5000000))
    return result
