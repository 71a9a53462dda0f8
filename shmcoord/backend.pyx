# cython: language_level=3, boundscheck=False, wraparound=False
"""A live handle on one node: what is fixed is cached, what moves is read at each access."""
cimport cython
from libc.stdint cimport uint64_t

from shmcoord._atomics cimport load_acquire_u32, load_relaxed_u32, load_relaxed_u64
from shmcoord.cells cimport death_is_alive
from shmcoord.segment cimport MAPPING_OPEN
from shmcoord.status cimport STATE_SHUTDOWN, state_enum, state_of, word_generation, word_queue


# Set around the only places that make these objects: they are made of memory, never of arguments
# (and never by copying). Put back to what it was, since making one may run the garbage collector,
# and that anything.
cdef bint _making = False


cdef Backend make_backend(Mapping mapping, NodeInfo info):
    global _making
    cdef bint before
    cdef Backend self
    before = _making
    _making = True
    self = Backend.__new__(Backend)
    _making = before
    self.mapping = mapping
    self.m = mapping.m
    self.info = info
    self.hot = &mapping.m.hot[info.slot]
    return self


@cython.no_gc_clear  # a Lease that dies in the same garbage cycle still needs `info`
cdef class Backend:
    """A node as routers see it.

    `node`, `group`, `endpoint`, `capacity` and `weight` are what it joined with; `queue`, `state`
    and `alive` are read from shared memory at each access. Once the node has left (or its slot was
    given to another) they read 0, SHUTDOWN and False for ever.
    """

    def __cinit__(self):
        if not _making:
            raise TypeError("use Segment.backend(node_name) or Router.pick(group)")

    @property
    def node(self):
        return self.info.node

    @property
    def group(self):
        return self.info.group

    @property
    def endpoint(self):
        return self.info.endpoint

    @property
    def capacity(self):
        return self.info.capacity

    @property
    def weight(self):
        return self.info.weight

    @property
    def segment(self):
        """Name of the segment that the node is in."""
        return self.mapping.name

    @property
    def queue(self):
        """Waiting + in flight, now (one load, ns)."""
        cdef uint64_t word
        if self.m.state != MAPPING_OPEN:
            self.mapping.check()
        word = load_relaxed_u64(&self.hot.load)
        if word_generation(word) != (self.info.generation & 0xFFFF):
            return 0
        return word_queue(word)

    @property
    def state(self):
        """`State` now."""
        cdef uint64_t word
        self.mapping.check()
        word = load_relaxed_u64(&self.hot.load)
        if word_generation(word) != (self.info.generation & 0xFFFF):
            return state_enum(STATE_SHUTDOWN)
        return state_of(word)

    @property
    def alive(self):
        """Whether its process lives, by the mark of the kernel."""
        self.mapping.check()
        return (
            load_relaxed_u32(&self.hot.generation) == self.info.generation
            and death_is_alive(load_acquire_u32(&self.hot.death))
        )

    def __eq__(self, other):
        if not isinstance(other, Backend):
            return NotImplemented
        return self._key() == (<Backend>other)._key()

    def __hash__(self):
        return hash(self._key())

    cdef tuple _key(self):
        """The same for every handle on this node, through whichever mapping."""
        return self.m.incarnation, self.info.slot, self.info.generation

    def __repr__(self):
        return f"<Backend {self.info.node} of {self.info.group} at {self.info.endpoint}>"
