"""The arithmetic of a mixture's layer: tokens grouped by expert, the products of the experts that are at hand, and each
token's weighted sum.

The result does not depend on which experts are computed together, nor in which order: every (token, choice) pair has
an output row of its own, and the rows of a token are added in the router's order.
"""
import numpy as np

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset
from cpython.bytes cimport PyBytes_FromStringAndSize
from posix.stdlib cimport posix_memalign

from mer._ext.kernels cimport Kernels, Pool

cdef extern from "mer_formats.h" nogil:
    long mer_block_len(int fmt)
    size_t mer_row_bytes(int fmt, long cols)
    size_t mer_act_bytes(int fmt, long cols)
    int mer_act_is_q8(int fmt)

cdef extern from "mer_narrow.h" nogil:
    void mer_narrow(int fmt, const float *x, long n, uint16_t *to)
    void mer_widen_rows(int fmt, const uint16_t *h, long n, float *to)
    void mer_round(int fmt, const float *x, long n, float *to)

cdef extern from "mer_group.h" nogil:
    int mer_group(const int32_t *ids, int64_t tokens, int64_t top_k, int64_t n_experts, int64_t *first,
                  int64_t *position)


cdef enum:
    PAGE = 4096
    F32 = 0
    F16 = 1
    BF16 = 30


cdef void input_task(void *arg, long task, int thread) noexcept nogil:
    (<Mixture>arg).prepare_input(task)


cdef void gate_up_task(void *arg, long task, int thread) noexcept nogil:
    (<Mixture>arg).gate_up(task)


cdef void middle_task(void *arg, long task, int thread) noexcept nogil:
    (<Mixture>arg).prepare_middle(task)


cdef void down_task(void *arg, long task, int thread) noexcept nogil:
    (<Mixture>arg).down(task)


cdef void combine_task(void *arg, long task, int thread) noexcept nogil:
    (<Mixture>arg).combine_token(task)


cdef inline void add_rows(float *y, int64_t stride, int64_t count, const float *bias, int64_t r0,
                          int64_t r1) noexcept nogil:
    """y[t, r] += bias[r] for r in [r0, r1)."""
    cdef int64_t t, r
    for t in range(count):
        for r in range(r0, r1):
            y[t * stride + r] += bias[r]


