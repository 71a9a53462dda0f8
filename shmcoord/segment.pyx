# cython: language_level=3, boundscheck=False, wraparound=False
"""A name becomes validated, mapped memory: create, attach, list, unlink.

A segment is the file `/dev/shm/<name>`, which is what POSIX shared memory is on Linux. It is made
by whoever opens it first, under a file lock (the *init lock*) that the kernel gives back if that
process dies half-way; `ready` is stored last. Whoever attaches reads the header once into private
memory, validates every field of it and computes each address from the private copy, so that
nothing that is written into the segment later can lead a reader outside of its own mapping.

The mapping is not inherited by forked children (MADV_DONTFORK), and a fork handler closes the
child's copy of the descriptor, since the owner locks would live on in it.
"""
from libc.errno cimport EAGAIN
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from shmcoord._atomics cimport load_acquire_u64, store_release_u32
from shmcoord._layout cimport *
from shmcoord._posix cimport *
from shmcoord._steps cimport step

import errno as _errno
import logging
import os
import re
import stat
import time

from shmcoord.errors import (
    ForkedHandle,
    LayoutMismatch,
    SegmentCorrupt,
    SegmentForbidden,
    SegmentFull,
    SegmentNotFound,
)

SLOTS_MAX = SHMC_SLOTS_MAX
LEASES_MAX = SHMC_LEASES_MAX
DIRECTORY = "/dev/shm"

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
_OPEN_FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_INIT_PATIENCE_S = 5.0
_log = logging.getLogger("shmcoord.segment")

# Every mapping of this process. Python code changes the list with the mutex held and without
# releasing the GIL in between; the fork handlers hold it across the fork.
cdef mapping_t* _mappings = NULL
cdef pthread_mutex_t _mappings_lock
pthread_mutex_init(&_mappings_lock, NULL)


cdef void _fork_prepare() noexcept nogil:
    pthread_mutex_lock(&_mappings_lock)


cdef void _fork_parent() noexcept nogil:
    pthread_mutex_unlock(&_mappings_lock)


cdef void _fork_child() noexcept nogil:
    # The memory itself is not here (MADV_DONTFORK). The descriptor is, and would keep the parent's
    # owner locks alive: close it. Every handle looks at `state` before it touches memory.
    cdef mapping_t* m = _mappings
    while m != NULL:
        if m.fd >= 0:
            c_close(m.fd)
            m.fd = -1
        m.state = MAPPING_FORKED  # also of closed ones: handles on them may still be let go
        m = m.next
    pthread_mutex_init(&_mappings_lock, NULL)


pthread_atfork(_fork_prepare, _fork_parent, _fork_child)


cdef int check_state(int state, str what) except -1:
    """Raise unless `state` is MAPPING_OPEN."""
    if state == MAPPING_OPEN:
        return 0
    if state == MAPPING_FORKED:
        raise ForkedHandle(
            f"{what} belongs to the parent process; open the segment again in the child"
        )
    raise ValueError(f"{what} is closed")


def _path(name):
    if not isinstance(name, str):
        raise TypeError(f"segment name must be a str, not {type(name).__name__}")
    if not _NAME.fullmatch(name) or name in (".", ".."):
        raise ValueError(f"segment name {name!r} does not match [A-Za-z0-9_.-]{{1,64}}")
    return f"{DIRECTORY}/{name}"


def _boot_id():
    with open("/proc/sys/kernel/random/boot_id") as file:
        return bytes.fromhex(file.read().strip().replace("-", ""))


def _time_namespace():
    try:
        return os.stat("/proc/self/ns/time").st_ino
    except OSError:  # kernel before 5.6: there is only one
        return 0


def _check_file(info, name, mode):
    """Refuse what is not a plain file of ours that only we can write to."""
    if not stat.S_ISREG(info.st_mode):
        raise SegmentForbidden(f"{name}: not a regular file; something else took the name")
    if info.st_nlink > 1:
        raise SegmentForbidden(f"{name}: has {info.st_nlink} links; another name leads to it")
    shared = mode & 0o020 and info.st_gid in {os.getegid(), *os.getgroups()}
    if info.st_uid != os.geteuid() and not shared:
        raise SegmentForbidden(
            f"{name}: belongs to uid {info.st_uid}, we are uid {os.geteuid()}; "
            "run as its owner, or choose another name"
        )
    excess = stat.S_IMODE(info.st_mode) & 0o022 & ~mode
    if excess:
        raise SegmentForbidden(
            f"{name}: mode {stat.S_IMODE(info.st_mode):04o} lets others write "
            f"(asked for {mode:04o}); chmod it or unlink it"
        )


