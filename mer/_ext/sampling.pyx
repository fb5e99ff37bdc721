"""Draws tokens from logits, as mer/engine/sampling.py defines it; the arithmetic is in csrc/sampling/."""

import numpy as np

from libc.math cimport isfinite, isnan
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from mer.errors import MerError

cdef extern from "mer_sampling.h" nogil:
    long mer_blocks(long n)
    void mer_only(const float *x, const uint8_t *allowed, long n, float *out)
    long mer_likeliest(const float *x, long n, const mer_room *room)
    long mer_survivors(const float *x, long n, const mer_filters *filters, long best, const mer_room *room)
    long mer_draw(const float *x, long n, const mer_filters *filters, long best, double uniform, const mer_room *room)
    double mer_log_total(const float *x, long n, long best, const mer_room *room)
    void mer_top(const float *x, long n, long k, const mer_room *room)
    double mer_uniform(uint64_t seed, uint64_t position)


def uniform(uint64_t seed, uint64_t position) -> float:
    """The number in [0, 1) that decides a draw."""
    return mer_uniform(seed, position)


cdef class Room:
    """Memory for drawing from logits of `vocab` tokens, 36 bytes each, and what needs no random state.

    Pages of it that no draw has wanted yet are not taken from the system. One thread at a time.
    """

    def __cinit__(self, long vocab):
        if vocab < 1:
            raise ValueError(f"a vocabulary of {vocab} tokens")
        cdef size_t n = <size_t>vocab, blocks = <size_t>mer_blocks(vocab)
        self.memory = malloc(36 * n + 12 * blocks)
        if self.memory is NULL:
            raise MemoryError
        cdef double *wide = <double *>self.memory
        self.room.candidates = <mer_candidate *>wide
        self.room.weights = wide + 2 * n
        self.room.sums = self.room.weights + n
        self.room.ids = <int32_t *>(self.room.sums + blocks)
        self.room.scores = <float *>self.room.ids + n
        self.adjusted = self.room.scores + n
        self.room.peaks = self.adjusted + n
        self.vocab = vocab

    def __dealloc__(self):
        free(self.memory)

    cdef long likeliest(self, const float *x) except -1:
        cdef long best
        with nogil:
            best = mer_likeliest(x, self.vocab, &self.room)
        if isfinite(x[best]):
            return best
        value = "NaN" if isnan(x[best]) else f"{x[best]} as its largest logit"
        raise MerError(f"the model gave {value}: its weights may be damaged, `mer verify` checks them; or it is too much "
                       "for --expert-wire f16, where that is given")

    def pick(self, const float[::1] logits, double temperature, long top_k, double top_p, double min_p,
             double uniform) -> int:
        """The token at `uniform` of what survives; the likeliest one where temperature is 0."""
        cdef const float *x = self._row(logits)
        cdef mer_filters filters = mer_filters(temperature, top_p, min_p, top_k)
        cdef long best = self.likeliest(x)
        return best if temperature == 0 else mer_draw(x, self.vocab, &filters, best, uniform, &self.room)

    def survivors(self, const float[::1] logits, double temperature, long top_k, double top_p, double min_p):
        """What is drawn from: ids i32 [n], ascending, and weights f64 [n]; None where nothing is left out."""
        cdef const float *x = self._row(logits)
        cdef mer_filters filters = mer_filters(temperature, top_p, min_p, top_k)
        cdef long n = mer_survivors(x, self.vocab, &filters, self.likeliest(x), &self.room)
        if not n:
            return None
        return np.array(<int32_t[:n]>self.room.ids), np.array(<double[:n]>self.room.weights)

    def logprobs(self, const float[::1] logits, long token, long count):
        """The log-probability of `token`, and (token, log-probability) of the `count` likeliest, best first."""
        cdef const float *x = self._row(logits)
        cdef long best = self.likeliest(x), i
        cdef double total
        if not 0 <= token < self.vocab:
            raise IndexError(f"token {token} of {self.vocab}")
        count = min(count, self.vocab)
        with nogil:
            total = mer_log_total(x, self.vocab, best, &self.room)
            if count > 0:
                mer_top(x, self.vocab, count, &self.room)
        top = tuple([(self.room.ids[i], x[self.room.ids[i]] - total) for i in range(count)])
        return x[token] - total, top

    cdef const float *_row(self, const float[::1] logits) except NULL:
        if logits.shape[0] != self.vocab:
            raise ValueError(f"{logits.shape[0]} logits for a vocabulary of {self.vocab} tokens")
        return &logits[0]


