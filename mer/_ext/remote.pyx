"""The tier beside the own drive: experts in the memory of other machines, computed there.

Activations and weights go out, and a weighted output row comes back for every (token, expert) pair; the rows are added
here, in the same order as all others, so that where one was computed leaves no trace. Who carries them is given by `peers`, an
object with

    ask(peer, Ask) -> bool
    expected_ns(peer, rows) -> int
    probe(peer, Ask)

that are called on the thread that computes, and must not block. ask: False: this peer can't be asked now. What comes of
it is told by `answer`, on any thread. expected_ns: how long it takes for so many rows, 0: not known. probe: it may be
asked, to know that; nobody waits for what comes.

A peer that is expected to answer later than the own drive reads is not asked. One that takes longer all the same is not
waited for: then the expert is read, too, and what is there first is used.
"""
import logging
from collections import namedtuple

import numpy as np

from libc.math cimport pow
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from posix.time cimport CLOCK_MONOTONIC, timespec

from mer._ext.recorder cimport now

cdef extern from "pthread.h" nogil:
    ctypedef struct pthread_condattr_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *, void *)
    int pthread_mutex_destroy(pthread_mutex_t *)
    int pthread_mutex_lock(pthread_mutex_t *)
    int pthread_mutex_unlock(pthread_mutex_t *)
    int pthread_condattr_init(pthread_condattr_t *)
    int pthread_condattr_setclock(pthread_condattr_t *, int)
    int pthread_condattr_destroy(pthread_condattr_t *)
    int pthread_cond_init(pthread_cond_t *, const pthread_condattr_t *)
    int pthread_cond_destroy(pthread_cond_t *)
    int pthread_cond_signal(pthread_cond_t *)
    int pthread_cond_timedwait(pthread_cond_t *, pthread_mutex_t *, const timespec *)

# The statistics where there is no tier
NO_PEERS = dict.fromkeys(("peer_hits", "peer_late", "peer_skipped", "peer_wait_s"), 0)

# Of one token, in the average of how often an expert is wanted.
cdef double RATE = 0.02
# Least share of a new measurement in the average of the drive's speed; and what is assumed before there is any, ns a byte.
cdef double NEW = 0.1
cdef double FIRST_GUESS = 1.0
# After so many turns in which peers had all, one expert is read, to know how quick the drive is.
cdef int64_t PROBE = 256
# Of the patience: a peer that answers as soon as this is asked, however quick the drive.
cdef double SOON = 0.25
# Where the own drive has been asked already and failed, a peer is waited for in pieces of this, ns.
cdef int64_t PIECE = 1000000000
cdef int64_t NEVER = 0x7fffffffffffffff

_log = logging.getLogger("mer")

Ask = namedtuple("Ask", "turn deadline layer x experts counts tokens weights")


def table_bytes(int64_t n_keys, int64_t n_experts, int64_t pairs):
    """Bytes of a tier's tables."""
    return n_keys * 8 + n_experts * 6 + pairs * 8