cdef object _check_header(const shmc_header* h, str name, uint64_t file_size):
    """Raise unless the private header copy describes exactly a file of `file_size` bytes."""
    if h.magic != SHMC_MAGIC:
        if h.magic == <uint64_t>0x53484d434f4f5244u:
            raise LayoutMismatch(f"{name}: written with the other byte order")
        raise SegmentCorrupt(f"{name}: not a segment of shmcoord (magic {h.magic:#018x})")
    if h.layout_major != SHMC_LAYOUT_MAJOR or h.layout_minor != SHMC_LAYOUT_MINOR:
        raise LayoutMismatch(
            f"{name}: layout {h.layout_major}.{h.layout_minor}, this build reads "
            f"{SHMC_LAYOUT_MAJOR}.{SHMC_LAYOUT_MINOR}; stop its users and unlink it, or use "
            "the version that made it"
        )
    if h.signature != SHMC_SIGNATURE or h.header_bytes != sizeof(shmc_header):
        raise LayoutMismatch(
            f"{name}: signature {h.signature:#x}, this build's is {SHMC_SIGNATURE:#x}: "
            "made by a build with other sizes or alignments"
        )
    if not 1 <= h.slots <= SHMC_SLOTS_MAX or not 1 <= h.leases <= SHMC_LEASES_MAX:
        raise SegmentCorrupt(f"{name}: impossible geometry {h.slots} slots, {h.leases} leases")
    if (
        h.hot_offset != SHMC_TABLES_OFFSET
        or h.record_offset != shmc_record_offset(h.slots)
        or h.lease_offset != shmc_lease_offset(h.slots)
        or h.meta_offset != shmc_meta_offset(h.slots, h.leases)
        or h.total_bytes != shmc_total_bytes(h.slots, h.leases)
    ):
        raise SegmentCorrupt(f"{name}: its offsets do not follow from its {h.slots} slots")
    if h.total_bytes != file_size:
        raise SegmentCorrupt(
            f"{name}: {file_size} bytes long, its header says {h.total_bytes}; unlink it"
        )
    if h.incarnation == 0 or h.mode & ~<uint32_t>0o777 or h.ready != SHMC_READY:
        raise SegmentCorrupt(f"{name}: impossible incarnation, mode or ready word in the header")


cdef bint _read_header(int fd, shmc_header* h) except -1:
    """Copy the header into private memory; False if the segment is not ready."""
    cdef bytes ready, data
    # `ready` is stored last by the creator, so it is read first.
    ready = os.pread(fd, 4, 124)
    if len(ready) < 4 or int.from_bytes(ready, "little") not in (SHMC_READY, 0):
        pass  # no segment of ours at all: the full header will say what it is
    elif int.from_bytes(ready, "little") == 0:
        return False
    data = os.pread(fd, sizeof(shmc_header), 0)
    memset(h, 0, sizeof(shmc_header))
    memcpy(h, <const char*>data, len(data))
    # Empty at the first look, and in the making at the second.
    return h.ready != 0 or (h.magic != 0 and h.magic != SHMC_MAGIC)


def _is_half_made(fd, size):
    """Whether the file can only be what a creator that died half-way left behind."""
    if size == 0:
        return True
    head = os.pread(fd, 4096, 0)
    if not any(head):
        return True
    return (
        int.from_bytes(head[:8], "little") == SHMC_MAGIC
        and int.from_bytes(head[124:128], "little") == 0
    )


# Set around the only places that make these objects: they are made of memory, never of arguments
# (and never by copying). Put back to what it was, since making one may run the garbage collector,
# and that anything.
cdef bint _making = False


