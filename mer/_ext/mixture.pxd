# The arithmetic of a mixture's layer: which tokens go to which expert, their products, the weighted sum.
from libc.stdint cimport int32_t, int64_t, uint8_t

from mer._ext.kernels cimport Kernels, Pool, mer_task_fn

cdef enum:
    # Once this many (token, expert) pairs are ready they are computed, and then the reads looked at again:
    # so a long prefill keeps the device's queue full, and its middle rows stay in the processor's cache.
    BATCH_ROWS = 256

ctypedef struct LayerShape:
    int gate_format
    int up_format
    int down_format
    int64_t hidden
    int64_t inter
    const float *gate_bias     # [n_experts, inter]; NULL: none
    const float *up_bias       # [n_experts, inter]
    const float *down_bias     # [n_experts, hidden]

ctypedef struct Ready:
    const uint8_t *gate
    const uint8_t *up
    const uint8_t *down
    int64_t expert
    int64_t first
    int64_t count
    int64_t row                # its first row in `gate_rows`, `up_rows` and `mids`


cdef class Mixture:
    cdef Kernels kernels
    cdef Pool pool
    cdef readonly int64_t n_layers, n_experts, top_k, max_tokens, scratch_bytes, memory_bytes
    cdef LayerShape *layers
    cdef list biases                   # what the layers' biases point into
    cdef bint clamped, gelu_gate
    cdef float alpha, limit, added     # of the clamped SwiGLU
    # one step's bookkeeping
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
    cdef uint8_t *weighted             # [n_experts] whether its rows came with their weights
    cdef void *memory                  # the one allocation behind all of them
    cdef int64_t act_stride
    cdef int rounding                  # format of x and of the output rows, see round_to
    cdef float *rounded                # [max_tokens, hidden] x in it; NULL where it is F32
    # the arrays of a call, and views of them
    cdef tuple arrays                  # x, ids, weights, out
    cdef const float[:, ::1] x_view
    cdef const int32_t[:, ::1] ids_view
    cdef const float[:, ::1] weights_view
    cdef float[:, ::1] out_view
    # the layer that is being computed
    cdef LayerShape *shape
    cdef const float *given            # x as it came
    cdef const float *x                # as it is multiplied
    cdef const int32_t *ids
    cdef const float *weights
    cdef float *out
    cdef int64_t tokens, n_ready, n_rows, chunk

    # The sizes of expert `key`'s gate, up and down in bytes.
    cdef void matrix_bytes(self, int64_t key, int64_t *sizes) noexcept nogil
    # Takes up the arrays of a layer's call and sorts its pairs by expert. Raises IndexError, ValueError.
    cdef int begin(self, int64_t layer, x, ids, weights, out) except -1
    # Then, on the pool: each token made ready for products.
    cdef void prepare(self) noexcept nogil
    # `ready` is empty again; one more expert of the layer in it, its gate, up and down at `places` in the slot.
    cdef void clear(self) noexcept nogil
    cdef void add_ready(self, int64_t expert, const uint8_t *slot, const int64_t *places) noexcept nogil
    # How many tokens of the call want an expert of the layer.
    cdef int64_t count(self, int64_t expert) noexcept nogil
    # Everything in `ready`, on the pool.
    cdef void compute_ready(self) noexcept nogil
    # x as an array, for other machines; what a row of it, or of outputs, takes there.
    cdef object input_rows(self)
    cdef int64_t row_bytes(self) noexcept nogil
    # An expert's output rows as another machine sent them: weighted.
    cdef void take_rows(self, int64_t expert, const uint8_t *data) noexcept nogil
    # On the pool: out of the rows of all experts.
    cdef void combine(self) noexcept nogil

    cdef int bind(self, x, ids, weights, out) except -1
    cdef void prepare_input(self, int64_t token) noexcept nogil
    cdef void gate_up(self, int64_t task) noexcept nogil
    cdef void prepare_middle(self, int64_t row) noexcept nogil
    cdef void down(self, int64_t task) noexcept nogil
    cdef void combine_token(self, int64_t token) noexcept nogil
