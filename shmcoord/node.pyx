# cython: language_level=3, boundscheck=False, wraparound=False
"""The serving side: join, take requests, publish, drain, leave.

The owner of a slot is the only writer of its record, and the GIL makes the threads of the owner
one writer: nothing here runs Python code between the first and the last store of a publication.
"""
cimport cython
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from shmcoord._atomics cimport *
from shmcoord._layout cimport *
from shmcoord._posix cimport mono_ns, wall_ns
from shmcoord._steps cimport step
from shmcoord.cells cimport cell_cost, cell_make, notify_all
from shmcoord.lease cimport find_cell, free_cell, take_cell
from shmcoord.liveness cimport claim
from shmcoord.segment cimport MAPPING_FORKED, MAPPING_OPEN
from shmcoord.status cimport (
    bits_to_double,
    double_to_bits,
    record_write,
    state_of,
    word_add_inflight,
    word_inflight,
    word_waiting,
)

import logging

from shmcoord import status, update
from shmcoord.errors import LeaseLost, SegmentForbidden

_log = logging.getLogger("shmcoord.node")

# Smoothing of the latency: the gain of TCP's smoothed round-trip time, RFC 6298, section 2.
cdef double _GAIN = 1.0 / 8


def _check_text(what, value, most):
    if not isinstance(value, str):
        raise TypeError(f"{what} must be a str, not {type(value).__name__}")
    if not value or not value.isprintable():
        raise ValueError(f"{what} must be printable and not empty, not {value!r}")
    raw = value.encode("utf-8")
    if len(raw) > most:
        raise ValueError(f"{what} must be at most {most} bytes of UTF-8, not {len(raw)}")
    return raw


cdef void _put(char* target, bytes raw) noexcept:
    memcpy(target, <const char*>raw, len(raw))


# Set around the only places that make these objects: they are made of memory, never of arguments
# (and never by copying). Put back to what it was, since making one may run the garbage collector,
# and that anything.
cdef bint _making = False


cdef int fill_meta(shmc_meta* meta, Mapping segment, str name, str group, str endpoint,
                   object capacity, object weight, object interval_s, tuple gauges,
                   object slow_start_s) except -1:
    """Check what a node joins with and write it down, all but who it is."""
    memset(meta, 0, sizeof(shmc_meta))
    _put(meta.name, _check_text("node name", name, SHMC_NAME_BYTES - 1))
    _put(meta.group, _check_text("group", group, SHMC_NAME_BYTES - 1))
    _put(meta.endpoint, _check_text("endpoint", endpoint, SHMC_ENDPOINT_BYTES - 1))
    if capacity is None:
        capacity = segment.m.leases
    if not isinstance(capacity, int) or isinstance(capacity, bool):
        raise TypeError(f"capacity must be an int or None, not {type(capacity).__name__}")
    if not 1 <= capacity <= segment.m.leases:
        raise ValueError(
            f"capacity must be between 1 and the segment's {segment.m.leases} leases per node, "
            f"not {capacity}"
        )
    weight = float(weight)
    if not status.WEIGHT_MIN <= weight <= status.WEIGHT_MAX:
        raise ValueError(
            f"weight must be between {status.WEIGHT_MIN:g} and {status.WEIGHT_MAX:g}, not {weight}"
        )
    interval_s = float(interval_s)
    if not 0.001 <= interval_s <= 3600:
        raise ValueError(f"interval_s must be between 0.001 and 3600 seconds, not {interval_s}")
    slow_start_s = float(slow_start_s)
    if not 0 <= slow_start_s <= 3600:
        raise ValueError(f"slow_start_s must be between 0 and 3600 seconds, not {slow_start_s}")
    if len(gauges) > SHMC_GAUGES_MAX:
        raise ValueError(f"at most {SHMC_GAUGES_MAX} gauges, not {len(gauges)}")
    if len(set(gauges)) != len(gauges):
        raise ValueError("gauge names must differ")
    for i, gauge in enumerate(gauges):
        _put(meta.gauge_names[<int>i], _check_text("gauge name", gauge, SHMC_GAUGE_NAME_BYTES - 1))
        if not gauge.isidentifier():
            raise ValueError(f"gauge name {gauge!r} must be an identifier: publish({gauge}=...)")
    meta.capacity = capacity
    meta.weight = weight
    meta.interval_ns = <uint64_t>(interval_s * 1e9)
    meta.slow_start_ns = <uint64_t>(slow_start_s * 1e9)
    meta.gauge_count = <uint32_t>len(gauges)
    return 0


