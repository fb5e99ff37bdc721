# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""What steps take by their number of tokens, and how many drafted tokens pay by that. Pure arithmetic."""

from cpython.mem cimport PyMem_Calloc, PyMem_Free, PyMem_Realloc
from libc.math cimport fabs
from libc.string cimport memcpy, memset

cdef long long FORGOTTEN = 200   # steps until a price is tried anew: what was dear in a cold cache, or by accident
cdef double SLOPE = 0.4          # one more token, in steps of one token, as long as nothing else is known
cdef double MOVED = 0.02         # a median that changed by less changes nothing
cdef double WORTH = 1.03         # a step with drafts must look this much better than one without
# Of what is known of waits, the part that one more step replaces; and a wait that is none, seconds.
cdef double PRESENT = 0.2
cdef double NO_WAIT = 1e-6
# Of how much dearer an expert of a drafted token is than others, the part that one more step replaces; and its bounds.
cdef double LEARNT = 0.1
cdef double DEARER = 1.3        # at first
cdef double CHEAPEST = 0.5
cdef double DEAREST = 4.0


cdef class Curve:
    cdef const double *line(self, Py_ssize_t most) except NULL:
        raise NotImplementedError

    cdef Py_ssize_t widest(self) noexcept:
        return 0

    def curve(self, Py_ssize_t most):
        cdef const double *seconds = self.line(most)
        return [seconds[tokens] for tokens in range(most + 1)]