cdef list _sizes(const int64_t[:, ::1] layers, int64_t n_experts, int64_t top_k, int64_t max_tokens):
    """Bytes of a mixture's buffers, in the order in which it lays them out. Raises ValueError."""
    cdef int64_t i, hidden = 0, inter = 0, act = 0, mid = 0
    if not 1 <= top_k <= n_experts or max_tokens < 1:
        raise ValueError(f"top_k {top_k} must be in 1..{n_experts} and max_tokens {max_tokens} above 0")
    for i in range(layers.shape[0]):
        for fmt, cols in ((layers[i, 0], layers[i, 3]), (layers[i, 1], layers[i, 3]), (layers[i, 2], layers[i, 4])):
            if cols < 1 or mer_block_len(fmt) == 0 or cols % mer_block_len(fmt):
                raise ValueError(f"layer {i}: no kernel for weights of format {fmt} with {cols} columns")
        # Of gate and up in different formats of blocks x is prepared once.
        if layers[i, 0] != layers[i, 1] and not (mer_act_is_q8(<int>layers[i, 0]) and mer_act_is_q8(<int>layers[i, 1])):
            raise ValueError(f"layer {i}: no kernels for gate and up in the formats {layers[i, 0]} and {layers[i, 1]}")
        hidden, inter = max(hidden, layers[i, 3]), max(inter, layers[i, 4])
        act = max(act, <int64_t>mer_act_bytes(<int>layers[i, 0], layers[i, 3]))
        mid = max(mid, <int64_t>mer_act_bytes(<int>layers[i, 2], layers[i, 4]))
    cdef int64_t pairs = max_tokens * top_k
    cdef int64_t rows = min(pairs, BATCH_ROWS + max_tokens)
    sizes = (
        layers.shape[0] * sizeof(LayerShape), n_experts * sizeof(Ready), (n_experts + 1) * 8, pairs * 8,
        pairs * sizeof(void *), rows * sizeof(void *), max_tokens * act, rows * mid, rows * inter * 4,
        rows * inter * 4, pairs * hidden * 4, n_experts,
    )
    return [(size + 63) // 64 * 64 for size in sizes]


def mixture_bytes(const int64_t[:, ::1] layers, int64_t n_experts, int64_t top_k, int64_t max_tokens):
    """Bytes that a Mixture with these arguments allocates. Raises ValueError as it does."""
    return sum(_sizes(layers, n_experts, top_k, max_tokens))


def rounding_bytes(const int64_t[:, ::1] layers, int64_t max_tokens):
    """Bytes that `Mixture.round_to` allocates beside those."""
    return max_tokens * max([layers[i, 3] for i in range(layers.shape[0])]) * 4


def narrow(int fmt, const float[:, ::1] rows):
    """f32 [n, hidden] as bytes of F32, F16 or BF16 (fmt: a format's id), little-endian.

    To the nearest, ties to even; beyond the largest number of F16, 65504, or BF16 infinity. Raises ValueError for
    another format.
    """
    _check_rounding(fmt)
    cdef int64_t count = rows.shape[0] * rows.shape[1]
    cdef bytes made = PyBytes_FromStringAndSize(NULL, count * (4 if fmt == F32 else 2))
    cdef char *to = made
    if count and fmt == F32:
        memcpy(to, &rows[0, 0], count * 4)
    elif count:
        mer_narrow(fmt, &rows[0, 0], count, <uint16_t *>to)
    return made


def widen(int fmt, const uint8_t[::1] data, int64_t hidden):
    """Of such bytes f32 [n, hidden]. Raises ValueError for another format, or bytes that are no rows."""
    _check_rounding(fmt)
    cdef int64_t size = 4 if fmt == F32 else 2, count = data.shape[0] // size
    if hidden < 1 or data.shape[0] % (hidden * size):
        raise ValueError(f"{data.shape[0]} bytes are no rows of {hidden}")
    found = np.empty((count // hidden, hidden), np.float32)
    cdef float[:, ::1] rows = found
    if count and fmt == F32:
        memcpy(&rows[0, 0], &data[0], count * 4)
    elif count:
        mer_widen_rows(fmt, <const uint16_t *>&data[0], count, &rows[0, 0])
    return found


cdef int _check_rounding(int fmt) except -1:
    if fmt != F32 and fmt != F16 and fmt != BF16:
        raise ValueError(f"rows can't be rounded to format {fmt}")
    return 0


cdef class Mixture:
    """Computes out = sum_k weight_k * down(silu(gate(x)) * up(x)), an expert's part when its weights are there.

    layers: int64 [n_layers, 5]: format ids of gate, up and down, hidden, intermediate size. At most max_tokens tokens
    a call, each with top_k of n_experts distinct experts. Raises ValueError for what does not fit.
    """

    def __cinit__(self, Kernels kernels not None, Pool pool not None, const int64_t[:, ::1] layers, int64_t n_experts,
                  int64_t top_k, int64_t max_tokens):
        cdef int64_t i, act = 0, mid = 0, rows
        sizes = _sizes(layers, n_experts, top_k, max_tokens)
        self.kernels, self.pool = kernels, pool
        self.arrays = (None, None, None, None)
        self.n_layers, self.n_experts, self.top_k, self.max_tokens = layers.shape[0], n_experts, top_k, max_tokens
        self.scratch_bytes = self.memory_bytes = sum(sizes)
        # Whole pages, since a device may be given access to them.
        if posix_memalign(&self.memory, PAGE, <size_t>(self.memory_bytes + PAGE - 1) // PAGE * PAGE):
            raise MemoryError(f"no memory for {self.memory_bytes} bytes of expert buffers")
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        cdef char *memory = <char *>self.memory
        self.layers = <LayerShape *>(memory + <int64_t>starts[0])
        self.ready = <Ready *>(memory + <int64_t>starts[1])
        self.first = <int64_t *>(memory + <int64_t>starts[2])
        self.position = <int64_t *>(memory + <int64_t>starts[3])
        self.act_pointers = <const void **>(memory + <int64_t>starts[4])
        self.mid_pointers = <const void **>(memory + <int64_t>starts[5])
        self.acts = <uint8_t *>(memory + <int64_t>starts[6])
        self.mids = <uint8_t *>(memory + <int64_t>starts[7])
        self.gate_rows = <float *>(memory + <int64_t>starts[8])
        self.up_rows = <float *>(memory + <int64_t>starts[9])
        self.out_rows = <float *>(memory + <int64_t>starts[10])
        self.weighted = <uint8_t *>(memory + <int64_t>starts[11])
        for i in range(self.n_layers):
            self.layers[i] = LayerShape(<int>layers[i, 0], <int>layers[i, 1], <int>layers[i, 2], layers[i, 3],
                                        layers[i, 4], NULL, NULL, NULL)
            act = max(act, <int64_t>mer_act_bytes(<int>layers[i, 0], layers[i, 3]))
            mid = max(mid, <int64_t>mer_act_bytes(<int>layers[i, 2], layers[i, 4]))
        self.act_stride = act
        rows = min(max_tokens * top_k, BATCH_ROWS + max_tokens)
        for i in range(rows):
            self.mid_pointers[i] = self.mids + i * mid

    def __dealloc__(self):
        free(self.memory)
        free(self.rounded)

    def round_to(self, int fmt):
        """Round x, and the weighted output row of each (token, choice) pair, to F16 or BF16 (fmt: a format's id), as
        `narrow` does, so that they can go to another machine in as many bits and come back; F32: as they are.

        Raises ValueError for another format.
        """
        cdef int64_t i, hidden = max([self.layers[i].hidden for i in range(self.n_layers)])
        _check_rounding(fmt)
        if fmt != F32 and self.rounded is NULL:
            if posix_memalign(<void **>&self.rounded, 64, self.max_tokens * hidden * 4):
                raise MemoryError(f"no memory for {self.max_tokens} rounded rows of {hidden}")
            self.scratch_bytes += self.max_tokens * hidden * 4
        self.arrays = (None, None, None, None)
        self.rounding = fmt

    cdef object input_rows(self):
        """f32 [T, hidden]: x of the call, as it is multiplied."""
        if self.rounding == F32:
            return np.asarray(self.arrays[0])
        return np.asarray(<float[:self.tokens, :self.shape.hidden]>self.rounded)

    cdef int64_t row_bytes(self) noexcept nogil:
        return self.shape.hidden * (4 if self.rounding == F32 else 2)

    cdef void take_rows(self, int64_t expert, const uint8_t *data) noexcept nogil:
        cdef int64_t count = self.count(expert) * self.shape.hidden
        cdef float *rows = self.out_rows + self.first[expert] * self.shape.hidden
        self.weighted[expert] = 1
        if self.rounding == F32:
            memcpy(rows, data, count * 4)
        else:
            mer_widen_rows(self.rounding, <const uint16_t *>data, count, rows)

    cdef void matrix_bytes(self, int64_t key, int64_t *sizes) noexcept nogil:
        cdef LayerShape *shape = &self.layers[key // self.n_experts]
        sizes[0] = shape.inter * <int64_t>mer_row_bytes(shape.gate_format, shape.hidden)
        sizes[1] = shape.inter * <int64_t>mer_row_bytes(shape.up_format, shape.hidden)
        sizes[2] = shape.hidden * <int64_t>mer_row_bytes(shape.down_format, shape.inter)

    cdef int begin(self, int64_t layer, x, ids, weights, out) except -1:
        cdef int64_t i
        if not 0 <= layer < self.n_layers:
            raise IndexError(f"layer {layer} is outside 0..{self.n_layers - 1}")
        self.shape = &self.layers[layer]
        self.bind(x, ids, weights, out)
        if mer_group(self.ids, self.tokens, self.top_k, self.n_experts, self.first, self.position):
            raise ValueError(f"the ids of a token must be distinct and in 0..{self.n_experts - 1}")
        memset(self.weighted, 0, self.n_experts)
        for i in range(self.tokens * self.top_k):
            self.act_pointers[self.position[i]] = self.acts + (i // self.top_k) * self.act_stride
        return 0

    cdef int bind(self, x, ids, weights, out) except -1:
        """Takes up the arrays of a call; looking into them takes longer than comparing them with the last call's."""
        if not (x is self.arrays[0] and ids is self.arrays[1] and weights is self.arrays[2]
                and out is self.arrays[3]):
            self.arrays = (None, None, None, None)
            self.x_view, self.ids_view, self.weights_view, self.out_view = x, ids, weights, out
            self.arrays = (x, ids, weights, out)
        self.tokens = self.x_view.shape[0]
        if not (0 < self.tokens <= self.max_tokens and self.x_view.shape[1] == self.shape.hidden
                and self.ids_view.shape[0] == self.tokens and self.ids_view.shape[1] == self.top_k
                and self.weights_view.shape[0] == self.tokens and self.weights_view.shape[1] == self.top_k
                and self.out_view.shape[0] == self.tokens and self.out_view.shape[1] == self.shape.hidden):
            raise ValueError(
                f"shapes do not fit: x {np.shape(x)}, ids {np.shape(ids)}, weights {np.shape(weights)}, "
                f"out {np.shape(out)}; hidden {self.shape.hidden}, top_k {self.top_k}, max_tokens {self.max_tokens}")
        self.given, self.ids = &self.x_view[0, 0], &self.ids_view[0, 0]
        self.x = self.given if self.rounding == F32 else self.rounded
        self.weights, self.out = &self.weights_view[0, 0], &self.out_view[0, 0]
        return 0

    cdef void prepare(self) noexcept nogil:
        self.pool.run(input_task, <void *>self, self.tokens)

    cdef void clear(self) noexcept nogil:
        self.n_ready = self.n_rows = 0

    cdef void add_ready(self, int64_t expert, const uint8_t *slot, const int64_t *places) noexcept nogil:
        cdef int64_t first = self.first[expert], count = self.first[expert + 1] - first
        self.ready[self.n_ready] = Ready(slot + places[0], slot + places[1], slot + places[2], expert, first, count,
                                         self.n_rows)
        self.n_ready += 1
        self.n_rows += count

    cdef int64_t count(self, int64_t expert) noexcept nogil:
        return self.first[expert + 1] - self.first[expert]

    cdef void compute_ready(self) noexcept nogil:
        """As three passes over all of its experts at once."""
        cdef LayerShape *shape = self.shape
        # Rows per task: enough tasks for every thread, enough rows to be worth a turn at the counter.
        self.chunk = max(<int64_t>16, min(<int64_t>128, shape.inter * self.n_ready // (8 * self.pool.n_threads)))
        self.pool.run(gate_up_task, <void *>self, self.n_ready * ((shape.inter + self.chunk - 1) // self.chunk))
        self.pool.run(middle_task, <void *>self, self.n_rows)
        self.pool.run(down_task, <void *>self, self.n_ready * ((shape.hidden + self.chunk - 1) // self.chunk))

    cdef void combine(self) noexcept nogil:
        self.pool.run(combine_task, <void *>self, self.tokens)

    cdef void prepare_input(self, int64_t token) noexcept nogil:
        cdef int64_t hidden = self.shape.hidden
        if self.rounding != F32:
            mer_round(self.rounding, self.given + token * hidden, hidden, self.rounded + token * hidden)
        self.kernels.prepare(self.shape.gate_format, self.x + token * self.shape.hidden,
                             self.acts + token * self.act_stride, self.shape.hidden)

    cdef void gate_up(self, int64_t task) noexcept nogil:
        """Some rows of one expert's gate and up for all of its tokens, then silu(gate) * up in place of gate."""
        cdef LayerShape *shape = self.shape
        cdef int64_t chunks = (shape.inter + self.chunk - 1) // self.chunk
        cdef Ready *e = &self.ready[task // chunks]
        cdef int64_t r0 = (task % chunks) * self.chunk
        cdef int64_t r1 = min(r0 + self.chunk, shape.inter)
        cdef float *gate = self.gate_rows + e.row * shape.inter
        cdef float *up = self.up_rows + e.row * shape.inter
        cdef const void **acts = self.act_pointers + e.first
        cdef int64_t i
        self.kernels.matmul(shape.gate_format, e.gate, shape.hidden, r0, r1, acts, e.count, gate, shape.inter)
        self.kernels.matmul(shape.up_format, e.up, shape.hidden, r0, r1, acts, e.count, up, shape.inter)
        if shape.gate_bias is not NULL:
            add_rows(gate, shape.inter, e.count, shape.gate_bias + e.expert * shape.inter, r0, r1)
            add_rows(up, shape.inter, e.count, shape.up_bias + e.expert * shape.inter, r0, r1)
        gate += r0
        up += r0
        for i in range(e.count):
            if self.gelu_gate:
                self.kernels.geglu(gate, up, gate, r1 - r0)
            elif self.clamped:
                self.kernels.clamped_swiglu(gate, up, gate, r1 - r0, self.alpha, self.limit, self.added)
            else:
                self.kernels.swiglu(gate, up, gate, r1 - r0)
            gate += shape.inter
            up += shape.inter

    cdef void prepare_middle(self, int64_t row) noexcept nogil:
        self.kernels.prepare(self.shape.down_format, self.gate_rows + row * self.shape.inter,
                             <void *>self.mid_pointers[row], self.shape.inter)

    cdef void down(self, int64_t task) noexcept nogil:
        cdef LayerShape *shape = self.shape
        cdef int64_t chunks = (shape.hidden + self.chunk - 1) // self.chunk
        cdef Ready *e = &self.ready[task // chunks]
        cdef int64_t r0 = (task % chunks) * self.chunk
        cdef int64_t r1 = min(r0 + self.chunk, shape.hidden)
        cdef float *out = self.out_rows + e.first * shape.hidden
        self.kernels.matmul(shape.down_format, e.down, shape.inter, r0, r1, self.mid_pointers + e.row, e.count, out,
                            shape.hidden)
        if shape.down_bias is not NULL:
            add_rows(out, shape.hidden, e.count, shape.down_bias + e.expert * shape.hidden, r0, r1)

    cdef void combine_token(self, int64_t token) noexcept nogil:
        """out[t] = the sum over its choices, in the router's order, of weight * expert output."""
        cdef int64_t hidden = self.shape.hidden, k, i, pair
        cdef float *out = self.out + token * hidden
        cdef float *row
        cdef float w
        memset(out, 0, hidden * sizeof(float))
        for k in range(self.top_k):
            pair = token * self.top_k + k
            w = self.weights[pair]
            row = self.out_rows + self.position[pair] * hidden
            if self.weighted[self.ids[pair]]:
                w = 1.0
            elif self.rounding != F32:
                for i in range(hidden):
                    row[i] *= w
                mer_round(self.rounding, row, hidden, row)
                w = 1.0
            for i in range(hidden):
                out[i] += w * row[i]

    def add_biases(self, list layers):
        """Of each layer f32 [n_experts, inter], the same and [n_experts, hidden]: added to what gate, up and down
        give. Raises ValueError for arrays of other shapes.
        """
        cdef const float[:, ::1] gate, up, down
        cdef LayerShape *shape
        if len(layers) != self.n_layers:
            raise ValueError(f"biases of {len(layers)} layers, there are {self.n_layers}")
        self.biases = layers
        for i, each in enumerate(layers):
            shape = &self.layers[<int64_t>i]
            gate, up, down = each
            wanted = [(self.n_experts, shape.inter)] * 2 + [(self.n_experts, shape.hidden)]
            if [np.shape(array) for array in each] != wanted:
                raise ValueError(f"layer {i}: biases must be of shapes {wanted}")
            shape.gate_bias, shape.up_bias, shape.down_bias = &gate[0, 0], &up[0, 0], &down[0, 0]

    def gelu(self):
        """Use gelu(g) * u for silu(g) * u."""
        self.gelu_gate = True

    def clamp(self, float alpha, float limit, float added):
        """Use g * sigmoid(alpha * g) * (u + added) for silu(g) * u: g at the most limit, u within -limit to limit."""
        self.clamped, self.alpha, self.limit = True, alpha, limit
        self.added = added
