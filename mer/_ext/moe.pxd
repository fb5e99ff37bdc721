# The streamed mixture: routes tokens to experts, reads the missing ones, multiplies each as it arrives.
from libc.stdint cimport int32_t, int64_t, uint8_t

from mer._ext.cache cimport ExpertCache
from mer._ext.kernels cimport Kernels, Pool, mer_task_fn
from mer._ext.uring cimport Reader, ReadOp

ctypedef struct LayerShape:
    int gate_format
    int down_format
    int64_t hidden
    int64_t inter
    int64_t gate_act_bytes     # one prepared row of x
    int64_t down_act_bytes     # one prepared row of silu(gate) * up

ctypedef struct ReadPlan:
    int64_t file
    int64_t offset             # aligned, bytes in the file
    int64_t length             # aligned
    int64_t needed             # bytes of it that must arrive: the file may end before the aligned end
    int64_t slot_offset        # where in the slot it lands

ctypedef struct Ready:
    const uint8_t *gate
    const uint8_t *up
    const uint8_t *down
    int64_t first              # its first (token, choice) pair in sorted order
    int64_t count


cdef class ExpertStreamer:
    cdef ExpertCache cache
    cdef Reader reader
    cdef Kernels kernels
    cdef Pool pool
    cdef readonly int64_t n_layers, n_experts, top_k, max_tokens, max_reads
    cdef LayerShape *layers
    cdef ReadPlan *reads               # [n_layers * n_experts, max_reads]; length 0: not used
    cdef int64_t *matrices             # [n_layers * n_experts, 3] offsets in the slot: gate, up, down
    cdef ReadOp *ops                   # [n_experts, max_reads]
    # one step's bookkeeping, sized for n_experts or max_tokens * top_k
    cdef int64_t *first                # [n_experts + 1] first sorted pair of each expert
    cdef int64_t *position             # [pairs] sorted place of pair (token * top_k + choice)
    cdef int64_t *active               # [n_experts] distinct experts of this step
    cdef int64_t *slots                # [n_experts]
    cdef uint8_t *states               # [n_experts] by place in `active`
    cdef Ready *ready                  # [n_experts]
    cdef const void **act_pointers     # [pairs] prepared x of each sorted pair
    cdef const void **mid_pointers     # [pairs] prepared middle row of each sorted pair
    cdef uint8_t *acts                 # [max_tokens] prepared rows of x
    cdef uint8_t *mids                 # [pairs] prepared middle rows
    cdef float *gate_rows              # [pairs, inter]; silu(gate) * up replaces gate
    cdef float *up_rows                # [pairs, inter]
    cdef float *out_rows               # [pairs, hidden]
    cdef void *arena                   # the one allocation behind all of them
    # the layer that is being computed
    cdef LayerShape *shape
    cdef const float *x
    cdef const float *weights
    cdef float *out
    cdef int64_t tokens, n_ready, chunk
    cdef int64_t failed_file, failed_offset, failed_length
    cdef int64_t io_wait_ns, compute_ns, bytes_read, hits, misses

    cdef int group(self, const int32_t *ids) noexcept nogil
    cdef void start_read(self, int64_t key, int64_t place) noexcept nogil
    cdef int poll_read(self, int64_t key, int64_t place) noexcept nogil
    cdef void try_acquire(self, int64_t key, int64_t place) noexcept nogil
    cdef int advance(self, int64_t key, int64_t place) noexcept nogil
    cdef void add_ready(self, int64_t key, int64_t place) noexcept nogil
    cdef int stream(self, int64_t layer) noexcept nogil
    cdef void compute_ready(self) noexcept nogil
    cdef void run_tokens(self, mer_task_fn task) noexcept nogil
    cdef void prepare_input(self, int64_t token) noexcept nogil
    cdef void gate_up(self, int64_t task) noexcept nogil
    cdef void prepare_middle(self, int64_t task) noexcept nogil
    cdef void down(self, int64_t task) noexcept nogil
    cdef void combine(self, int64_t token) noexcept nogil