cdef class RemoteTier:
    """For a streamer's mixture of n_keys experts in all.

    patience_ns: a peer has this long, however quick the own drive is.
    """

    def __cinit__(self, Mixture mixture not None, int64_t n_keys, peers, int64_t patience_ns):
        cdef pthread_condattr_t attributes
        cdef int64_t pairs = mixture.max_tokens * mixture.top_k
        pthread_mutex_init(&self.lock, NULL)
        pthread_condattr_init(&attributes)
        pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC)
        pthread_cond_init(&self.changed, &attributes)
        pthread_condattr_destroy(&attributes)
        self.mixture, self.peers, self.n_keys, self.n_experts = mixture, peers, n_keys, mixture.n_experts
        self.patience_ns, self.inbox, self.read_ns = patience_ns, [], FIRST_GUESS
        self.holder = <int32_t *>calloc(n_keys, sizeof(int32_t))
        self.heat = <float *>calloc(n_keys, sizeof(float))
        self.asked = <int32_t *>calloc(self.n_experts, sizeof(int32_t))
        self.wanted = <uint8_t *>calloc(self.n_experts, 1)
        self.came = <uint8_t *>calloc(self.n_experts, 1)
        self.token_of = <int32_t *>calloc(pairs, sizeof(int32_t))
        self.weight_of = <float *>calloc(pairs, sizeof(float))
        if (self.holder is NULL or self.heat is NULL or self.asked is NULL or self.wanted is NULL or self.came is NULL
                or self.token_of is NULL or self.weight_of is NULL):
            raise MemoryError("no memory for the tables of a tier on other machines")
        memset(self.holder, 0xff, n_keys * sizeof(int32_t))
        memset(self.asked, 0xff, self.n_experts * sizeof(int32_t))
        self.tokens_view = np.asarray(<int32_t[:pairs]>self.token_of)
        self.weights_view = np.asarray(<float[:pairs]>self.weight_of)

    def __dealloc__(self):
        pthread_mutex_destroy(&self.lock)
        pthread_cond_destroy(&self.changed)
        free(self.holder)
        free(self.heat)
        free(self.asked)
        free(self.wanted)
        free(self.came)
        free(self.token_of)
        free(self.weight_of)

    # On the thread that computes.

    cdef void begin(self, int64_t base) noexcept nogil:
        cdef int64_t e, count, tokens = self.mixture.tokens
        cdef float kept = <float>pow(1.0 - RATE, <double>tokens)
        self.base, self.n_asked, self.n_reads, self.overdue = base, 0, 0, False
        self.turn += 1
        self.tokens += tokens
        memset(self.asked, 0xff, self.n_experts * sizeof(int32_t))
        memset(self.wanted, 0, self.n_experts)
        memset(self.came, 0, self.n_experts)
        for e in range(self.n_experts):
            count = self.mixture.first[e + 1] - self.mixture.first[e]
            self.heat[base + e] = self.heat[base + e] * kept + (1 - kept) * <float>count / <float>tokens

    cdef bint add(self, int64_t expert) noexcept nogil:
        cdef int32_t peer = self.holder[self.base + expert]    # once: others may change it
        if peer < 0 or self.unread >= PROBE:
            self.n_reads += 1
            self.unread = 0
            return False
        self.asked[expert], self.wanted[expert] = peer, 1
        self.n_asked += 1
        return True

    cdef void send(self, int64_t layer, int64_t slot_bytes) noexcept nogil:
        cdef int64_t i
        cdef double one_ns = self.read_ns * <double>slot_bytes
        if self.n_asked == 0:
            return
        for i in range(self.mixture.tokens * self.mixture.top_k):
            self.token_of[self.mixture.position[i]] = <int32_t>(i // self.mixture.top_k)
            self.weight_of[self.mixture.position[i]] = self.mixture.weights[i]
        with gil:
            try:
                self.ask(layer, one_ns)
            except Exception:                          # the own drive has them all
                _log.exception("other machines could not be asked")
                memset(self.asked, 0xff, self.n_experts * sizeof(int32_t))
                self.n_asked = 0
        if self.n_asked and not self.n_reads:
            self.unread += 1

    cdef int ask(self, int64_t layer, double one_ns) except -1:
        cdef int64_t e
        cdef const int64_t *first = self.mixture.first
        by_peer = {}
        for e in range(self.n_experts):
            if self.asked[e] >= 0:
                by_peer.setdefault(self.asked[e], []).append(e)
        x = self.mixture.input_rows()
        slower = self.slower(by_peer, one_ns)
        for peer in by_peer:
            self.left_out[<int32_t>peer % 256] = peer in slower
        for peer in slower:
            self.n_asked -= len(by_peer[peer])
        self.deadline = now() + max(self.patience_ns, <int64_t>(one_ns * <double>self.n_asked))
        for peer, experts in by_peer.items():
            counts = [first[<int64_t>e + 1] - first[<int64_t>e] for e in experts]
            pairs = [slice(first[<int64_t>e], first[<int64_t>e + 1]) for e in experts]
            tokens = np.concatenate([self.tokens_view[each] for each in pairs])
            weights = np.concatenate([self.weights_view[each] for each in pairs])
            wanted = Ask(self.turn, self.deadline, layer, x, experts, counts, tokens, weights)
            if peer in slower:
                self.peers.probe(peer, wanted._replace(turn=0, deadline=NEVER))
                self.skipped += len(experts)
            elif self.peers.ask(peer, wanted):
                continue
            else:
                self.n_asked -= len(experts)
            for e in experts:
                self.asked[e] = -1
        return 0

    cdef object slower(self, by_peer, double one_ns):
        """The peers that would answer later than the own drive could read: what they have, the slowest one's first,
        is added to what the drive has to read anyway.
        """
        cdef const int64_t *first = self.mixture.first
        cdef int64_t reading = self.n_reads
        expected, found = [], set()
        for peer, experts in by_peer.items():
            rows = sum(first[<int64_t>e + 1] - first[<int64_t>e] for e in experts)
            expected.append((self.peers.expected_ns(peer, rows), peer, len(experts)))
        for ns, peer, count in sorted(expected, reverse=True):
            if ns > max(one_ns * (reading + count), SOON * self.patience_ns):
                found.add(peer)
                reading += count
        self.n_reads = reading
        return found

    cdef bint pending(self, int64_t expert) noexcept nogil:
        return self.asked[expert] >= 0 and not self.came[expert]

    cdef void forgo(self, int64_t expert) noexcept nogil:
        self.wanted[expert] = 0

    cdef bint has_news(self) noexcept nogil:
        return self.arrived != 0

    cdef void collect(self) noexcept nogil:
        pthread_mutex_lock(&self.lock)
        self.arrived = 0                               # before the look: what comes meanwhile is news again
        pthread_mutex_unlock(&self.lock)
        with gil:
            inbox, self.inbox = self.inbox, []
            for turn, peer, experts, rows in inbox:
                try:
                    self.place(turn, peer, experts, rows)
                except Exception:
                    _log.exception("what came from another machine could not be used")

    cdef int place(self, int64_t turn, int32_t peer, experts, rows) except -1:
        """An answer's rows into the mixture's; without any they do not come."""
        cdef int64_t e, nbytes, at = 0
        cdef const uint8_t[::1] data
        if turn != self.turn:                          # of a layer that is over
            return 0
        if rows is None:
            for e in experts:
                if self.asked[e] == peer and not self.came[e]:
                    self.asked[e] = -1
            return 0
        data = rows
        for e in experts:
            nbytes = self.mixture.count(e) * self.mixture.row_bytes()
            if at + nbytes > data.shape[0]:
                raise ValueError(f"{data.shape[0]} bytes are no rows of experts {experts}")
            if nbytes and self.wanted[e] and self.asked[e] == peer:
                self.mixture.take_rows(e, &data[at])
                self.came[e], self.wanted[e] = 1, 0
                self.hits += 1
            at += nbytes
        return 0

    cdef bint is_overdue(self) noexcept nogil:
        cdef int64_t e
        if self.overdue or self.n_asked == 0 or now() < self.deadline:
            return False
        self.overdue = True
        for e in range(self.n_experts):
            self.late += self.pending(e)
        return True

    cdef void wait(self) noexcept nogil:
        cdef int64_t start = now()
        cdef int64_t until = start + PIECE if self.overdue else self.deadline
        cdef timespec at
        at.tv_sec, at.tv_nsec = until // 1000000000, until % 1000000000
        pthread_mutex_lock(&self.lock)
        while not self.arrived:
            if pthread_cond_timedwait(&self.changed, &self.lock, &at):
                break
        pthread_mutex_unlock(&self.lock)
        self.wait_ns += now() - start

    cdef void note_read(self, int64_t ns, int64_t unseen, int64_t nbytes) noexcept nogil:
        cdef double most = <double>ns / <double>nbytes
        cdef double least = most - <double>unseen / <double>nbytes
        self.reads += 1
        self.read_ns += max(NEW, 1.0 / <double>self.reads) * (min(max(self.read_ns, least), most) - self.read_ns)

    def note_read_py(self, int64_t ns, int64_t unseen, int64_t nbytes):
        """See the pxd: what a step tells."""
        self.note_read(ns, unseen, nbytes)

    # On any thread.

    def answer(self, int64_t turn, int32_t peer, list experts, rows):
        """rows: bytes of [sum of their counts, hidden], the weighted outputs of `experts`, in the order of what was asked, in
        the format to which the mixture rounds; None: they do not come.
        """
        self.inbox.append((turn, peer, experts, rows))
        pthread_mutex_lock(&self.lock)
        self.arrived = 1
        pthread_cond_signal(&self.changed)
        pthread_mutex_unlock(&self.lock)

    def hold(self, const int32_t[::1] holders):
        """i32 [keys]: the peer that has each expert in memory, -1: none. Raises ValueError for another length."""
        if holders.shape[0] != self.n_keys:
            raise ValueError(f"holders of {holders.shape[0]} experts, there are {self.n_keys}")
        memcpy(self.holder, &holders[0], self.n_keys * sizeof(int32_t))

    def remember(self, const float[::1] heat):
        """f32 [keys]: what `heats` was once, to go on from. Raises ValueError for another length."""
        if heat.shape[0] != self.n_keys:
            raise ValueError(f"heat of {heat.shape[0]} experts, there are {self.n_keys}")
        memcpy(self.heat, &heat[0], self.n_keys * sizeof(float))

    def heats(self):
        """(f32 [keys], the share of the last tokens that wanted each expert; of how many tokens, all layers counted)."""
        found = np.empty(self.n_keys, np.float32)
        cdef float[::1] out = found
        memcpy(&out[0], self.heat, self.n_keys * sizeof(float))
        return found, self.tokens

    def stats(self):
        """Totals: peer_hits, experts that other machines computed, counted once a call; peer_late: those for which the
        own drive was asked, too; peer_skipped: those that were read, as that was to be sooner; peer_wait_s: time with nothing to compute here, and no read under way.
        """
        return {"peer_hits": self.hits, "peer_late": self.late, "peer_skipped": self.skipped,
                "peer_wait_s": self.wait_ns / 1e9}
