# cython: language_level=3, boundscheck=False, wraparound=False
"""Reading whole segments: one status, a snapshot, the same in bulk."""
from libc.stdint cimport uint32_t

from shmcoord._atomics cimport load_acquire_u32
from shmcoord._posix cimport mono_ns
from shmcoord.backend cimport make_backend
from shmcoord.cells cimport slot_is_alive
from shmcoord.liveness cimport Judge, reap_all
from shmcoord.segment cimport Mapping
from shmcoord.status cimport NodeInfo, Status, read_info, read_status, slot_is_live

from shmcoord.errors import NodeNotFound


cdef class Observer:
    """Reads one segment; keeps what nodes wrote once, per slot and generation, between readings.

    Args:
        mapping: the segment, read-only or not.
    """

    cdef Mapping mapping
    cdef Judge judge
    cdef list infos      # NodeInfo per slot, or None
    cdef dict by_name    # node name -> slot, a hint

    def __init__(self, Mapping mapping):
        self.mapping = mapping
        self.judge = Judge(mapping)
        self.infos = [None] * mapping.m.slots
        self.by_name = {}

    cdef NodeInfo _info(self, uint32_t slot):
        """What the node in this slot wrote at its claim; None if there is none."""
        cdef NodeInfo info = <NodeInfo>self.infos[slot]
        if info is not None and info.generation == load_acquire_u32(
            &self.mapping.m.hot[slot].generation
        ):
            return info if slot_is_live(self.mapping.m, slot) else None
        info = read_info(self.mapping.m, slot)
        self.infos[slot] = info
        if info is not None:
            if len(self.by_name) > 2 * self.mapping.m.slots:
                self.by_name.clear()  # names of nodes long gone
            self.by_name[info.node] = slot
        return info

    cdef Status _status(self, NodeInfo info):
        cdef double age_s = 0.0
        cdef int health = self.judge.health(info, mono_ns(), &age_s)
        return read_status(self.mapping.m, info, health, age_s)

    cdef NodeInfo _find(self, name):
        """The node of this name; of two, the one that lives (the other is dying)."""
        cdef NodeInfo info, found = None
        cdef uint32_t slot
        hint = self.by_name.get(name)
        if hint is not None:
            info = self._info(hint)
            if info is not None and info.node == name and slot_is_alive(self.mapping.m, hint):
                return info
        for slot in range(self.mapping.m.slots):
            info = self._info(slot)
            if info is not None and info.node == name:
                found = info
                if slot_is_alive(self.mapping.m, slot):
                    break
        if found is None:
            if not isinstance(name, str):
                raise TypeError(f"node name must be a str, not {type(name).__name__}")
            names = [status.node for status in self.snapshot()]
            raise NodeNotFound(
                f"no node {name!r} in segment {self.mapping.name}; "
                f"there are {', '.join(names) or 'none'}"
            )
        return found

    def snapshot(self):
        """The statuses of all nodes, by slot."""
        cdef uint32_t slot
        cdef NodeInfo info
        cdef Status status
        self.mapping.check()
        found = []
        for slot in range(self.mapping.m.slots):
            info = self._info(slot)
            if info is not None:
                status = self._status(info)
                if status is not None:
                    found.append(status)
        return tuple(found)

    def status(self, name):
        """The status of one node."""
        cdef Status status = None
        cdef int _attempt
        self.mapping.check()
        for _attempt in range(3):  # None: the slot changed hands while we read it
            status = self._status(self._find(name))
            if status is not None:
                return status
        raise NodeNotFound(f"node {name!r} is just leaving segment {self.mapping.name}")

    def backend(self, name):
        """A live handle on one node."""
        self.mapping.check()
        return make_backend(self.mapping, self._find(name))


def reap(Mapping mapping):
    """Give back what the dead held; returns slots and leases freed."""
    return reap_all(mapping)
