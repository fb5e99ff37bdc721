# How often drafted tokens are right: by kind of draft, and by their position in it.

cdef enum:
    MOST = 16       # tokens of one request in one step
    LENGTHS = 5     # kinds of prompt lookup, by how long a match is
    KINDS = 7


cdef class Acceptance:
    # Of each position how many tokens were tried and how many right, where those before were.
    cdef double tried[KINDS][MOST]
    cdef double rights[KINDS][MOST]

    cdef void learn(self, int kind, Py_ssize_t position, bint right) noexcept

# Of a draft behind so many tokens, at least two, that stood there before.
cdef int lookup_kind(Py_ssize_t length) noexcept
