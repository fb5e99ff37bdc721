# How much to read ahead: which of a router's guesses, from what became of those that were read; and whether at all.
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


cdef class AheadSwitch:
    cdef readonly bint on
    cdef public double little  # part of the time in which experts are computed: who waits less makes no trial
    cdef int stage             # 0: no trial, 1..3: its first round, the other way, its last round
    cdef int64_t seen, due     # experts read in this stage, and until the next
    cdef int64_t round_waited, round_computed    # ns, in this stage
    cdef int64_t length        # of stage 0
    cdef readonly double reads[2]   # by `on`: experts that had to be read in trials
    cdef readonly double waited[2]  # and ns waited for reads

    cdef void note(self, int64_t reads, int64_t waited, int64_t computed) noexcept nogil
    cdef void begin_step(self) noexcept nogil
    cdef void decide(self) noexcept nogil
    cdef void forget(self) noexcept nogil
