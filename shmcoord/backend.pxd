from shmcoord._layout cimport shmc_hot
from shmcoord.segment cimport Mapping, mapping_t
from shmcoord.status cimport NodeInfo


cdef class Backend:
    cdef readonly Mapping mapping
    cdef readonly NodeInfo info
    cdef mapping_t* m
    cdef shmc_hot* hot
    cdef tuple _key(self)

cdef Backend make_backend(Mapping mapping, NodeInfo info)
