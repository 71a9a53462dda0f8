from libc.stdint cimport uint32_t, uint64_t

from shmcoord._layout cimport shmc_hot, shmc_meta, shmc_record, shmc_sync

cdef enum:
    MAPPING_OPEN = 0
    MAPPING_CLOSED = 1
    MAPPING_FORKED = 2

# One process's view of one segment. All geometry is copied here from the validated header, and
# every address is computed from these copies: nothing read later from shared memory moves them.
cdef struct mapping_t:
    int state          # MAPPING_*; FORKED is stored by the child's fork handler
    bint writable
    char* base
    size_t size
    int fd             # carries the open-file-description locks; -1 once closed
    uint32_t slots
    uint32_t leases    # cells per slot
    shmc_sync* sync
    uint64_t* bitmap
    shmc_hot* hot
    shmc_record* record
    uint64_t* cells
    shmc_meta* meta
    uint64_t incarnation
    uint64_t time_ns_id  # this process's time namespace
    mapping_t* next      # all mappings of this process, for the fork handler


cdef class Mapping:
    cdef mapping_t* m
    cdef readonly str name
    cdef object _created_wall_ns
    cdef object _identity  # (st_dev, st_ino)
    cdef object _mode      # write permissions of others that were accepted
    cdef int check(self) except -1

cdef int check_state(int state, str what) except -1
