# How many of a router's guesses are worth reading ahead: from what became of those that were read.
from libc.stdint cimport int64_t

# What became of a read, at its layer's turn; indices of ahead.OUTCOMES
cdef enum:
    AHEAD_IN_TIME      # wanted, and there
    AHEAD_LATE         # wanted, still on its way
    AHEAD_SPARE        # not wanted, and in nobody's way
    AHEAD_IN_THE_WAY   # not wanted, still on its way while the layer has reads of its own


cdef class AheadDepth:
    cdef readonly int64_t limit, depth
    cdef int64_t turn, next_try, pause
    cdef int64_t *counts       # [limit] outcomes seen of this rank since it was last judged
    cdef double *sums          # [limit] their worth

    cdef void note(self, int64_t rank, int outcome) noexcept nogil
    cdef void tick(self) noexcept nogil
