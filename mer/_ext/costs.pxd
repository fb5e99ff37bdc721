# What steps take by their number of tokens.

cdef enum:
    LATEST = 7      # measurements of a step, whose median counts

cdef struct Width:
    double middle
    double latest[LATEST]
    Py_ssize_t count, place     # of the latest; 0: nothing is known
    long long at                # the step of the last one


cdef class Curve:
    # Of steps of 0, 1, ..., at least `most` tokens; 0 where nothing was measured. Valid until the next call.
    cdef const double *line(self, Py_ssize_t most) except NULL
    cdef Py_ssize_t widest(self) noexcept       # tokens of the widest step that was measured


cdef class Costs(Curve):
    cdef Width *widths
    cdef double *drawn
    cdef Py_ssize_t capacity, known, length     # of both; widths that are known; of what is drawn
    cdef long long steps, due
    cdef double most        # more there can't be; 0: no bound

    cdef int reserve(self, Py_ssize_t tokens) except -1
    cdef double slope(self, Py_ssize_t first, Py_ssize_t last) noexcept
    cdef double at(self, Py_ssize_t tokens) except? -1
    cdef int learn(self, Py_ssize_t tokens, double seconds) except -1
    cdef void older(self) noexcept


cdef class StepCosts(Curve):
    cdef Costs compute, experts
    cdef double *drawn
    cdef Py_ssize_t length
    cdef Py_ssize_t plain       # tokens of a step without drafts; 0: not known
    cdef double waited, wanted, dearer

    cdef double rate(self) noexcept
    cdef double weigh(self, double plain, double experts) noexcept
