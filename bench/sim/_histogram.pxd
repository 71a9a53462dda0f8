# A histogram of times: 128 buckets per octave, so that a bucket is less than 0.8 % wide. As in an
# HDR histogram, but the bucket is read off the bits of the floating-point number.
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcpy

cdef enum:
    SUB_BITS = 7
    LOWEST = 1023 - 24      # exponent of the first octave, as the bits have it: 60 ns
    OCTAVES = 48
    BUCKETS = OCTAVES << SUB_BITS


cdef inline uint32_t bucket_of(double value) noexcept nogil:
    cdef uint64_t bits
    cdef int64_t index
    memcpy(&bits, &value, 8)
    index = <int64_t>(bits >> (52 - SUB_BITS)) - (LOWEST << SUB_BITS)
    if index < 0:
        return 0
    return <uint32_t>(index if index < BUCKETS else BUCKETS - 1)


cdef inline double bucket_low(uint32_t index) noexcept nogil:
    """The smallest value of a bucket; that of the next one is its end."""
    cdef uint64_t bits = (<uint64_t>index + (<uint64_t>LOWEST << SUB_BITS)) << (52 - SUB_BITS)
    cdef double value
    memcpy(&value, &bits, 8)
    return value


cdef inline double histogram_quantile(const uint64_t* counts, uint64_t total,
                                      double q) noexcept nogil:
    """The value below which the part `q` of all values is; between the ends of its bucket."""
    cdef double low, rank = q * total
    cdef uint64_t before = 0
    cdef uint32_t i
    for i in range(<uint32_t>BUCKETS):
        if counts[i] and before + counts[i] >= rank:
            low = bucket_low(i)
            return low + (bucket_low(i + 1) - low) * (rank - before) / counts[i]
        before += counts[i]
    return 0.0
