# cython: language_level=3, boundscheck=False, wraparound=False
"""Reserve, release and find lease cells.

A lease is one word of shared memory. Its claim and its owner become visible in one CAS, which is
why nothing leaks when anybody dies between two steps:

1. reserve: CAS free -> RESERVED(router); look at the node's state again, and free the cell if it
   no longer takes work.
2. adopt (`Node.adopt`): the token of the lease travels with the request; the node CASes
   RESERVED(router) -> RUNNING(node). If that fails, the lease was reaped, and the node refuses
   before it does anything.
3. free: CAS from the exact own value to free.
4. sweep (`liveness.sweep_row`): CAS the cells of dead owners to free.
"""
cimport cython

from shmcoord._steps cimport step
from shmcoord.segment cimport MAPPING_FORKED
from shmcoord.status cimport NodeInfo

from shmcoord.errors import LeaseLost, LeaseReleased

COST_MAX = SHMC_COST_MAX


# Set around the only places that make these objects: they are made of memory, never of arguments
# (and never by copying). Put back to what it was, since making one may run the garbage collector,
# and that anything.
cdef bint _making = False


cdef bint _has_room(const shmc_hot* hot, const uint64_t* row, uint32_t capacity) noexcept nogil:
    """Whether a mirrored node has a free cell that is not owed to requests of other hosts.

    Two routers that ask at once may both find the last one; the cells themselves stay exact.
    """
    cdef uint64_t owed = load_seqcst_u64(&hot.owed), free = 0
    cdef uint32_t i
    if owed == 0:
        return True
    for i in range(capacity):
        free += load_relaxed_u64(&row[i]) == 0
    return free > owed


cdef Lease reserve(Backend backend, Participant owner, uint32_t cost, bint* full):
    """A lease on the node, or None: `full` tells whether for want of a cell or of an open node."""
    global _making
    cdef bint before
    cdef mapping_t* m = backend.m
    cdef shmc_hot* hot = backend.hot
    cdef uint64_t* row = m.cells + <size_t>backend.info.slot * m.leases
    cdef uint64_t value = cell_make(
        SHMC_CELL_RESERVED, owner.slot, owner.generation, cost, owner.next_op()
    )
    cdef int index
    cdef Lease lease
    if backend.info.origin_incarnation != 0 and not _has_room(hot, row, backend.info.capacity):
        full[0] = True
        return None
    # The object first: whoever holds a cell must be able to give it back.
    before = _making
    _making = True
    lease = Lease.__new__(Lease)
    _making = before
    index = take_cell(row, 0, backend.info.capacity, value)
    full[0] = index < 0
    if index < 0:
        return None
    step(b"reserve.cas")
    if not is_open(hot, backend.info.generation):
        cas_seqcst_u64(&row[index], value, 0)
        return None
    step(b"reserve.recheck")
    word_add_inflight(hot, backend.info.generation, cost)
    step(b"reserve.word")
    lease.backend = backend
    lease.owner = owner
    lease.hot = hot
    lease.cell = &row[index]
    lease.index = <uint32_t>index
    lease.value = value
    lease.cost = cost
    return lease


cdef uint64_t* find_cell(Mapping mapping, uint32_t slot, uint32_t generation, str token,
                         uint64_t* value, uint32_t* cost, uint32_t* host) except? NULL:
    """The cell that a token names, if the token is of this node, and the value it should have.

    NULL if the lease was reserved on another host, in its mirror of this segment: then `cost` is
    its cost and `host` that host's id.

    Raises:
        LeaseLost: not a token, or one of another segment, node or generation.
    """
    cdef mapping_t* m = mapping.m
    cdef bint is_remote
    parts = token.split("-")
    numbers = []
    is_remote = parts[0] == "2"
    if len(parts) == 6 and (is_remote or parts[0] == "1") and token.isascii():
        for part in parts[1:]:
            if not part or len(part) > 16 or not part.isalnum():
                break
            try:
                numbers.append(int(part, 16))
            except ValueError:
                break
    if len(numbers) != 5:
        raise LeaseLost(f"not a lease token: {token[:80]!r}")
    incarnation, node, node_generation, index, expected = numbers
    if incarnation != m.incarnation:
        raise LeaseLost(
            f"the lease is of another segment than {mapping.name} as it is now (made anew since?)"
        )
    if node != slot or node_generation != generation:
        raise LeaseLost("the lease is of another node, or of an earlier process of this one")
    if is_remote:
        if not 1 <= index <= SHMC_OP_MAX or not 1 <= expected <= SHMC_COST_MAX:
            raise LeaseLost("the token names no host, or no cost")
        host[0] = index
        cost[0] = expected
        return NULL
    if index >= m.leases:
        raise LeaseLost("the lease is of another node, or of an earlier process of this one")
    if cell_state(expected) != SHMC_CELL_RESERVED:
        raise LeaseLost("the token does not name a reservation")
    value[0] = expected
    return m.cells + <size_t>slot * m.leases + <size_t>index


@cython.no_gc_clear  # __dealloc__ needs the owner and the backend
cdef class Lease:
    """One reserved unit of a node's capacity, from pick to completion.

    A context manager: leaving it releases. A lease that is dropped without being released is
    released when it is collected.

    Attributes:
        backend: the node, as a live handle.
        cost: what it counts for in the node's queue.
        released: whether `release` was called.
        decision: the `Decision` behind it, if it was acquired with `explain=True`.
    """

    def __cinit__(self):
        if not _making:
            raise TypeError("use Router.acquire(group)")

    def __dealloc__(self):
        if self.owner is None or self.released or self.owner.mapping.m.state == MAPPING_FORKED:
            return
        if not self.owner.left:
            self._free()

    cdef bint _free(self) noexcept:
        self.released = True
        return free_cell(
            self.owner.mapping.m, self.hot, self.backend.info.generation, self.cell, self.value,
            self.cost,
        )

    @property
    def node(self):
        return self.backend.info.node

    @property
    def group(self):
        return self.backend.info.group

    @property
    def endpoint(self):
        return self.backend.info.endpoint

    @property
    def token(self):
        """ASCII text that travels with the request and lets the node adopt the lease."""
        cdef NodeInfo info = self.backend.info
        if info.origin_incarnation:
            return (
                f"2-{info.origin_incarnation:x}-{info.origin_slot:x}-{info.origin_generation:x}-"
                f"{load_relaxed_u64(&self.owner.mapping.m.sync.mirror):x}-{self.cost:x}"
            )
        return (
            f"1-{self.owner.mapping.m.incarnation:x}-{self.backend.info.slot:x}-"
            f"{self.backend.info.generation:x}-{self.index:x}-{self.value:x}"
        )

    def release(self):
        """Give the unit back.

        Returns:
            True if this call freed it: then no node has adopted it, and none can any more. False
            if a node has adopted it meanwhile (the node frees it), or it was reaped; and always if
            the node is on another host, since what it has begun cannot be seen from here.

        Raises:
            LeaseReleased: it was released before.
            ForkedHandle: it belongs to the parent process, which still holds it.
        """
        if self.owner.mapping.m.state == MAPPING_FORKED:
            self.owner.mapping.check()
        if self.released:
            raise LeaseReleased(f"the lease on {self.backend.info.node} was released before")
        if self.owner.left:  # the router was closed, which gave back all that it held
            self.released = True
            return False
        return self._free() and self.backend.info.origin_incarnation == 0

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        if not self.released:
            self.release()

    def __repr__(self):
        word = "released" if self.released else "held"
        return f"<Lease on {self.backend.info.node}, {word}>"
