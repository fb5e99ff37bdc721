"""Drawing tokens, for other Cython modules."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

cdef extern from "mer_sampling.h" nogil:
    ctypedef struct mer_filters:
        double temperature
        double top_p
        double min_p
        long top_k
    ctypedef struct mer_candidate
    ctypedef struct mer_room:
        float *peaks
        float *scores
        double *sums
        double *weights
        int32_t *ids
        mer_candidate *candidates

cdef class Room:
    cdef mer_room room
    cdef void *memory
    cdef float *adjusted
    cdef readonly long vocab

    cdef long likeliest(self, const float *x) except -1
    cdef const float *_row(self, const float[::1] logits) except NULL

cdef class Drawer:
    cdef mer_filters filters
    cdef uint64_t seed
    cdef uint64_t drawn
    cdef long vocab
    cdef const int64_t[::1] biased
    cdef const float[::1] biases
    cdef float repetition
    cdef double presence
    cdef double frequency
    # counts[token]: 0: not seen, else 1 + how often it was drawn. seen[:n_seen]: those that are not 0.
    cdef bint counting
    cdef uint32_t[::1] counts
    cdef int32_t[::1] seen
    cdef long n_seen

    cdef void see(self, long token, int drawn) noexcept nogil
    cdef void adjust(self, float *x) noexcept nogil