cdef class Mapping:
    """A mapped segment. The public face is `shmcoord.Segment`, a subclass."""

    def __cinit__(self, *args, **kwargs):
        self.m = NULL
        if not _making:
            raise TypeError("use Segment.open(name) or Segment.attach(name)")

    def __dealloc__(self):
        cdef mapping_t* m = self.m
        cdef mapping_t** link
        if m == NULL:
            return
        pthread_mutex_lock(&_mappings_lock)
        link = &_mappings
        while link[0] != NULL and link[0] != m:
            link = &link[0].next
        if link[0] == m:
            link[0] = m.next
        pthread_mutex_unlock(&_mappings_lock)
        if m.fd >= 0:
            c_close(m.fd)
        if m.base != NULL and m.state != MAPPING_FORKED:
            c_munmap(m.base, m.size)
        free(m)
        self.m = NULL

    cdef int check(self) except -1:
        if self.m.state != MAPPING_OPEN:
            check_state(self.m.state, f"segment {self.name}")
        return 0

    @classmethod
    def open(cls, name, *, slots=64, leases=128, mode=0o600):
        """Attach to the segment `name` for reading and writing; create it if there is none.

        Args:
            name: `[A-Za-z0-9_.-]{1,64}`; the segment is `/dev/shm/<name>`.
            slots: participants (nodes and routers) it has room for, 1 to 4096. An existing
                segment keeps its own geometry.
            leases: lease cells per slot, 1 to 1024: the most requests a node can have reserved.
            mode: permission bits. Group or other write is refused on an existing segment unless
                asked for here.

        Raises:
            SegmentForbidden, SegmentCorrupt, LayoutMismatch: the name leads to something that is
                not a segment of ours; nothing was written to it.
            SegmentFull: the memory file system has no room for it.
            ValueError, TypeError: wrong arguments.
        """
        path = _path(name)
        for what, value, most in (("slots", slots, SLOTS_MAX), ("leases", leases, LEASES_MAX)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{what} must be an int, not {type(value).__name__}")
            if not 1 <= value <= most:
                raise ValueError(f"{what} must be between 1 and {most}, not {value}")
        if not isinstance(mode, int) or mode & ~0o777 or mode & 0o600 != 0o600:
            raise ValueError(f"mode must be permission bits with 0600 among them, not {mode!r}")
        deadline = time.monotonic() + _INIT_PATIENCE_S
        while True:
            fd = _open_or_create(path, name, mode)
            try:
                found = _attach_or_init(cls, fd, path, name, slots, leases, mode)
            finally:
                os.close(fd)
            if found is not None:
                return found
            if time.monotonic() > deadline:
                raise SegmentCorrupt(
                    f"{name}: another process has been creating it for {_INIT_PATIENCE_S:g} s "
                    "without an end; stop that process, or unlink the segment"
                )
            time.sleep(0.001)

    @classmethod
    def attach(cls, name, *, mode=0o600):
        """Attach to an existing segment as an observer: a read-only mapping, never creates.

        Args:
            name: the segment's name.
            mode: as for `open`: which write permissions of others are accepted.

        Raises:
            SegmentNotFound: there is none, or nobody finished creating it.
            SegmentForbidden, SegmentCorrupt, LayoutMismatch: as for `open`.
        """
        return _attach(cls, name, mode, False)

    def _attach_anew(self):
        """A mapping of what the name leads to now; never creates."""
        return _attach(Mapping, self.name, self._mode, self.m.writable)

    @staticmethod
    def unlink(name):
        """Remove the name. Who is attached keeps the memory; who comes later makes a new one.

        Raises:
            SegmentNotFound: there is no such segment.
            SegmentForbidden: it is not a file of ours, and was left alone.
        """
        path = _path(name)
        try:
            info = os.lstat(path)
            if info.st_uid != os.geteuid() or not stat.S_ISREG(info.st_mode):
                raise SegmentForbidden(f"{name}: not a file of ours; not unlinked")
            os.unlink(path)
        except FileNotFoundError:
            raise SegmentNotFound(f"no segment {name}") from None
        except PermissionError as error:
            raise SegmentForbidden(f"{name}: {error.strerror}") from None

    @property
    def slots(self):
        """Participants there is room for."""
        return self.m.slots

    @property
    def leases(self):
        """Lease cells per slot."""
        return self.m.leases

    @property
    def size_bytes(self):
        """Length of the shared memory, bytes."""
        return self.m.size

    @property
    def created_at(self):
        """When it was made, seconds since the epoch by the creator's wall clock."""
        return self._created_wall_ns / 1e9

    @property
    def writable(self):
        """False for an observer's mapping."""
        return bool(self.m.writable)

    @property
    def is_mirror(self):
        """Whether it shows nodes of another host, which a bridge of this one keeps up to date.

        It stays a mirror when the bridge ends: no node of this host can join it.
        """
        self.check()
        return load_acquire_u64(&self.m.sync.mirror) != 0

    @property
    def closed(self):
        """Whether `close` was called, here or in the parent before a fork."""
        return self.m.state != MAPPING_OPEN

    def is_stale(self):
        """Whether the name leads to other memory now (unlinked, perhaps made anew)."""
        self.check()
        try:
            info = os.stat(_path(self.name), follow_symlinks=False)
        except FileNotFoundError:
            return True
        return (info.st_dev, info.st_ino) != self._identity

    def _close(self):
        """Refuse further use.

        Memory and descriptor go when the last handle on them does: a router over this segment
        still needs them to give back what it holds.
        """
        if self.m.state == MAPPING_OPEN:
            self.m.state = MAPPING_CLOSED

    def __repr__(self):
        state = ("", ", closed", ", of the parent process")[self.m.state]
        return f"<{type(self).__name__} {self.name}: {self.m.slots} slots{state}>"


cdef object _attach(type cls, name, mode, bint writable):
    """A mapping of the existing segment `name`; never creates, writes nothing."""
    cdef shmc_header h
    cdef int _attempt
    path = _path(name)
    fd = _open_existing(path, name, os.O_RDWR if writable else os.O_RDONLY)
    try:
        for _attempt in range(3):
            _check_file(os.fstat(fd), name, mode)
            # `ready` is looked at before the size: once it is set, both are final.
            ready = _read_header(fd, &h)
            info = os.fstat(fd)
            if ready and info.st_size > 0:
                _check_header(&h, name, info.st_size)
                if bytes(h.boot_id[:16]) != _boot_id():
                    raise SegmentCorrupt(f"{name}: from before this host's last boot; unlink it")
                return _map(cls, fd, name, info, &h, mode, writable)
            if _is_half_made(fd, info.st_size):
                raise SegmentNotFound(f"{name}: its creator has not finished it")
            # Finished between the two looks, or no segment: look again.
        raise SegmentCorrupt(f"{name}: not a segment of shmcoord")
    finally:
        os.close(fd)


def _open_existing(path, name, access):
    try:
        return os.open(path, access | _OPEN_FLAGS)
    except FileNotFoundError:
        raise SegmentNotFound(f"no segment {name}") from None
    except OSError as error:
        if error.errno == _errno.ELOOP:
            raise SegmentForbidden(f"{name}: a symbolic link; refused") from None
        if error.errno in (_errno.EACCES, _errno.EPERM):
            raise SegmentForbidden(
                f"{name}: no permission; run as its owner or choose another name"
            ) from None
        if error.errno in (_errno.EISDIR, _errno.ENXIO):
            raise SegmentForbidden(
                f"{name}: not a regular file; something else took the name"
            ) from None
        raise


def _open_or_create(path, name, mode):
    for _ in range(100):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _OPEN_FLAGS, 0o600)
        except FileExistsError:
            try:
                return _open_existing(path, name, os.O_RDWR)
            except SegmentNotFound:
                continue  # unlinked in between: once more
        except OSError as error:
            if error.errno == _errno.ENOSPC:
                raise SegmentFull(f"{name}: no room in {DIRECTORY}") from None
            if error.errno in (_errno.EACCES, _errno.EPERM, _errno.EROFS):
                raise SegmentForbidden(f"{name}: may not create files in {DIRECTORY}") from None
            raise
        else:
            step(b"create.open")
            return fd
    raise SegmentCorrupt(f"{name}: somebody keeps creating and removing it")