cdef int _refuse_mirror(Mapping segment) except -1:
    if load_seqcst_u64(&segment.m.sync.mirror) != 0:
        raise SegmentForbidden(
            f"{segment.name} mirrors a segment of another host: nodes join there; if that is no "
            "longer so, unlink it"
        )
    return 0


cdef Node join_node(Mapping segment, str name, str group, str endpoint, object capacity,
                    object weight, object interval_s, tuple gauges, object slow_start_s):
    global _making
    cdef bint before
    cdef shmc_meta meta
    cdef Node self
    cdef Participant participant
    segment.check()
    _refuse_mirror(segment)
    fill_meta(
        &meta, segment, name, group, endpoint, capacity, weight, interval_s, gauges, slow_start_s
    )

    participant = claim(segment, SHMC_KIND_NODE, &meta, name)
    try:
        _refuse_mirror(segment)  # a bridge marks it and then looks for us: one sees the other
    except SegmentForbidden:
        participant.leave()
        raise
    before = _making
    _making = True
    self = Node.__new__(Node)
    _making = before
    self.segment = segment
    self.participant = participant
    self.name = name
    self.group = group
    self.endpoint = endpoint
    self.capacity = meta.capacity
    self.weight = meta.weight
    self.interval_s = float(interval_s)
    self.gauge_index = {gauge: i for i, gauge in enumerate(gauges)}
    self.m = segment.m
    self.hot = &self.m.hot[participant.slot]
    self.record = &self.m.record[participant.slot]
    self.row = self.m.cells + <size_t>participant.slot * self.m.leases
    memset(self.words, 0, sizeof(self.words))
    self.words[SHMC_R_GENERATION] = participant.generation
    self.words[SHMC_R_STARTED_MONO_NS] = mono_ns()
    self.word_count = SHMC_R_GAUGES + <uint32_t>len(gauges)
    self.refresh()
    update.add(self)
    _log.info("node %s joined segment %s, group %s", name, segment.name, group)
    return self