cdef class Costs(Curve):
    def __cinit__(self, double most=0):
        self.most = most
        self.widths, self.drawn = NULL, NULL
        self.capacity = self.known = self.length = 0
        self.steps, self.due = 0, FORGOTTEN

    def __dealloc__(self):
        PyMem_Free(self.widths)
        PyMem_Free(self.drawn)

    cdef int reserve(self, Py_ssize_t tokens) except -1:
        cdef Py_ssize_t capacity = max(2 * self.capacity, <Py_ssize_t>32)
        cdef void *moved
        if tokens < 0:
            raise ValueError(f"a step of {tokens} tokens")
        if tokens < self.capacity:
            return 0
        while capacity <= tokens:
            capacity *= 2
        moved = PyMem_Realloc(self.widths, capacity * sizeof(Width))
        if moved == NULL:
            raise MemoryError("costs of steps")
        self.widths = <Width *>moved
        moved = PyMem_Realloc(self.drawn, capacity * sizeof(double))
        if moved == NULL:
            raise MemoryError("costs of steps")
        self.drawn = <double *>moved
        memset(&self.widths[self.capacity], 0, (capacity - self.capacity) * sizeof(Width))
        self.capacity = capacity
        return 0

    def observe(self, Py_ssize_t tokens, double seconds):
        self.learn(tokens, seconds)

    cdef int learn(self, Py_ssize_t tokens, double seconds) except -1:
        cdef double[LATEST] ordered
        cdef double middle, before
        cdef Py_ssize_t i, place
        cdef Width *width
        self.reserve(tokens)
        self.older()
        width = &self.widths[tokens]
        if width.count == 0:
            if self.known:                 # the first one may touch memory that no other has
                width.latest[0] = self.at(tokens)
                width.count = 1
            width.place, width.middle = width.count, 0
            self.known += 1
        width.latest[width.place] = seconds
        width.place = (width.place + 1) % LATEST
        width.count = min(width.count + 1, <Py_ssize_t>LATEST)
        width.at = self.steps
        for i in range(width.count):
            place = i
            while place and ordered[place - 1] > width.latest[i]:
                ordered[place] = ordered[place - 1]
                place -= 1
            ordered[place] = width.latest[i]
        middle, before = ordered[(width.count - 1) // 2], width.middle
        if fabs(middle - before) > MOVED * before:
            width.middle = middle
            self.length = 0
        return 0

    def age(self):
        self.older()

    cdef void older(self) noexcept:
        cdef Py_ssize_t tokens
        cdef long long oldest
        self.steps += 1
        if self.steps <= self.due:
            return
        oldest = self.steps
        for tokens in range(self.capacity):
            if self.widths[tokens].count and self.steps - self.widths[tokens].at > FORGOTTEN:
                self.widths[tokens].count = 0
                self.known -= 1
                self.length = 0
            if self.widths[tokens].count:
                oldest = min(oldest, self.widths[tokens].at)
        self.due = oldest + FORGOTTEN

    def __contains__(self, Py_ssize_t tokens):
        return 0 <= tokens < self.capacity and self.widths[tokens].count > 0

    def __call__(self, Py_ssize_t tokens):
        return self.at(tokens)

    cdef double at(self, Py_ssize_t tokens) except? -1:
        if 0 <= tokens < self.capacity and self.widths[tokens].count and self.widths[tokens].middle:
            return self.widths[tokens].middle
        return self.line(tokens)[tokens]

    cdef const double *line(self, Py_ssize_t most) except NULL:
        cdef Py_ssize_t tokens, high, first = -1, last = -1
        cdef double slope
        self.reserve(most)
        if self.length > most:
            return self.drawn
        self.length = self.capacity
        memset(self.drawn, 0, self.capacity * sizeof(double))
        for high in range(self.capacity):
            if not self.widths[high].count or not self.widths[high].middle:
                continue
            self.drawn[high] = self.widths[high].middle
            if first < 0:
                first = high
            else:
                slope = (self.drawn[high] - self.drawn[last]) / (high - last)
                for tokens in range(last + 1, high):
                    self.drawn[tokens] = self.drawn[last] + slope * (tokens - last)
            last = high
        if first < 0:
            return self.drawn
        slope = self.slope(first, last)
        for tokens in range(first):
            self.drawn[tokens] = max(self.drawn[first] - slope * (first - tokens), 0.0)
        # The nearer what is wanted is to all that there is, the less of it is new.
        if self.most > self.drawn[last]:
            slope /= 1 - (self.drawn[first] + self.drawn[last]) / (2 * self.most)
        for tokens in range(last + 1, self.capacity):
            if self.most:
                self.drawn[tokens] = self.drawn[tokens - 1] + slope * max(1 - self.drawn[tokens - 1] / self.most, 0.0)
            else:
                self.drawn[tokens] = self.drawn[last] + slope * (tokens - last)
        return self.drawn

    cdef Py_ssize_t widest(self) noexcept:
        cdef Py_ssize_t tokens = self.capacity
        while tokens and not self.widths[tokens - 1].count:
            tokens -= 1
        return tokens - 1

    cdef double slope(self, Py_ssize_t first, Py_ssize_t last) noexcept:
        """Seconds of one more token, beyond what was measured."""
        if first == last:
            return SLOPE * self.drawn[first] / max(first, <Py_ssize_t>1)
        return max((self.drawn[last] - self.drawn[first]) / (last - first), 0.0)


cdef class StepCosts(Curve):
    def __cinit__(self, double experts=0):
        self.compute, self.experts = Costs(), Costs(experts)
        self.drawn, self.length = NULL, 0
        self.waited = self.wanted = 0
        self.plain, self.dearer = 0, DEARER

    def __dealloc__(self):
        PyMem_Free(self.drawn)

    def observe(self, Py_ssize_t tokens, double seconds, double wait, double experts, Py_ssize_t plain=0):
        cdef double alone, rate = self.rate(), dearer
        self.plain = plain
        self.compute.learn(tokens, max(seconds - wait, 0.0))
        if wait == 0 and self.waited <= NO_WAIT:
            return
        self.experts.learn(tokens, experts)
        alone = self.experts.at(plain) if plain else experts
        if tokens > plain and experts > alone and rate * alone > NO_WAIT:
            dearer = (wait / rate - alone) / (experts - alone)
            self.dearer += LEARNT * (min(max(dearer, CHEAPEST), DEAREST) - self.dearer)
        self.waited += PRESENT * (wait - self.waited)
        self.wanted += PRESENT * (self.weigh(alone, experts) - self.wanted)

    cdef Py_ssize_t widest(self) noexcept:
        return self.compute.widest()

    cdef double weigh(self, double plain, double experts) noexcept:
        """Experts of a step, in such as a plain step has."""
        return experts if experts <= plain else plain + self.dearer * (experts - plain)

    def __contains__(self, Py_ssize_t tokens):
        return tokens in self.compute

    def __call__(self, Py_ssize_t tokens):
        return self.line(tokens)[tokens]

    cdef const double *line(self, Py_ssize_t most) except NULL:
        cdef const double *compute = self.compute.line(most)
        cdef const double *experts
        cdef double rate = self.rate(), plain
        cdef Py_ssize_t tokens
        cdef void *moved
        if self.waited <= NO_WAIT:
            return compute
        experts = self.experts.line(max(most, self.plain))
        if self.length <= most:
            moved = PyMem_Realloc(self.drawn, (most + 32) * sizeof(double))
            if moved == NULL:
                raise MemoryError("costs of steps")
            self.drawn, self.length = <double *>moved, most + 32
        plain = experts[self.plain] if self.plain else experts[most]
        for tokens in range(most + 1):
            self.drawn[tokens] = compute[tokens] + rate * self.weigh(plain, experts[tokens])
        return self.drawn

    cdef double rate(self) noexcept:
        return self.waited / max(self.wanted, 1.0)


def best_lengths(Curve costs not None, list chains not None, Py_ssize_t room, list asked=None, Costs prices=None):
    cdef Py_ssize_t n = len(chains), most = 0, at, count, take = 0, deepest = 0, texts = 0, chosen
    cdef double expected = n, ahead = n, best, took, price = 0
    cdef const double *seconds
    cdef Py_ssize_t *depths
    cdef tuple chain
    for chain in chains:
        most += len(chain)
        for chance in chain:
            ahead += <double>chance
    # What was never measured is come to by steps, as a long draft that is wrong is dear.
    most = min(most, room, 2 * costs.widest() + 1 - n)
    seconds = costs.line(n + most)
    best = WORTH * n / seconds[n]
    if most <= 0 or ahead <= best * seconds[n + 1]:
        return best, [0] * n
    depths = <Py_ssize_t *>PyMem_Calloc(2 * n, sizeof(Py_ssize_t))   # as far as was looked, and what pays
    if depths == NULL:
        raise MemoryError("lengths of drafts")
    try:
        for count in range(1, most + 1):
            chosen = surest(chains, depths, n)
            expected += <double>(<tuple>chains[chosen])[depths[chosen]]
            depths[chosen] += 1
            took = seconds[n + count]
            if asked is not None:
                if asked[chosen]:
                    deepest = max(deepest, depths[chosen])
                    if depths[chosen] == 1:
                        texts += 1
                        price = prices.at(texts)
                took += deepest * price
            if expected > best * took:
                best, take = expected / took, count
                memcpy(&depths[n], depths, n * sizeof(Py_ssize_t))
        return best, [depths[n + at] for at in range(n)]
    finally:
        PyMem_Free(depths)


cdef Py_ssize_t surest(list chains, const Py_ssize_t *depths, Py_ssize_t n) except -1:
    """Whose next token is the likeliest; of equals the shallowest, then the first."""
    cdef Py_ssize_t at, found = 0
    cdef double chance, highest = -1
    cdef tuple chain
    for at in range(n):
        chain = <tuple>chains[at]
        if depths[at] >= len(chain):
            continue
        chance = <double>chain[depths[at]]
        if chance > highest or (chance == highest and depths[at] < depths[found]):
            highest, found = chance, at
    return found