cdef object _attach_or_init(type cls, int fd, str path, str name, uint32_t slots,
                            uint32_t leases, uint32_t mode):
    """A mapping; or None: look the name up again."""
    cdef shmc_header h
    cdef int err
    info = os.fstat(fd)
    if info.st_nlink == 0:
        return None
    _check_file(info, name, mode)
    if info.st_size > 0 and _read_header(fd, &h):
        _check_header(&h, name, info.st_size)
        if bytes(h.boot_id[:16]) == _boot_id():
            return _map(cls, fd, name, info, &h, mode, True)
        # /dev/shm outlived a reboot (a bind mount): nobody of then is alive. The owner of the
        # file is us, so the name may be given to a new segment.
        if ofd_lock(fd, SHMC_LOCK_INIT, F_WRLCK) == 0:
            _log.warning("segment %s is from before the last boot: made anew", name)
            _unlink_if_same(path, info)
        return None
    if not _is_half_made(fd, info.st_size):
        if _read_header(fd, &h):
            return None  # finished since we looked
        raise SegmentCorrupt(f"{name}: not a segment of shmcoord; nothing was changed")
    err = ofd_lock(fd, SHMC_LOCK_INIT, F_WRLCK)
    if err != 0:
        if err == EAGAIN:
            return None
        raise OSError(err, os.strerror(err), path)
    step(b"create.lock")
    try:
        # Under the init lock: is it still ours to make?
        info = os.fstat(fd)
        if info.st_nlink == 0 or not _is_same(path, info):
            return None
        if info.st_size > 0 and _read_header(fd, &h):
            return None
        if not _is_half_made(fd, info.st_size):
            return None
        if ofd_held(fd, 0, SHMC_SLOTS_MAX):
            raise SegmentCorrupt(
                f"{name}: participants hold slots in it, yet its header says that it was never "
                "finished; stop them and unlink it"
            )
        if info.st_size > 0:
            # Started over in a file of its own. Whoever died half-way had it to himself, but where
            # `ready` was damaged later, observers may have it mapped: cutting it short under them
            # would end them with SIGBUS.
            _unlink_if_same(path, info)
            return None
        try:
            _initialise(fd, slots, leases, mode)
        except OSError as error:
            _unlink_if_same(path, info)
            if error.errno in (_errno.ENOSPC, _errno.ENOMEM, _errno.EFBIG):
                raise SegmentFull(
                    f"{name}: no room for {shmc_total_bytes(slots, leases)} bytes in "
                    f"{DIRECTORY}; use fewer slots or leases, or enlarge it"
                ) from None
            raise
    finally:
        ofd_lock(fd, SHMC_LOCK_INIT, F_UNLCK)
    info = os.fstat(fd)
    if not _read_header(fd, &h):
        return None
    _check_header(&h, name, info.st_size)
    return _map(cls, fd, name, info, &h, mode, True)


