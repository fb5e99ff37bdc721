# What a profile is made of: spans of time, recorded by whoever spent it.
from libc.stdint cimport int64_t
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

# Indices of recorder.KINDS
cdef enum:
    SPAN_EXPERTS
    SPAN_COMPUTE
    SPAN_WAIT
    SPAN_READ
    SPAN_READ_AHEAD

ctypedef struct Span:
    int64_t kind
    int64_t index              # of a layer, or the number of an expert in the cache
    int64_t start              # ns of the monotonic clock
    int64_t end
    int64_t nbytes


cdef inline int64_t now() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return <int64_t>t.tv_sec * 1000000000 + t.tv_nsec


cdef class Recorder:
    cdef Span *spans
    cdef int64_t n, room

    cdef void add(self, int64_t kind, int64_t index, int64_t start, int64_t end, int64_t nbytes) noexcept nogil