cdef class Drawer:
    """The random state of one request, and the counts that its penalties need: 8 bytes a token, where there are any."""

    def __cinit__(self, long vocab, uint64_t seed, const int64_t[::1] prompt, *, double temperature, long top_k,
                  double top_p, double min_p, float repetition, double presence, double frequency,
                  const int64_t[::1] biased, const float[::1] biases):
        """prompt: its tokens below `vocab` count as seen. biased, biases: [n] tokens, below vocab, and what is added."""
        cdef Py_ssize_t i
        self.filters = mer_filters(temperature, top_p, min_p, top_k)
        self.vocab, self.seed = vocab, seed
        self.repetition, self.presence, self.frequency = repetition, presence, frequency
        self.biased, self.biases = biased, biases
        self.counting = repetition != 1 or presence != 0 or frequency != 0
        if self.counting:
            self.counts = np.zeros(vocab, np.uint32)
            self.seen = np.empty(vocab, np.int32)
        if repetition != 1:
            for i in range(prompt.shape[0]):
                if prompt[i] < vocab:
                    self.see(prompt[i], 0)

    def draw(self, Room room not None, const float[::1] logits, const uint8_t[::1] allowed=None) -> int:
        """See Sampler.sample; allowed: 0 where a token may not come."""
        cdef const float *x = room._row(logits)
        cdef long token
        if room.vocab != self.vocab or (allowed is not None and allowed.shape[0] != self.vocab):
            raise ValueError(f"logits, what is allowed, and the vocabulary of {self.vocab} tokens do not agree")
        if self.n_seen or self.biased.shape[0]:
            memcpy(room.adjusted, x, <size_t>self.vocab * sizeof(float))
            x = room.adjusted
            self.adjust(room.adjusted)
        if allowed is not None:
            mer_only(x, &allowed[0], self.vocab, room.adjusted)
            x = room.adjusted
        token = room.likeliest(x)
        if self.filters.temperature != 0:
            with nogil:
                token = mer_draw(x, self.vocab, &self.filters, token, mer_uniform(self.seed, self.drawn), &room.room)
        self.drawn += 1
        if self.counting:
            self.see(token, 1)
        return token

    def adjusted(self, Room room not None, const float[::1] logits):
        """f32 [vocab]: logits after biases and penalties."""
        x = np.array(logits)
        cdef float[::1] out = x
        room._row(out)
        self.adjust(&out[0])
        return x

    cdef void see(self, long token, int drawn) noexcept nogil:
        if not self.counts[token]:
            self.counts[token] = 1
            self.seen[self.n_seen] = <int32_t>token
            self.n_seen += 1
        self.counts[token] += drawn

    cdef void adjust(self, float *x) noexcept nogil:
        cdef Py_ssize_t i
        cdef int32_t token
        cdef uint32_t times
        cdef float score
        for i in range(self.biased.shape[0]):
            x[self.biased[i]] += self.biases[i]
        for i in range(self.n_seen):
            token = self.seen[i]
            score, times = x[token], self.counts[token] - 1
            if self.repetition != 1:
                score = score * self.repetition if score < 0 else score / self.repetition
            if times:
                score = <float>(score - (times * self.frequency + self.presence))
            x[token] = score
