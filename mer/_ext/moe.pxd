# The streamed mixture: routes tokens to experts, reads the missing ones, multiplies each as it arrives.
from libc.stdint cimport int32_t, int64_t, uint8_t

from mer._ext.cache cimport ExpertCache
from mer._ext.kernels cimport Kernels, Pool, mer_task_fn
from mer._ext.prefetch cimport Prefetcher, ReadPlan
from mer._ext.recorder cimport Recorder
from mer._ext.uring cimport Reader, ReadOp

ctypedef struct LayerShape:
    int gate_format
    int down_format
    int64_t hidden
    int64_t inter
    const float *gate_bias     # [n_experts, inter]; NULL: none
    const float *up_bias       # [n_experts, inter]
    const float *down_bias     # [n_experts, hidden]

ctypedef struct Expert:
    int64_t key                # its number in the cache
    int64_t first              # its first (token, choice) pair in sorted order
    int64_t count              # and how many
    int64_t slot
    int64_t first_op           # its reads: [first_op, end_op) of `ops`
    int64_t end_op
    int64_t asked              # when they were submitted, ns; 0: nobody wants to know
    int state

ctypedef struct Ready:
    const uint8_t *gate
    const uint8_t *up
    const uint8_t *down
    int64_t expert
    int64_t first
    int64_t count
    int64_t row                # its first row in `gate_rows`, `up_rows` and `mids`


cdef class ExpertStreamer:
    cdef ExpertCache cache
    cdef Reader reader
    cdef Kernels kernels
    cdef Pool pool
    cdef Prefetcher prefetcher         # None: nothing is read ahead
    cdef Recorder recorder             # None: nothing is recorded
    cdef readonly int64_t n_layers, n_experts, top_k, max_tokens, max_reads, scratch_bytes
    cdef LayerShape *layers
    cdef list biases                   # what the layers' biases point into
    cdef bint clamped
    cdef float alpha, limit            # of the clamped SwiGLU
    cdef ReadPlan *reads               # [n_layers * n_experts, max_reads]; length 0: not used
    cdef int64_t *matrices             # [n_layers * n_experts, 3] offsets in the slot: gate, up, down
    # one step's bookkeeping
    cdef ReadOp *ops                   # [n_experts * max_reads] of this step, in order of submission
    cdef Expert *active                # [n_experts] the distinct experts of this step
    cdef Ready *ready                  # [n_experts] those that are computed together
    cdef int64_t *first                # [n_experts + 1] first sorted pair of each expert
    cdef int64_t *position             # [pairs] sorted place of pair (token * top_k + choice)
    cdef const void **act_pointers     # [pairs] prepared x of each sorted pair
    cdef const void **mid_pointers     # [rows] into mids
    cdef uint8_t *acts                 # [max_tokens] prepared rows of x
    cdef uint8_t *mids                 # [rows] prepared middle rows
    cdef float *gate_rows              # [rows, inter]; silu(gate) * up replaces gate
    cdef float *up_rows                # [rows, inter]
    cdef float *out_rows               # [pairs, hidden]
    cdef void *memory                  # the one allocation behind all of them
    cdef int64_t act_stride
    # the arrays of a call, and views of them
    cdef tuple arrays                  # x, ids, weights, out
    cdef object ahead_array
    cdef const float[:, ::1] x_view
    cdef const int32_t[:, ::1] ids_view
    cdef const float[:, ::1] weights_view
    cdef float[:, ::1] out_view
    cdef const int32_t[:, ::1] ahead_view
    # the layer that is being computed
    cdef LayerShape *shape
    cdef const float *x
    cdef const int32_t *ids
    cdef const float *weights
    cdef float *out
    cdef int64_t layer, tokens, n_ops, n_ready, n_rows, chunk
    cdef const int32_t *ahead          # [tokens, top_k] what the next layer may want, NULL: not known
    cdef ReadOp *failed
    cdef int64_t io_wait_ns, compute_ns, bytes_read, hits, misses

    cdef int add_expert(self, int64_t key, const int64_t[:, ::1] reads, const int64_t[::1] matrices) except -1
    cdef int bind(self, x, ids, weights, out) except -1
    cdef int bind_ahead(self, ahead) except -1
    cdef bint group(self) noexcept nogil
    cdef void plan_reads(self, Expert *e) noexcept nogil
    cdef void end_reads(self, Expert *e) noexcept nogil
    cdef void try_acquire(self, Expert *e) noexcept nogil
    cdef void advance(self, Expert *e) noexcept nogil
    cdef void add_ready(self, Expert *e) noexcept nogil
    cdef int stream(self, int64_t base) noexcept nogil
    cdef void compute_ready(self) noexcept nogil
    cdef void run_tokens(self, mer_task_fn task) noexcept nogil
    cdef void spent(self, int64_t kind, int64_t since) noexcept nogil
    cdef void prepare_input(self, int64_t token) noexcept nogil
    cdef void gate_up(self, int64_t task) noexcept nogil
    cdef void prepare_middle(self, int64_t row) noexcept nogil
    cdef void down(self, int64_t task) noexcept nogil
    cdef void combine(self, int64_t token) noexcept nogil
