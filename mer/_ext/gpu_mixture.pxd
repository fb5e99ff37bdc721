# The arithmetic of a mixture's layer on a CUDA device, beside a Mixture that does the rest.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint64_t

from mer._ext.device cimport Device, mer_gpu_product
from mer._ext.mixture cimport Mixture

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
    # what is uploaded: x f32 [tokens, hidden], index i32 [pairs], products [3 * n_experts], pinned
    cdef char *staging
    cdef int64_t x_bytes, index_bytes, products_bytes
    cdef mer_gpu_product *products
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

    cdef int start(self) noexcept nogil
    cdef void list_products(self) noexcept nogil
    cdef int activate_rows(self, int64_t first, int64_t n) noexcept nogil
    cdef int multiply(self, int fmt, int64_t first, int64_t n, uint64_t x, int64_t rows, int64_t cols,
                      int64_t most) noexcept nogil
    cdef int prepare(self, uint64_t x, uint64_t acts, int64_t stride, int64_t cols, int64_t n) noexcept nogil
