"""How often drafted tokens are right: by kind of draft, and by their position in it."""

from libc.string cimport memset

# Kinds: prompt lookup has one for each length of what stood there before, the longest is 0; then those of engines.
MOST_DRAFTED, LOOKUPS, DRAFT_MODEL, TIED = MOST, LENGTHS, LENGTHS, LENGTHS + 1

cdef double MEMORY = 0.97     # of what is known of a position, what is left after one more token there
cdef double BELIEF = 4.0      # tokens that a guess is worth
cdef double HOPELESS = 0.03   # further tokens are not thought of

cdef Py_ssize_t[LENGTHS] SHORTEST = [16, 8, 5, 3, 2]
cdef double[KINDS] FIRST = [0.9, 0.8, 0.7, 0.5, 0.4, 0.7, 0.7]   # what is thought of a first token


cdef int lookup_kind(Py_ssize_t length) noexcept:
    cdef int kind = 0
    while length < SHORTEST[kind] and kind < LENGTHS - 1:
        kind += 1
    return kind


cdef class Acceptance:
    def __cinit__(self):
        memset(self.tried, 0, sizeof(self.tried))
        memset(self.rights, 0, sizeof(self.rights))

    cdef void learn(self, int kind, Py_ssize_t position, bint right) noexcept:
        self.tried[kind][position] = self.tried[kind][position] * MEMORY + 1
        self.rights[kind][position] = self.rights[kind][position] * MEMORY + right

    def note(self, int kind, Py_ssize_t position, bint right):
        if not (0 <= kind < KINDS and 0 <= position < MOST):
            raise IndexError(f"kind {kind}, position {position}")
        self.learn(kind, position, right)

    def judge(self, int kind, Py_ssize_t drafted, Py_ssize_t right, Acceptance everybody not None):
        cdef Py_ssize_t position
        if not (0 <= kind < KINDS and 0 <= right <= drafted <= MOST):
            raise IndexError(f"kind {kind}, {right} of {drafted}")
        for position in range(min(right + 1, drafted)):
            self.learn(kind, position, position < right)
            everybody.learn(kind, position, position < right)

    def chances(self, int kind, Acceptance everybody not None):
        cdef double chance = 1, rate = FIRST[kind]
        cdef Py_ssize_t i
        found = []
        for i in range(MOST):
            rate = (everybody.rights[kind][i] + BELIEF * rate) / (everybody.tried[kind][i] + BELIEF)
            chance *= (self.rights[kind][i] + BELIEF * rate) / (self.tried[kind][i] + BELIEF)
            if chance < HOPELESS:
                break
            found.append(chance)
        return tuple(found)
