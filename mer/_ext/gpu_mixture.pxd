# The arithmetic of a mixture's layer on a CUDA device, beside a Mixture that does the rest.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint64_t

from mer._ext.decoder cimport mer_router
from mer._ext.device cimport Device, mer_gpu_product
from mer._ext.mixture cimport Mixture

cdef extern from "mer_gpu_decoder.h" nogil:
    enum:
        MER_GPU_MOST_GROUPS
    ctypedef struct mer_gpu_choice:
        uint64_t logits, bias, expert_scale, experts, gate_bias, up_bias, down_bias, gate_rows, up_rows, out_rows
        uint64_t ids, weights, places, index, products
        float scale, epsilon
        int32_t tokens, n_experts, top_k, n_groups, top_groups, group_best, sigmoid, normalise, inter, hidden, n_products

ctypedef struct Kernel:
    void *one                  # for few tokens a product
    void *many                 # for more
    bint blocks                # takes quantised activations

ctypedef struct Added:
    uint64_t weights[3]        # gate, up, down
    int64_t expert
    int64_t first              # of its pairs, in the order of experts
    int64_t count
    int64_t row                # its first one in the device's `gate_rows`, `up_rows` and `mids`


cdef class GpuMixture:
    cdef Device device
    cdef Mixture mixture
    cdef Kernel *kernels               # [format ids]
    cdef void *quantise
    cdef void *activate
    cdef void *activate_quantise
    cdef void *choose
    cdef readonly int64_t nbytes       # of the device's memory
    # the device's memory
    cdef uint64_t buffers              # one allocation; what follows are parts of it
    cdef uint64_t inputs               # as `staging`: x, index, products
    cdef uint64_t acts                 # [max_tokens, act_stride]
    cdef uint64_t gate_rows            # [pairs, inter]
    cdef uint64_t up_rows
    cdef uint64_t mids                 # [pairs, mid_stride]
    cdef uint64_t *biases              # [n_layers, 3]; 0: none
    cdef uint64_t out_rows             # the mixture's, in the host's memory
    # what the device chooses, of up to `few` tokens: logits [few, n_experts], the rest as mer_gpu_choice has it
    cdef uint64_t chosen_logits, chosen_weights, chosen_places, chosen_rows
    cdef int64_t few
    # what is uploaded: x f32 [tokens, hidden], index i32 [pairs], products [3 * n_experts], experts, pinned
    cdef char *staging
    cdef int64_t x_bytes, index_bytes, products_bytes
    cdef mer_gpu_product *products
    cdef uint64_t *experts             # [n_layers, n_experts, 3] where gate, up and down are in the device's memory
    cdef Added *added                  # [n_experts] of the layer's call; up to n_launched they have been started
    cdef bint pinned_staging, pinned_mixture
    cdef void *done                    # an event
    # the layer that is being computed
    cdef bint begun, under_way
    cdef int64_t n_added, n_launched, n_rows

    # A layer's turn, after Mixture.begin: nothing is under way.
    cdef void begin(self) noexcept nogil
    # One more expert of the layer whose weights are, or will be, at `slot`.
    cdef void add(self, int64_t expert, uint64_t slot, const int64_t *places) noexcept nogil
    # Starts what was added since the last time. 0, or the driver's error.
    cdef int launch(self) noexcept nogil
    # Whether everything that was started is done; waits for it: the rows of its experts are in the mixture then.
    cdef int wait(self) noexcept nogil

    # Whether the device can choose as this router does, for up to `few` tokens.
    cdef bint can_choose(self, const mer_router *router) noexcept nogil
    # Whether experts of a layer take quantised rows.
    cdef bint takes_blocks(self, int64_t layer) noexcept nogil
    # Uploads a layer's `experts`.
    cdef int list_experts(self, int64_t layer) noexcept nogil
    # Starts a layer whose `experts` are there, of tokens whose router's products are in `chosen_logits`: x f32
    # [tokens, hidden] and, where it takes blocks, its prepared rows on the device -> chosen_rows, -places, -weights; ids,
    # i32 [tokens, top_k] of the host. `add` and `launch` have no part in it, and `wait` does not wait for it.
    cdef int compute_chosen(self, int64_t layer, int64_t tokens, const mer_router *router, uint64_t bias,
                            uint64_t expert_scale, uint64_t x, uint64_t acts, uint64_t ids) noexcept nogil

    cdef int64_t choice_words(self, int64_t n_experts, int64_t pairs) noexcept nogil
    cdef int multiply_all(self, int64_t first, int64_t n, int64_t row, int64_t rows, uint64_t x,
                          int64_t most) noexcept nogil
    cdef int start(self) noexcept nogil
    cdef void list_products(self) noexcept nogil
    cdef int activate_rows(self, int64_t first, int64_t n) noexcept nogil
    cdef int multiply(self, int fmt, int64_t first, int64_t n, uint64_t x, int64_t rows, int64_t cols,
                      int64_t most) noexcept nogil
    cdef int prepare(self, uint64_t x, uint64_t acts, int64_t stride, int64_t cols, int64_t n) noexcept nogil
