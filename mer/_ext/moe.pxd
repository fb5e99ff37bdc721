# The streamed mixture: reads the experts that are missing, and has each multiplied as it arrives.
from libc.stdint cimport int32_t, int64_t

from mer._ext.cache cimport ExpertCache
from mer._ext.mixture cimport Mixture
from mer._ext.prefetch cimport Prefetcher, ReadPlan
from mer._ext.recorder cimport Recorder
from mer._ext.remote cimport RemoteTier
from mer._ext.uring cimport Reader, ReadOp
from mer._ext.vram cimport VramTier

ctypedef struct Expert:
    int64_t key                # its number in the cache
    int64_t slot
    int64_t first_op           # its reads: [first_op, end_op) of `ops`
    int64_t end_op
    int64_t asked              # when they were submitted, ns; 0: nobody wants to know
    int state


cdef class ExpertStreamer:
    cdef ExpertCache cache
    cdef Reader reader
    cdef readonly Mixture mixture      # the arithmetic
    cdef readonly Prefetcher prefetcher  # None: nothing is read ahead
    cdef readonly VramTier vram                 # None: there is no tier above the cache
    cdef RemoteTier remote             # None: no other machine has experts
    cdef Recorder recorder             # None: nothing is recorded
    cdef readonly int64_t n_layers, n_experts, top_k, max_tokens, max_reads, scratch_bytes
    cdef ReadPlan *reads               # [n_layers * n_experts, max_reads]; length 0: not used
    cdef int64_t *matrices             # [n_layers * n_experts, 3] offsets in the slot: gate, up, down
    # one step's bookkeeping
    cdef ReadOp *ops                   # [2 * n_experts * max_reads] of this step, in order of submission
    cdef Expert *active                # [n_experts] the distinct experts of this step
    cdef void *memory                  # the one allocation behind all of them
    # what the next layer may want: the array, and a view of it
    cdef object ahead_array
    cdef const int32_t[:, ::1] ahead_view
    # the layer that is being computed
    cdef int64_t layer, n_ops
    cdef const int32_t *ahead          # [tokens, top_k] what the next layer may want, NULL: not known
    cdef ReadOp *failed
    cdef int64_t io_wait_ns, compute_ns, bytes_read, hits, misses

    cdef int add_expert(self, int64_t key, const int64_t[:, ::1] reads, const int64_t[::1] matrices) except -1
    cdef int bind_ahead(self, ahead) except -1
    cdef void plan_reads(self, Expert *e) noexcept nogil
    cdef void end_reads(self, Expert *e) noexcept nogil
    cdef void try_acquire(self, Expert *e) noexcept nogil
    cdef void advance(self, Expert *e) noexcept nogil
    cdef void begin_device(self, int64_t base, int64_t n) noexcept nogil
    cdef bint end_device(self, int64_t n) noexcept nogil
    cdef void begin_remote(self, int64_t base, int64_t n) noexcept nogil
    cdef void collect_remote(self, int64_t base, int64_t n) noexcept nogil
    cdef void give_up_waiting(self, int64_t n) noexcept nogil
    cdef void compute_ready(self, int64_t n) noexcept nogil
    cdef int stream(self, int64_t base) noexcept nogil
    cdef int64_t spent(self, int64_t kind, int64_t since) noexcept nogil
