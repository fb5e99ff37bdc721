"""Spans of time: the step thread's calls, and the reads that were under way. mer/streaming/profile.py shows them."""

import numpy as np

from libc.stdlib cimport free, realloc
from libc.string cimport memcpy

# The first of them are the streamer's own: the enum in recorder.pxd.
KINDS = ("experts", "compute", "wait for reads", "read", "read ahead", "begin", "attend", "feed", "route", "predict",
         "finish", "logits", "mix", "mixture")


cdef class _Timed:
    """Calls `call` and records it; its first argument, where it is a number, is the span's index."""
    cdef Recorder recorder
    cdef object call
    cdef int64_t kind

    def __init__(self, Recorder recorder, int64_t kind, call):
        self.recorder, self.kind, self.call = recorder, kind, call

    def __call__(self, *arguments):
        cdef int64_t index = arguments[0] if arguments and isinstance(arguments[0], int) else 0
        cdef int64_t start = now()
        result = self.call(*arguments)
        self.recorder.add(self.kind, index, start, now(), 0)
        return result


cdef class Recorder:
    """Keeps spans until they are taken. One thread at a time."""

    def __dealloc__(self):
        free(self.spans)

    cdef void add(self, int64_t kind, int64_t index, int64_t start, int64_t end, int64_t nbytes) noexcept nogil:
        cdef Span *more
        if self.n == self.room:
            more = <Span *>realloc(self.spans, <size_t>(2 * self.room + 1024) * sizeof(Span))
            if more is NULL:
                return                     # a span less is no reason to fail
            self.spans, self.room = more, 2 * self.room + 1024
        self.spans[self.n] = Span(kind, index, start, end, nbytes)
        self.n += 1

    def timed(self, str kind, call):
        """`call`, recorded as one of KINDS each time that it returns."""
        return _Timed(self, KINDS.index(kind), call)

    def take(self):
        """i64 [n, 5]: kind (index of KINDS), index, start and end in ns of time.monotonic_ns(), bytes.

        In the order of their ends, but for reads: that is when they were seen to have ended. They are forgotten here.
        """
        spans = np.empty((self.n, 5), np.int64)
        cdef int64_t[:, ::1] out = spans
        if self.n:
            memcpy(&out[0, 0], self.spans, <size_t>self.n * sizeof(Span))
        self.n = 0
        return spans
