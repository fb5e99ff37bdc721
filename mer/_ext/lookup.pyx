# cython: language_level=3, boundscheck=False, wraparound=False
"""Prompt lookup: where a text, prompt and answer, stood before as it ends now."""

from cpython.list cimport PyList_GET_ITEM, PyList_GET_SIZE
from cpython.long cimport PyLong_AsLong
from cpython.mem cimport PyMem_Free, PyMem_Realloc
from libc.stdint cimport int32_t, uint32_t, uint64_t
from libc.string cimport memset

from mer._ext.acceptance cimport MOST, Acceptance, lookup_kind

cdef int LEAST = 2          # tokens that must be the same
cdef int LONGEST = 64       # beyond it matches are as good as each other
cdef int CANDIDATES = 64    # places that are looked at, the latest first

SHORTEST = LEAST


cdef class TextIndex:
    """Each place hangs in a chain with the earlier ones behind the same two tokens, by a hash of the two."""

    cdef list tokens
    cdef int32_t *text      # of the first `known` tokens a copy
    cdef int32_t *before    # of each place the one before it in its chain, 0: none
    cdef int32_t *heads     # of each chain the latest place
    cdef Py_ssize_t known, capacity, mask

    def __cinit__(self, list tokens not None):
        self.tokens = tokens
        self.text = self.before = self.heads = NULL
        self.known = self.capacity = self.mask = 0

    def __dealloc__(self):
        PyMem_Free(self.text)
        PyMem_Free(self.before)
        PyMem_Free(self.heads)

    cdef int reserve(self, Py_ssize_t count) except -1:
        """Room for so many tokens, and chains that are short."""
        cdef Py_ssize_t capacity = 256, place
        cdef void *moved
        while capacity <= count:
            capacity *= 2
        if capacity <= self.capacity:
            return 0
        for part in range(3):
            moved = PyMem_Realloc(self.text if part == 0 else self.before if part == 1 else self.heads, capacity * 4)
            if moved == NULL:
                raise MemoryError("the index of a text")
            if part == 0:
                self.text = <int32_t *>moved
            elif part == 1:
                self.before = <int32_t *>moved
            else:
                self.heads = <int32_t *>moved
        self.capacity, self.mask = capacity, capacity - 1
        memset(self.heads, 0, capacity * 4)
        for place in range(LEAST, self.known + 1):
            self.hang(place)
        return 0

    cdef void hang(self, Py_ssize_t place) noexcept:
        """Behind the first `place` tokens."""
        cdef uint64_t both = <uint64_t><uint32_t>self.text[place - 2] << 32 | <uint32_t>self.text[place - 1]
        cdef int32_t *head = &self.heads[(both * 0x9E3779B97F4A7C15ULL >> 32) & self.mask]
        self.before[place] = head[0]
        head[0] = <int32_t>place

    cdef int learn(self) except -1:
        """What was appended since."""
        cdef Py_ssize_t count = PyList_GET_SIZE(self.tokens)
        self.reserve(count)
        while self.known < count:
            self.text[self.known] = <int32_t>PyLong_AsLong(<object>PyList_GET_ITEM(self.tokens, self.known))
            self.known += 1
            if self.known >= LEAST:
                self.hang(self.known)
        return 0

    cdef Py_ssize_t longest(self, Py_ssize_t *start) noexcept:
        """How many tokens before `start` are as those at the end; 0 where there is no such place."""
        cdef Py_ssize_t place, length, limit, best = 0
        start[0] = 0
        if self.known < LEAST:
            return 0
        place = self.before[self.known]
        for _ in range(CANDIDATES):
            if place == 0 or best == LONGEST:
                break
            limit = min(place, <Py_ssize_t>LONGEST)
            length = 0
            while length < limit and self.text[place - 1 - length] == self.text[self.known - 1 - length]:
                length += 1
            if length > best:
                best, start[0] = length, place
            place = self.before[place]
        return best if best >= LEAST else 0

    def find(self):
        cdef Py_ssize_t start, length
        self.learn()
        length = self.longest(&start)
        return start if length else 0, length


cdef class NgramDrafter:
    cdef TextIndex index
    cdef Py_ssize_t start            # of the last find its first guess
    # What was found and is compared with what comes: where its first guess stood, and belongs; -1: nothing.
    cdef Py_ssize_t watched, belongs, right
    cdef int kind

    def __cinit__(self, list tokens not None):
        self.index = TextIndex(tokens)
        self.index.learn()           # the prompt is looked at here, by whoever asks
        self.start, self.belongs = -1, -1

    cdef int32_t guess(self, Py_ssize_t start, Py_ssize_t belongs, Py_ssize_t at) noexcept:
        """Of a find, its guess number `at`: a text that repeats itself goes on with what is guessed."""
        return self.index.text[start + at % (belongs - start)]

    cdef void judge(self, Acceptance own, Acceptance everybody) noexcept:
        cdef bint right
        while self.belongs >= 0 and self.belongs + self.right < self.index.known:
            right = self.guess(self.watched, self.belongs, self.right) == self.index.text[self.belongs + self.right]
            own.learn(self.kind, self.right, right)
            everybody.learn(self.kind, self.right, right)
            self.right += 1
            if not right or self.right == MOST:
                self.belongs = -1

    def look(self, Acceptance own not None, Acceptance everybody not None):
        cdef Py_ssize_t length
        cdef int kind
        self.index.learn()
        self.judge(own, everybody)
        length = self.index.longest(&self.start)
        if length == 0:
            self.start = -1
            return -1
        kind = lookup_kind(length)
        if self.belongs < 0:
            self.watched, self.belongs, self.right, self.kind = self.start, self.index.known, 0, kind
        return kind

    def draft(self, Py_ssize_t most):
        cdef Py_ssize_t i
        if self.start < 0:
            return []
        return [self.guess(self.start, self.index.known, i) for i in range(most)]

    def verified(self):
        self.belongs = -1
