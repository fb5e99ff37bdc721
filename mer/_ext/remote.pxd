# Experts in the memory of other machines: which, what they are asked, and what they answered.
from libc.stdint cimport int32_t, int64_t, uint8_t

from mer._ext.mixture cimport Mixture

cdef extern from "pthread.h" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass


cdef class RemoteTier:
    cdef Mixture mixture
    cdef object peers                  # has `ask`
    cdef readonly int64_t n_keys, n_experts, patience_ns
    cdef int32_t *holder               # [keys] the peer that has it, -1: none
    cdef float *heat                   # [keys] share of the tokens that want it, averaged over the last ones
    cdef int64_t tokens                # that heat has seen, of all layers
    # the layer that is being computed
    cdef int32_t *asked                # [n_experts] the peer that has been asked, -1: none
    cdef uint8_t *wanted               # [n_experts] whether its answer is still of use
    cdef uint8_t *came                 # [n_experts] whether its rows are there
    cdef uint8_t[256] left_out         # whether a peer (its number modulo 256) was, as slower, when it was last wanted
    cdef int32_t *token_of             # [pairs] the token of each sorted pair
    cdef float *weight_of              # [pairs] its weight
    cdef object tokens_view, weights_view  # both as arrays
    cdef int64_t turn, base, n_asked, deadline
    cdef int64_t n_reads               # experts that the own drive is to read, as nobody has them
    cdef int64_t unread                # turns in a row in which it read none
    cdef bint overdue                  # the deadline is over, and the own drive has been asked
    cdef readonly double read_ns       # a byte, of reading experts from the own drive
    cdef readonly int64_t reads        # how often that was measured
    # what came from the peers and has not been looked at
    cdef pthread_mutex_t lock
    cdef pthread_cond_t changed
    cdef list inbox
    cdef volatile int arrived
    cdef int64_t hits, late, skipped, wait_ns

    # A layer's turn, after Mixture.begin; its experts begin at `base`: nothing has been asked.
    cdef void begin(self, int64_t base) noexcept nogil
    # Whether a peer is to be asked for an absent expert of the layer; `send` asks for it then.
    cdef bint add(self, int64_t expert) noexcept nogil
    # Asks for them. Who can't be asked now has nothing: see `pending`. slot_bytes: what reading one takes.
    cdef void send(self, int64_t layer, int64_t slot_bytes) noexcept nogil
    # Whether an expert's rows may still come.
    cdef bint pending(self, int64_t expert) noexcept nogil
    # The rows of this expert are made here: they are not to be touched any more.
    cdef void forgo(self, int64_t expert) noexcept nogil
    # Whether there is something to `collect`.
    cdef bint has_news(self) noexcept nogil
    # Puts what came in its place: `came` and `pending` are up to date.
    cdef void collect(self) noexcept nogil
    # Whether it has just become time to ask the own drive, too.
    cdef bint is_overdue(self) noexcept nogil
    # Until there is news, or that time.
    cdef void wait(self) noexcept nogil
    # So many bytes of experts came from the own drive in at most so many ns; the last `unseen` of them this thread
    # computed and did not look. The average moves only as far as it must to lie between these bounds.
    cdef void note_read(self, int64_t ns, int64_t unseen, int64_t nbytes) noexcept nogil

    cdef int ask(self, int64_t layer, double one_ns) except -1
    cdef object slower(self, by_peer, double one_ns)
    cdef int place(self, int64_t turn, int32_t peer, experts, rows) except -1
