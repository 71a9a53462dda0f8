# Bells: datagrams of one byte by which whoever frees a cell wakes an event loop of another process.
#
# A bell is an abstract Unix socket, which needs no file and goes with its process. Its name holds
# the incarnation of the segment, so it is nobody else's by accident. Whoever shares the network
# namespace may ring it, or have taken the name: then a loop looks at its wake words in vain, or is
# woken by the futex, or by the net.
from libc.stdint cimport uint32_t, uint64_t

cdef extern from *:
    """
    #include <errno.h>
    #include <stddef.h>
    #include <stdio.h>
    #include <sys/socket.h>
    #include <sys/un.h>
    #include <unistd.h>

    static socklen_t shmc_bell_address(struct sockaddr_un *to, uint64_t incarnation,
                                       uint32_t slot) {
        to->sun_family = AF_UNIX;
        to->sun_path[0] = 0;
        int length = snprintf(to->sun_path + 1, sizeof(to->sun_path) - 1, "shmcoord-%016llx-%04x",
                              (unsigned long long)incarnation, slot);
        return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)length);
    }

    /* A socket that the bell of this slot wakes; -1 with errno set. */
    static __attribute__((unused)) int shmc_bell_open(uint64_t incarnation, uint32_t slot) {
        struct sockaddr_un at;
        socklen_t length = shmc_bell_address(&at, incarnation, slot);
        int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        if (fd >= 0 && bind(fd, (struct sockaddr *)&at, length) != 0) {
            int error = errno;
            close(fd);
            errno = error;
            return -1;
        }
        return fd;
    }

    /* Ring; 0 if nobody hears it. Each module of this process that rings has one socket for it. */
    static __attribute__((unused)) int shmc_bell_ring(uint64_t incarnation, uint32_t slot) {
        static int ringer = -1;
        struct sockaddr_un to;
        socklen_t length = shmc_bell_address(&to, incarnation, slot);
        int fd = __atomic_load_n(&ringer, __ATOMIC_ACQUIRE);
        if (fd < 0) {
            int none = -1;
            fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
            if (fd < 0)
                return 0;
            if (!__atomic_compare_exchange_n(&ringer, &none, fd, 0, __ATOMIC_ACQ_REL,
                                             __ATOMIC_ACQUIRE)) {
                close(fd); /* another thread was faster */
                fd = none;
            }
        }
        char byte = 1;
        return sendto(fd, &byte, 1, MSG_DONTWAIT | MSG_NOSIGNAL, (struct sockaddr *)&to,
                      length) == 1 ||
               errno == EAGAIN; /* full: it was rung often enough */
    }
    """
    int bell_open "shmc_bell_open" (uint64_t incarnation, uint32_t slot) nogil
    bint bell_ring "shmc_bell_ring" (uint64_t incarnation, uint32_t slot) noexcept nogil