@cython.no_gc_clear
cdef class Node:
    """A participant that serves requests; made by `Segment.join`.

    A context manager: leaving it gives back the slot.

    Attributes:
        name, group, endpoint, capacity, weight, interval_s: as joined.
        segment: the segment it joined.
        stale: whether the segment's name leads to other memory by now (unlinked, perhaps made
            anew): routers that come later do not see this node. Looked at once per interval.
    """

    def __cinit__(self):
        if not _making:
            raise TypeError("use Segment.join(name, ...)")

    cdef int check(self) except -1:
        if self.m.state != MAPPING_OPEN:
            self.segment.check()
        if self.participant.left:
            raise ValueError(f"node {self.name} has left segment {self.segment.name}")
        return 0

    # --- requests

    def begin(self):
        """Count one request that no router reserved; returns its handle for `end`.

        It takes a lease cell, so routers see it at once. If every cell is taken it is counted
        all the same: work that has arrived cannot be refused here.
        """
        cdef Request request
        self.check()
        request = _new_request()  # first: whoever holds a cell must be able to give it back
        self.run(request, SHMC_CELL_RUNNING, 1, self.participant.next_op())
        return request

    cdef void run(self, Request request, uint32_t state, uint32_t cost, uint32_t op) noexcept:
        """Begin a request for which no cell of this segment is reserved."""
        cdef uint64_t value = cell_make(
            state, self.participant.slot, self.participant.generation, cost, op
        )
        request.index = take_cell(self.row, 0, self.m.leases, value)
        request.value = value
        request.node = self
        step(b"begin.cas")
        if request.index < 0:
            add_seqcst_u64(&self.participant.entry.overflow, cost)
        word_add_inflight(self.hot, self.participant.generation, cost)
        step(b"begin.word")
        request.began_ns = mono_ns()

    def request(self):
        """The same as `begin`, to be used as `with node.request(): ...`."""
        return self.begin()

    def adopt(self, token):
        """Take over the lease that a request came with: call it before doing any of the work.

        Args:
            token: `lease.token`, as it travelled with the request.

        Returns:
            A handle like that of `begin`, also a context manager. From here the death of the
            router changes nothing, and this process's own death frees the lease.

        Raises:
            LeaseLost: the lease was reaped or released, adopted before, or never was one of this
                node; or it was reserved on another host, which did not know yet that this node
                takes no more. Refuse the request without doing anything: the router may send it
                elsewhere.
        """
        cdef uint64_t expected = 0
        cdef uint32_t cost = 0, host = 0
        cdef uint64_t value
        cdef uint64_t* cell
        cdef Request request
        self.check()
        if not isinstance(token, str):
            raise TypeError(f"token must be a str, not {type(token).__name__}")
        request = _new_request()
        try:
            cell = find_cell(
                self.segment, self.participant.slot, self.participant.generation, token, &expected,
                &cost, &host,
            )
            if cell == NULL:
                if self._stored_state() != SHMC_STATE_OPEN:
                    raise LeaseLost(f"node {self.name} takes no more requests from other hosts")
                self.run(request, SHMC_CELL_REMOTE, cost, host)
                return request
            value = cell_make(
                SHMC_CELL_RUNNING, self.participant.slot, self.participant.generation,
                cell_cost(expected), self.participant.next_op(),
            )
            if not cas_seqcst_u64(cell, expected, value):
                raise LeaseLost(
                    "the lease is no longer reserved: reaped, released, or adopted before"
                )
        except LeaseLost:
            add_seqcst_u64(&self.hot.refused, 1)
            raise
        step(b"adopt.cas")
        request.node = self
        request.index = <int>(cell - self.row)
        request.value = value
        request.began_ns = mono_ns()
        return request

    def end(self, handle, failed=False):
        """End a request that `begin` or `adopt` started.

        Args:
            handle: what it returned.
            failed: whether it counts as failed.

        Raises:
            ValueError: it was ended before, or is of another node.
        """
        if not isinstance(handle, Request):
            raise TypeError(f"handle must come from begin() or adopt(), not {handle!r}")
        if (<Request>handle).node is not self:
            raise ValueError("the request is of another node")
        handle.end(failed=failed)

    cdef void finish(self, int index, uint64_t value, uint64_t began_ns, bint failed) noexcept:
        """Free what a request took and publish the counters."""
        cdef double latency_s, smoothed
        if self.participant.left or self.m.state == MAPPING_FORKED:
            return  # leaving gave back everything
        if index >= 0:
            free_cell(
                self.m, self.hot, self.participant.generation, &self.row[index], value,
                cell_cost(value),
            )
        else:
            add_seqcst_u64(&self.participant.entry.overflow, <uint64_t>-<int64_t>cell_cost(value))
            word_add_inflight(
                self.hot, self.participant.generation, -<int64_t>cell_cost(value)
            )
        latency_s = (mono_ns() - began_ns) / 1e9
        smoothed = bits_to_double(self.words[SHMC_R_LATENCY_S])
        if self.words[SHMC_R_SERVED] == 0:
            smoothed = latency_s
        else:
            smoothed += _GAIN * (latency_s - smoothed)
        self.words[SHMC_R_LATENCY_S] = double_to_bits(smoothed)
        self.words[SHMC_R_SERVED] += 1
        if failed:
            self.words[SHMC_R_FAILED] += 1
            store_relaxed_u32(&self.hot.failures, load_relaxed_u32(&self.hot.failures) + 1)
        elif load_relaxed_u32(&self.hot.failures) != 0:
            store_relaxed_u32(&self.hot.failures, 0)
        self.show_latency(smoothed)
        self.publish_record()

    # --- publishing

    cdef void show_latency(self, double latency_s) noexcept:
        """Where policies read it, beside the load; at least 1 us, since 0 means unknown."""
        store_relaxed_u32(
            &self.hot.latency_us, <uint32_t>min(max(latency_s * 1e6, 1.0), 4e9)
        )

    cdef void publish_record(self) noexcept:
        self.words[SHMC_R_PUBLISHED_MONO_NS] = mono_ns()
        record_write(self.record, self.words, self.word_count)

    def publish(self, **gauges):
        """Publish user gauges (float64); all of one call become visible together.

        Raises:
            ValueError: a gauge that was not named at `join`.
        """
        self.check()
        # All conversions first: they may run Python code, and a wrong one must change nothing.
        values = []
        for name, value in gauges.items():
            index = self.gauge_index.get(name)
            if index is None:
                raise ValueError(
                    f"node {self.name} has no gauge {name!r}; it joined with "
                    f"gauges={tuple(self.gauge_index)!r}"
                )
            values.append((index, float(value)))
        for index, value in values:
            self.words[SHMC_R_GAUGES + <uint32_t>index] = double_to_bits(value)
        self.publish_record()

    def refresh(self):
        """Publish memory and CPU of this moment and move the progress stamp.

        The update thread calls it once per interval; a caller may do so at any time.
        """
        self.check()
        memory_bytes, cpu_percent = update.sample()
        if not self.stale and self.segment.is_stale():
            self.stale = True
            _log.warning(
                "segment %s was unlinked: node %s is seen only by those still attached; join again",
                self.segment.name, self.name,
            )
        self.check()
        self.forget_latency()
        self.words[SHMC_R_MEMORY_BYTES] = memory_bytes
        self.words[SHMC_R_CPU_PERCENT] = double_to_bits(cpu_percent)
        self.words[SHMC_R_PUBLISHED_WALL_NS] = wall_ns()
        self.publish_record()
        store_release_u64(&self.hot.progress_ns, mono_ns())

    cdef void forget_latency(self) noexcept:
        """Halve what policies see of a latency that no request has renewed for an interval.

        A node that was slow once and is avoided for it serves nothing that could show that it is
        fast again: so it is tried again after a while. One that works on something is not avoided.
        """
        cdef uint32_t latency_us = load_relaxed_u32(&self.hot.latency_us)
        if self.words[SHMC_R_SERVED] != self.served_before:
            self.served_before = self.words[SHMC_R_SERVED]
        elif latency_us > 1 and word_inflight(load_relaxed_u64(&self.hot.load)) == 0:
            store_relaxed_u32(&self.hot.latency_us, latency_us // 2)

    @property
    def waiting(self):
        """Work queued inside the process, in requests; set it whenever it changes."""
        self.check()
        return word_waiting(load_relaxed_u64(&self.hot.load))

    @waiting.setter
    def waiting(self, value):
        cdef uint64_t word, moved, waiting
        self.check()
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"waiting must be an int, not {type(value).__name__}")
        if value < 0:
            raise ValueError(f"waiting must not be negative, not {value}")
        waiting = min(value, SHMC_FIELD_MAX)
        while True:
            word = load_relaxed_u64(&self.hot.load)
            moved = (word & ~(<uint64_t>SHMC_FIELD_MAX << 20)) | waiting << 20
            if cas_seqcst_u64(&self.hot.load, word, moved):
                return

    @property
    def busy(self):
        """Whether the process is busy with work of its own; set it to be passed over for IDLE."""
        self.check()
        return bool(load_relaxed_u64(&self.hot.load) >> 40 & SHMC_FLAG_BUSY)

    @busy.setter
    def busy(self, value):
        cdef uint64_t word, moved
        cdef uint64_t bit = <uint64_t>SHMC_FLAG_BUSY << 40
        self.check()
        while True:
            word = load_relaxed_u64(&self.hot.load)
            moved = word | bit if value else word & ~bit
            if cas_seqcst_u64(&self.hot.load, word, moved):
                return

    @property
    def inflight(self):
        """Requests reserved for this node and running in it, in units of cost.

        Counted from the lease cells: 0 after `drain` means that nothing is left and nothing comes.
        """
        cdef uint64_t cell, total
        cdef uint32_t i
        self.check()
        total = load_relaxed_u64(&self.participant.entry.overflow)
        for i in range(self.m.leases):
            cell = load_seqcst_u64(&self.row[i])
            if cell != 0:
                total += cell_cost(cell)
        return total

    @property
    def served(self):
        """Requests ended, failed ones included."""
        return self.words[SHMC_R_SERVED]

    @property
    def failed(self):
        """Requests ended that failed."""
        return self.words[SHMC_R_FAILED]

    @property
    def latency_s(self):
        """Smoothed time of a request from begin to end, seconds."""
        return bits_to_double(self.words[SHMC_R_LATENCY_S])

    @property
    def refused(self):
        """Requests refused because their lease was lost."""
        self.check()
        return load_relaxed_u64(&self.hot.refused)

    # --- states

    cdef void set_state(self, uint32_t state) noexcept:
        cdef uint64_t word, moved
        while True:
            word = load_relaxed_u64(&self.hot.load)
            moved = (word & ~(<uint64_t>0xF << 44)) | <uint64_t>state << 44
            if cas_seqcst_u64(&self.hot.load, word, moved):
                return

    cdef uint32_t _stored_state(self) noexcept:
        return <uint32_t>(load_relaxed_u64(&self.hot.load) >> 44) & 0xF

    @property
    def state(self):
        """`State` as others see it."""
        self.check()
        return state_of(load_relaxed_u64(&self.hot.load))

    def drain(self):
        """Take no new work and finish the old: routers pass the node over from here on."""
        self.check()
        if self._stored_state() == SHMC_STATE_SHUTDOWN:
            raise ValueError(f"node {self.name} is shut down; it cannot drain")
        self.set_state(SHMC_STATE_DRAINING)
        step(b"drain.state")
        _log.info("node %s drains", self.name)

    def resume(self):
        """Take work again after `drain`."""
        self.check()
        if self._stored_state() == SHMC_STATE_SHUTDOWN:
            raise ValueError(f"node {self.name} is shut down; join again")
        self.set_state(SHMC_STATE_OPEN)
        notify_all(self.m)  # capacity has come back
        _log.info("node %s resumes", self.name)

    def shutdown(self):
        """Show SHUTDOWN while the slot is kept; `leave` gives it back."""
        self.check()
        self.set_state(SHMC_STATE_SHUTDOWN)

    def leave(self):
        """Give back the slot and all leases on this node. Does nothing the second time."""
        if self.participant.left:
            return
        if self.m.state == MAPPING_FORKED:
            self.segment.check()
        self.set_state(SHMC_STATE_SHUTDOWN)
        self.participant.leave()
        _log.info("node %s left segment %s", self.name, self.segment.name)

    @property
    def left(self):
        """Whether it has left."""
        return self.participant.left

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.leave()

    def __repr__(self):
        if self.participant.left:
            return f"<Node {self.name} of {self.group}, left>"
        return f"<Node {self.name} of {self.group} in {self.segment.name}>"