def _is_same(path, info):
    try:
        now = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return (now.st_dev, now.st_ino) == (info.st_dev, info.st_ino)


def _unlink_if_same(path, info):
    if _is_same(path, info):
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        except PermissionError:
            raise SegmentForbidden(
                f"{path}: has to be made anew, and only its owner (uid {info.st_uid}) may remove it"
            ) from None


cdef object _initialise(int fd, uint32_t slots, uint32_t leases, uint32_t mode):
    """Write a fresh segment into the file; the caller holds the init lock."""
    cdef uint64_t size = shmc_total_bytes(slots, leases)
    cdef shmc_header* h
    cdef bytes boot = _boot_id()
    os.fchmod(fd, mode)  # also where the one who made the file died before he could
    os.ftruncate(fd, 0)
    step(b"create.truncate")
    # Real pages now: a full file system then answers here, not with SIGBUS at some later store.
    os.posix_fallocate(fd, 0, size)
    step(b"create.allocate")
    h = <shmc_header*>c_mmap(NULL, sizeof(shmc_header), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
    if h == <void*>-1:
        raise MemoryError("mmap of a new segment's header failed")
    h.magic = SHMC_MAGIC  # first: what has our magic and is not ready was half-made by one of us
    step(b"create.magic")
    h.layout_major = SHMC_LAYOUT_MAJOR
    h.layout_minor = SHMC_LAYOUT_MINOR
    h.header_bytes = sizeof(shmc_header)
    h.signature = SHMC_SIGNATURE
    h.slots = slots
    h.leases = leases
    h.hot_offset = SHMC_TABLES_OFFSET
    h.record_offset = shmc_record_offset(slots)
    h.lease_offset = shmc_lease_offset(slots)
    h.meta_offset = shmc_meta_offset(slots, leases)
    h.total_bytes = size
    memcpy(h.boot_id, <const char*>boot, 16)
    h.creator_uid = os.geteuid()
    h.creator_pid = os.getpid()
    h.created_mono_ns = mono_ns()
    h.created_wall_ns = wall_ns()
    h.incarnation = int.from_bytes(os.urandom(8), "little") | 1
    h.mode = mode
    step(b"create.header")
    store_release_u32(&h.ready, SHMC_READY)
    step(b"create.ready")
    c_munmap(h, sizeof(shmc_header))


cdef object _map(type cls, int fd, str name, info, const shmc_header* h, mode, bint writable):
    """The mapping of a validated header. The caller closes its own descriptor.

    The mapping gets an open file description of its own, made and registered with the mutex that
    the fork handlers hold: no forked child can have a copy that they do not know of, in which this
    process's owner locks would outlive it.
    """
    global _making, _mappings
    cdef bint before
    cdef bytes again = b"/proc/self/fd/%d" % fd
    cdef const char* again_path = again
    cdef int err
    cdef Mapping self
    cdef mapping_t* m = <mapping_t*>calloc(1, sizeof(mapping_t))
    if m == NULL:
        raise MemoryError()
    before = _making
    _making = True
    try:
        self = cls.__new__(cls)
    finally:
        _making = before
    self.name = name
    self._created_wall_ns = h.created_wall_ns
    self._identity = (info.st_dev, info.st_ino)
    self._mode = mode
    m.time_ns_id = _time_namespace()
    m.size = h.total_bytes
    m.base = <char*>c_mmap(
        NULL, m.size, PROT_READ | (PROT_WRITE if writable else 0), MAP_SHARED, fd, 0
    )
    if m.base == <void*>-1:
        free(m)
        raise MemoryError(f"mmap of segment {name} failed")
    c_madvise(m.base, m.size, MADV_DONTFORK)
    m.writable = writable
    m.slots = h.slots
    m.leases = h.leases
    m.sync = <shmc_sync*>(m.base + SHMC_SYNC_OFFSET)
    m.bitmap = <uint64_t*>(m.base + SHMC_BITMAP_OFFSET)
    m.hot = <shmc_hot*>(m.base + SHMC_TABLES_OFFSET)
    m.record = <shmc_record*>(m.base + shmc_record_offset(m.slots))
    m.cells = <uint64_t*>(m.base + shmc_lease_offset(m.slots))
    m.meta = <shmc_meta*>(m.base + shmc_meta_offset(m.slots, m.leases))
    m.incarnation = h.incarnation
    m.state = MAPPING_OPEN
    pthread_mutex_lock(&_mappings_lock)
    m.fd = c_open(again_path, (O_RDWR if writable else O_RDONLY) | O_CLOEXEC)
    err = errno
    if m.fd >= 0:
        m.next = _mappings
        _mappings = m
    pthread_mutex_unlock(&_mappings_lock)
    if m.fd < 0:
        c_munmap(m.base, m.size)
        free(m)
        raise OSError(err, os.strerror(err), name)
    self.m = m
    return self


def segments():
    """Names of the segments that this user can read, sorted.

    Only whole segments of this layout count; other files in the directory are passed over.
    """
    cdef shmc_header h
    names = []
    for entry in os.scandir(DIRECTORY):
        if not _NAME.fullmatch(entry.name):
            continue
        try:
            fd = os.open(entry.path, os.O_RDONLY | _OPEN_FLAGS)
        except OSError:
            continue
        try:
            info = os.fstat(fd)
            if stat.S_ISREG(info.st_mode) and info.st_size > 0 and _read_header(fd, &h):
                _check_header(&h, entry.name, info.st_size)
                names.append(entry.name)
        except (SegmentCorrupt, LayoutMismatch, OSError):
            continue
        finally:
            os.close(fd)
    return sorted(names)
