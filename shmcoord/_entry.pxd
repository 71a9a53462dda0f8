# What one host tells another of one node: words of 64 bits, little-endian.
#
#   0  slot:16 | gauges:8 | shares:8 | generation:32
#   1  cells taken:16 | state:4 | flags:4 | waiting:20 | in flight:20     (the load word, but cells
#      in place of the generation)
#   2  latency in us:32 | failures in a row:32
#   3  health: 0 alive, 1 suspect
#   4  resident memory, bytes
#   5  CPU, percent of a core          (binary64)
#   6  served
#   7  failed
#   8  latency, seconds                (binary64)
#   9  up since, ns
#   then the gauges                    (binary64), in the order of their names
#   then the shares: host id:24 | cells:12 | cost:28, one per host from which requests run there
#
# `origin.pyx` writes it, `mirror.pyx` reads it and believes nothing: counts are bounded by what
# was received, and each field by what the segment can hold.

cdef enum:
    E_WHO = 0
    E_LOAD = 1
    E_TROUBLE = 2
    E_HEALTH = 3
    E_MEMORY = 4
    E_CPU = 5
    E_SERVED = 6
    E_FAILED = 7
    E_LATENCY = 8
    E_UPTIME_NS = 9
    E_FIXED = 10       # words before the gauges
    E_SHARES_MAX = 255
    E_WORDS_MAX = 10 + 16 + 255
