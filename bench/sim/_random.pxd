# Random numbers of the simulation: a small generator with a long period, and what is drawn from it.
from libc.math cimport exp, log, sqrt
from libc.stdint cimport uint32_t, uint64_t


cdef struct random_t:
    uint64_t s[4]
    double spare       # the second of a pair of normal numbers
    bint has_spare


cdef inline uint64_t mix(uint64_t x) noexcept nogil:
    """SplitMix64 (Steele, Lea and Flood 2014): well spread, and never the same for two inputs."""
    x += 0x9E3779B97F4A7C15u
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu
    return x ^ (x >> 31)


cdef inline void random_seed(random_t* r, uint64_t seed, uint64_t stream) noexcept nogil:
    """Start one of several independent streams of a seed."""
    cdef int i
    cdef uint64_t x = mix(mix(seed) ^ stream)
    for i in range(4):
        x = mix(x)
        r.s[i] = x
    r.has_spare = False


cdef inline uint64_t _rotate(uint64_t x, int k) noexcept nogil:
    return (x << k) | (x >> (64 - k))


cdef inline uint64_t random_u64(random_t* r) noexcept nogil:
    """xoshiro256++ (Blackman and Vigna 2019)."""
    cdef uint64_t result = _rotate(r.s[0] + r.s[3], 23) + r.s[0]
    cdef uint64_t t = r.s[1] << 17
    r.s[2] ^= r.s[0]
    r.s[3] ^= r.s[1]
    r.s[1] ^= r.s[2]
    r.s[0] ^= r.s[3]
    r.s[2] ^= t
    r.s[3] = _rotate(r.s[3], 45)
    return result


cdef inline double random_unit(random_t* r) noexcept nogil:
    """Uniform in (0, 1]: safe to take the logarithm of."""
    return ((random_u64(r) >> 11) + 1) * (1.0 / 9007199254740992.0)


cdef inline uint32_t random_below(random_t* r, uint32_t n) noexcept nogil:
    """Uniform in [0, n), up to n / 2^32."""
    return <uint32_t>(((random_u64(r) >> 32) * n) >> 32)


cdef inline double random_exponential(random_t* r) noexcept nogil:
    """Of mean 1."""
    return -log(random_unit(r))


cdef inline double random_normal(random_t* r) noexcept nogil:
    """Of mean 0 and variance 1: the polar method (Marsaglia and Bray 1964)."""
    cdef double u, v, s
    if r.has_spare:
        r.has_spare = False
        return r.spare
    while True:
        u = 2.0 * random_unit(r) - 1.0
        v = 2.0 * random_unit(r) - 1.0
        s = u * u + v * v
        if 0.0 < s < 1.0:
            break
    s = sqrt(-2.0 * log(s) / s)
    r.spare = v * s
    r.has_spare = True
    return u * s


cdef inline double random_lognormal(random_t* r, double sigma) noexcept nogil:
    """Of mean 1; `sigma` is the standard deviation of the logarithm."""
    return exp(sigma * random_normal(r) - 0.5 * sigma * sigma)
