"""How many of a router's guesses are worth reading ahead, and whether any are.

The unit is the rank of a guess: the router's first choice is right more often than its last, and is read first, so of
the ranks a first part is worth it. Each rank is judged by what became of its reads. What that can't tell is what the
device's idle time is worth, so whether to read ahead at all is tried. Pure arithmetic: no clock, no I/O.
"""

from libc.stdlib cimport calloc, free

OUTCOMES = ("in time", "late", "spare", "in the way")

cdef enum:
    WINDOW = 32            # outcomes of a rank until it is judged
    TRIAL = 64             # turns until the next rank is tried, when all is well
    LONGEST_PAUSE = 8192   # turns; 170 tokens of a model of 48 layers
    ROUND = 48             # experts read in a quarter of a trial
    LONGEST = 4096         # experts read until the next trial

# In reads of an expert that somebody would have waited for. Late: its read began a little earlier than it would have;
# where all are late the device has no time to spare, and only what is nearly always right may go on. Spare: the bytes,
# and what had to make room for them. In the way: a read of the layer's own waited for it.
cdef double *WORTH = [1.0, 0.1, -0.1, -1.0]

# Reading ahead reads some 10 % more, and has to save that much of the waiting.
cdef double ENOUGH = 0.9

# Of the time in which experts are computed, a tenth of a step: who waits less has nothing to gain that a trial is worth.
cdef double LITTLE = 0.25


cdef class AheadDepth:
    """`depth` ranks of at most `limit` are read ahead, at first all.

    A rank whose last WINDOW reads were not worth it is given up, and those behind it with it. It is tried again after a
    pause that doubles each time that it fails; so reading ahead that never pays costs next to nothing, at depth 0 not
    even the guess, and comes back where it begins to pay.
    """

    def __cinit__(self, int64_t limit):
        self.limit = self.depth = limit
        self.pause = self.next_try = TRIAL
        self.counts = <int64_t *>calloc(limit + 1, sizeof(int64_t))
        self.sums = <double *>calloc(limit + 1, sizeof(double))
        if self.counts is NULL or self.sums is NULL:
            raise MemoryError("no memory for the prefetcher")

    def __dealloc__(self):
        free(self.counts)
        free(self.sums)

    cdef void note(self, int64_t rank, int outcome) noexcept nogil:
        cdef bint worth
        cdef int64_t r
        if rank >= self.depth:
            return                         # it was given up while it was under way
        self.counts[rank] += 1
        self.sums[rank] += WORTH[outcome]
        if self.counts[rank] < WINDOW:
            return
        worth = self.sums[rank] > 0
        self.counts[rank], self.sums[rank] = 0, 0
        if not worth:
            for r in range(rank, self.depth):
                self.counts[r], self.sums[r] = 0, 0
            self.depth = rank
            self.next_try = self.turn + self.pause
            self.pause = min(2 * self.pause, <int64_t>LONGEST_PAUSE)
        elif rank == self.depth - 1:
            self.pause = TRIAL

    cdef void tick(self) noexcept nogil:
        self.turn += 1
        if self.depth < self.limit and self.turn >= self.next_try:
            self.depth += 1
            self.next_try = self.turn + TRIAL

    def note_py(self, int64_t rank, str outcome):
        """What became of a read of this rank, 0 for the likeliest guess: one of OUTCOMES."""
        self.note(rank, OUTCOMES.index(outcome))

    def tick_py(self):
        """A layer has had its turn."""
        self.tick()


cdef class AheadSwitch:
    """`on`: whether to read ahead at all. What waits less goes on, and now and then the other way is tried.

    The measure is the time waited for reads per expert that was not in memory before, whoever had it read, so it hangs
    little on what a text happens to want. Reading ahead makes that less where the device would have idled. It does not
    where the device is paid by the byte: a throttled volume gives back later what was not used.

    A trial is a round, two the other way, and one as before, so that what drifts meanwhile, as misses do while the
    cache fills, weighs the same on both sides. Evidence counts half at every further trial, and trials become rarer as
    long as they say the same. Where next to nothing is waited in the first round, reading ahead goes on without one.
    """

    def __cinit__(self):
        self.on, self.little = True, LITTLE
        self.stage, self.due, self.length = 1, ROUND, ROUND

    cdef void note(self, int64_t reads, int64_t waited, int64_t computed) noexcept nogil:
        self.seen += reads
        self.round_waited += waited
        self.round_computed += computed
        if self.stage:
            self.reads[self.on] += reads
            self.waited[self.on] += waited

    cdef void begin_step(self) noexcept nogil:
        if self.seen < self.due:
            return
        cdef bint idle = self.stage == 1 and self.on and self.round_waited < self.little * self.round_computed
        self.seen = self.round_waited = self.round_computed = 0
        self.stage = 0 if idle else (self.stage + 1) % 4
        if self.stage:
            if self.stage > 1:
                self.on = not self.on
            self.due = 2 * ROUND if self.stage == 2 else ROUND
        else:
            if not idle:
                self.decide()
            self.forget()
            self.due = self.length

    cdef void decide(self) noexcept nogil:
        cdef bint pays = self.waited[True] * self.reads[False] < ENOUGH * self.waited[False] * self.reads[True]
        self.length = min(4 * self.length, <int64_t>LONGEST) if pays == self.on else 4 * ROUND
        self.on = pays

    cdef void forget(self) noexcept nogil:
        cdef int i
        for i in range(2):
            self.reads[i] /= 2
            self.waited[i] /= 2

    def note_py(self, int64_t reads, int64_t waited, int64_t computed=0):
        """A layer has had its turn: so many experts had to be read for it, for which it waited so many ns.

        computed: ns in which its experts were multiplied.
        """
        self.note(reads, waited, computed)

    def begin_step_py(self):
        """The first layer's turn is next: what has begun with a step ends with one, as layers differ."""
        self.begin_step()