cdef inline Request _new_request():
    global _making
    cdef bint before
    cdef Request request
    before = _making
    _making = True
    request = Request.__new__(Request)
    _making = before
    return request


@cython.no_gc_clear  # __dealloc__ needs the node
cdef class Request:
    """One running request: the handle of `Node.begin` and `Node.adopt`.

    A context manager; an exception that leaves it makes the request a failed one. A handle that is
    dropped without being ended is ended, as failed, when it is collected.
    """

    def __cinit__(self):
        if not _making:
            raise TypeError("use Node.begin(), Node.request() or Node.adopt(token)")

    def __dealloc__(self):
        if self.node is not None and not self.ended:
            self.node.finish(self.index, self.value, self.began_ns, True)

    @property
    def elapsed_s(self):
        """Since it began, seconds."""
        return (mono_ns() - self.began_ns) / 1e9

    def end(self, failed=False):
        """End it.

        Raises:
            ValueError: it was ended before.
        """
        if self.node.m.state == MAPPING_FORKED:
            self.node.segment.check()
        if self.ended:
            raise ValueError("the request was ended before")
        self.ended = True
        self.node.finish(self.index, self.value, self.began_ns, bool(failed))

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if not self.ended:
            self.end(failed=kind is not None)


def join_segment(Mapping segment, name, group, endpoint, capacity, weight, interval_s, gauges,
                 slow_start_s):
    """`Segment.join`."""
    for what, value in (("node name", name), ("group", group), ("endpoint", endpoint)):
        if not isinstance(value, str):
            raise TypeError(f"{what} must be a str, not {type(value).__name__}")
    if isinstance(gauges, str):
        raise TypeError("gauges must be several names, not one str")
    return join_node(
        segment, name, group, endpoint, capacity, weight, interval_s, tuple(gauges), slow_start_s
    )
