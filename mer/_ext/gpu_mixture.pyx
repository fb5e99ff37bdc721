"""The arithmetic of a mixture's layer on a CUDA device: the same rows, byte for byte, as mixture.pyx computes.

x goes to the device once a layer, with the lists of who is multiplied with what; the experts' rows are written by the
device into the mixture's own memory, so the weighted sum finds them there. Weights are in the device's memory already.
"""
cimport cython
import numpy as np

from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from posix.stdlib cimport posix_memalign

from mer._ext.device cimport MER_STREAM_COMPUTE
from mer._ext.mixture cimport LayerShape

from mer.errors import GpuError

cdef extern from "mer_formats.h" nogil:
    size_t mer_row_bytes(int fmt, long cols)
    size_t mer_act_bytes(int fmt, long cols)
    int mer_act_is_q8(int fmt)

cdef extern from "mer_decoder.h" nogil:
    enum:
        MER_SCORE_SIGMOID
        MER_SCORE_SQRT_SOFTPLUS

cdef enum:
    MOST_SHARED = 48 << 10 # dynamic shared memory that needs no permission
    FORMAT_IDS = 40
    PAGE = 4096
    # As mer/gpu/kernels/mer_gpu.cuh has them: threads of a block, rows of a matrix that a block multiplies
    THREADS = 128
    ROWS = 8
    MANY_ROWS = 64         # of the kernel for many tokens, and how many of these
    MANY_TOKENS = 32
    MOST_Y = 65535         # of a grid
    FEW = 12               # tokens of a product up to which the kernel for few is faster
    WARPS = 4

# What the kernels are called, by ggml's numbers of the formats.
NAMES = {0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0", 10: "q2_k", 11: "q3_k", 12: "q4_k",
         13: "q5_k", 14: "q6_k", 20: "iq4_nl", 23: "iq4_xs", 30: "bf16", 39: "mxfp4"}


cdef int64_t padded(int64_t nbytes) noexcept nogil:
    return (nbytes + 255) // 256 * 256


cdef int64_t act_stride(int fmt, int64_t cols) noexcept nogil:
    """Bytes between two prepared rows: floats are taken as they are."""
    return <int64_t>mer_act_bytes(fmt, cols) if mer_act_is_q8(fmt) else 4 * cols


def staging_bytes(const int64_t[:, ::1] layers, int64_t n_experts, int64_t top_k, int64_t max_tokens):
    """Bytes of the host's memory for what is uploaded, of a Mixture with these arguments."""
    hidden = max([layers[i, 3] for i in range(layers.shape[0])])
    return (padded(max_tokens * hidden * 4) + padded(max_tokens * top_k * 4)
            + padded(n_experts * 3 * sizeof(mer_gpu_product)) + padded(layers.shape[0] * n_experts * 24))


def buffer_bytes(const int64_t[:, ::1] layers, int64_t n_experts, int64_t top_k, int64_t max_tokens):
    """Bytes of each of the device's buffers, of a Mixture with these arguments: what is uploaded, prepared inputs, rows
    of gate and up, their prepared products, what the device chooses. Raises GpuError for a format without a kernel.
    """
    cdef int64_t i, inter = 0, acts = 0, mids = 0, pairs = max_tokens * top_k, few = min(FEW, max_tokens)
    for i in range(layers.shape[0]):
        for fmt in (layers[i, 0], layers[i, 1], layers[i, 2]):
            if fmt not in NAMES:
                raise GpuError(f"weights of format {fmt} have no kernel on a graphics device")
        inter = max(inter, layers[i, 4])
        acts = max(acts, max_tokens * act_stride(<int>layers[i, 0], layers[i, 3]))
        mids = max(mids, pairs * act_stride(<int>layers[i, 2], layers[i, 4]))
    inputs = staging_bytes(layers, n_experts, top_k, max_tokens)
    hidden = max([layers[i, 3] for i in range(layers.shape[0])])
    chosen = padded(few * n_experts * 4) + 2 * padded(few * top_k * 4) + padded(few * top_k * hidden * 4)
    return [inputs, padded(acts), padded(pairs * inter * 4), padded(pairs * inter * 4), padded(mids), chosen]


@cython.no_gc_clear  # what it gives back belongs to the device
cdef class GpuMixture:
    """Computes experts of `mixture` on a device. Raises GpuError, GpuMemoryError where that can't be."""

    def __cinit__(self, Device device not None, Mixture mixture not None):
        cdef int64_t i, hidden = 0
        cdef int64_t[:, ::1] layers = np.zeros((mixture.n_layers, 5), np.int64)
        cdef LayerShape *shape
        self.device, self.mixture = device, mixture
        self.kernels = <Kernel *>calloc(FORMAT_IDS, sizeof(Kernel))
        self.biases = <uint64_t *>calloc(mixture.n_layers * 3, sizeof(uint64_t))
        self.added = <Added *>calloc(mixture.n_experts, sizeof(Added))
        if self.kernels is NULL or self.biases is NULL or self.added is NULL:
            raise MemoryError
        for i in range(mixture.n_layers):
            shape = &mixture.layers[i]
            hidden = max(hidden, shape.hidden)
            layers[i, 0], layers[i, 1], layers[i, 2] = shape.gate_format, shape.up_format, shape.down_format
            layers[i, 3], layers[i, 4] = shape.hidden, shape.inter
        sizes = buffer_bytes(layers, mixture.n_experts, mixture.top_k, mixture.max_tokens)
        for fmt in np.unique(np.asarray(layers)[:, :3]):
            self.find(fmt)
        self.quantise, self.activate = device.function("mer_quantise"), device.function("mer_activate")
        self.activate_quantise = device.function("mer_activate_quantise")
        self.choose = device.function("mer_choose")
        self.x_bytes = padded(mixture.max_tokens * hidden * 4)
        self.index_bytes = padded(mixture.max_tokens * mixture.top_k * 4)
        self.products_bytes = padded(mixture.n_experts * 3 * sizeof(mer_gpu_product))
        self.few = min(<int64_t>FEW, mixture.max_tokens)
        self.nbytes = sum(sizes)
        device.check(device.enter(), "making room for experts")
        self.take_host(<size_t>sizes[0])
        device.check(device.alloc(<size_t>self.nbytes, &self.buffers), f"taking {self.nbytes} bytes for activations")
        self.inputs = self.buffers
        self.acts = self.inputs + <uint64_t>sizes[0]
        self.gate_rows = self.acts + <uint64_t>sizes[1]
        self.up_rows = self.gate_rows + <uint64_t>sizes[2]
        self.mids = self.up_rows + <uint64_t>sizes[3]
        self.chosen_logits = self.mids + <uint64_t>sizes[4]
        self.chosen_weights = self.chosen_logits + <uint64_t>padded(self.few * mixture.n_experts * 4)
        self.chosen_places = self.chosen_weights + <uint64_t>padded(self.few * mixture.top_k * 4)
        self.chosen_rows = self.chosen_places + <uint64_t>padded(self.few * mixture.top_k * 4)
        device.check(device.new_event(&self.done), "making an event")
        self.upload_biases()

    def __dealloc__(self):
        cdef int64_t i
        if self.device is None:
            return
        self.wait()
        self.device.enter()
        if self.pinned_mixture:
            self.device.unpin(self.mixture.memory)
        if self.pinned_staging:
            self.device.unpin(self.staging)
        self.device.drop_event(self.done)
        self.device.free(self.buffers)
        for i in range(self.mixture.n_layers * 3 if self.biases is not NULL else 0):
            self.device.free(self.biases[i])
        free(self.staging)
        free(self.added)
        free(self.kernels)
        free(self.biases)

    def find(self, int fmt):
        """Its kernels."""
        self.kernels[fmt].one = self.device.function(f"mer_rows_{NAMES[fmt]}")
        self.kernels[fmt].many = self.device.function(f"mer_many_{NAMES[fmt]}")
        self.kernels[fmt].blocks = mer_act_is_q8(fmt)

    def take_host(self, size_t inputs):
        """Memory that both sides see: what is uploaded, and the mixture's rows."""
        cdef uint64_t pointer = 0
        cdef Mixture mixture = self.mixture
        if posix_memalign(<void **>&self.staging, PAGE, inputs):
            raise MemoryError(f"no memory for {inputs} bytes")
        memset(self.staging, 0, inputs)
        self.products = <mer_gpu_product *>(self.staging + self.x_bytes + self.index_bytes)
        self.experts = <uint64_t *>(self.staging + self.x_bytes + self.index_bytes + self.products_bytes)
        self.device.check(self.device.pin(self.staging, inputs, &pointer), f"pinning {inputs} bytes")
        self.pinned_staging = True
        self.device.check(self.device.pin(mixture.memory, mixture.memory_bytes, &pointer),
                          f"pinning {mixture.memory_bytes} bytes")
        self.pinned_mixture = True
        self.out_rows = pointer + <uint64_t>(<char *>mixture.out_rows - <char *>mixture.memory)

    def upload_biases(self):
        cdef Mixture mixture = self.mixture
        cdef LayerShape *shape
        cdef const float *source[3]
        cdef int64_t sizes[3]
        cdef int64_t i, j
        for i in range(mixture.n_layers):
            shape = &mixture.layers[i]
            if shape.gate_bias is NULL:
                continue
            source[0], source[1], source[2] = shape.gate_bias, shape.up_bias, shape.down_bias
            sizes[0] = sizes[1] = 4 * mixture.n_experts * shape.inter
            sizes[2] = 4 * mixture.n_experts * shape.hidden
            for j in range(3):
                self.device.check(self.device.alloc(sizes[j], &self.biases[3 * i + j]), "taking memory for biases")
                self.nbytes += sizes[j]
                self.device.check(self.device.upload(MER_STREAM_COMPUTE, self.biases[3 * i + j], source[j], sizes[j]),
                                  "copying biases")
        self.device.check(self.device.finish(MER_STREAM_COMPUTE), "copying biases")

    cdef void begin(self) noexcept nogil:
        self.begun = False
        self.n_added = self.n_launched = self.n_rows = 0

    cdef void add(self, int64_t expert, uint64_t slot, const int64_t *places) noexcept nogil:
        cdef Added *e = &self.added[self.n_added]
        cdef int64_t j
        e.expert, e.first, e.row = expert, self.mixture.first[expert], self.n_rows
        e.count = self.mixture.first[expert + 1] - e.first
        for j in range(3):
            e.weights[j] = slot + <uint64_t>places[j]
        self.n_added += 1
        self.n_rows += e.count

    cdef int start(self) noexcept nogil:
        """x and which of its rows each pair takes."""
        cdef LayerShape *shape = self.mixture.shape
        cdef int32_t *index = <int32_t *>(self.staging + self.x_bytes)
        cdef int64_t i, tokens = self.mixture.tokens, top_k = self.mixture.top_k, pairs = tokens * top_k
        cdef int64_t nbytes = tokens * shape.hidden * 4
        cdef int error = self.device.enter()
        memcpy(self.staging, self.mixture.x, nbytes)
        for i in range(pairs):
            index[self.mixture.position[i]] = <int32_t>(i // top_k)
        if error == 0:
            error = self.device.upload(MER_STREAM_COMPUTE, self.inputs, self.staging, nbytes)
        if error == 0:
            error = self.device.upload(MER_STREAM_COMPUTE, self.inputs + <uint64_t>self.x_bytes, index, pairs * 4)
        if error == 0 and self.kernels[shape.gate_format].blocks:
            error = self.prepare(self.inputs, self.acts, act_stride(shape.gate_format, shape.hidden), shape.hidden,
                                 tokens)
        self.begun = True
        return error

    cdef void list_products(self) noexcept nogil:
        """Of the experts that have been added since the last launch: gates, then ups, then downs."""
        cdef LayerShape *shape = self.mixture.shape
        cdef const uint64_t *bias = &self.biases[3 * (shape - self.mixture.layers)]
        cdef int64_t i, n = self.n_added - self.n_launched
        cdef uint64_t index = self.inputs + <uint64_t>self.x_bytes, row, one, other
        cdef mer_gpu_product *p = &self.products[3 * self.n_launched]
        cdef Added *e
        for i in range(n):
            e = &self.added[self.n_launched + i]
            row = <uint64_t>(e.row * shape.inter * 4)
            one, other = <uint64_t>(e.expert * shape.inter * 4), <uint64_t>(e.expert * shape.hidden * 4)
            p[i] = mer_gpu_product(e.weights[0], bias[0] + one if bias[0] else 0, self.gate_rows + row,
                                   index + <uint64_t>(e.first * 4), 0, <int32_t>e.count)
            p[n + i] = mer_gpu_product(e.weights[1], bias[1] + one if bias[1] else 0, self.up_rows + row,
                                       index + <uint64_t>(e.first * 4), 0, <int32_t>e.count)
            p[2 * n + i] = mer_gpu_product(e.weights[2], bias[2] + other if bias[2] else 0,
                                           self.out_rows + <uint64_t>(e.first * shape.hidden * 4), 0,
                                           <int32_t>e.row, <int32_t>e.count)

    cdef int launch(self) noexcept nogil:
        cdef LayerShape *shape = self.mixture.shape
        cdef int64_t n = self.n_added - self.n_launched, first = 3 * self.n_launched, i, most = 0
        cdef int64_t row, rows
        cdef uint64_t x = self.acts if self.kernels[shape.gate_format].blocks else self.inputs
        cdef int error = 0
        if n == 0:
            return 0
        row = self.added[self.n_launched].row
        rows = self.n_rows - row
        for i in range(self.n_launched, self.n_added):
            most = max(most, self.added[i].count)
        self.list_products()
        self.n_launched, self.under_way = self.n_added, True
        if not self.begun:
            error = self.start()
        if error == 0:
            error = self.device.upload(
                MER_STREAM_COMPUTE, self.inputs + <uint64_t>(<char *>&self.products[first] - self.staging),
                &self.products[first], 3 * n * sizeof(mer_gpu_product))
        return error if error else self.multiply_all(first, n, row, rows, x, most)

    cdef int multiply_all(self, int64_t first, int64_t n, int64_t row, int64_t rows, uint64_t x,
                          int64_t most) noexcept nogil:
        """What n experts do whose products are listed from `first` on, with prepared rows at x; theirs are [row, row + rows)."""
        cdef LayerShape *shape = self.mixture.shape
        cdef int error
        if shape.gate_format == shape.up_format:
            error = self.multiply(shape.gate_format, first, 2 * n, x, shape.inter, shape.hidden, most)
        else:
            error = self.multiply(shape.gate_format, first, n, x, shape.inter, shape.hidden, most)
            if error == 0:
                error = self.multiply(shape.up_format, first + n, n, x, shape.inter, shape.hidden, most)
        if error == 0:
            error = self.activate_rows(row, rows)
        x = self.mids if self.kernels[shape.down_format].blocks else self.gate_rows
        if error == 0:
            error = self.multiply(shape.down_format, first + 2 * n, n, x, shape.hidden, shape.inter, most)
        return error

    cdef int multiply(self, int fmt, int64_t first, int64_t n, uint64_t x, int64_t rows, int64_t cols,
                      int64_t most) noexcept nogil:
        """The products [first, first + n) of rows x cols weights with prepared rows at x."""
        cdef uint64_t products = self.inputs + <uint64_t>(<char *>&self.products[first] - self.staging)
        cdef long stride = act_stride(fmt, cols), y_stride = rows
        cdef int n_products = <int>n, n_rows = <int>rows, n_cols = <int>cols
        cdef unsigned int[3] grid = [<unsigned int>((rows + ROWS - 1) // ROWS), <unsigned int>n, 1]
        cdef void **arguments = [&products, &n_products, &x, &stride, &n_rows, &n_cols, &y_stride]
        cdef void *kernel = self.kernels[fmt].one
        if most > FEW:
            kernel = self.kernels[fmt].many
            grid[0] = <unsigned int>((rows + MANY_ROWS - 1) // MANY_ROWS)
            grid[2] = <unsigned int>((most + MANY_TOKENS - 1) // MANY_TOKENS)
        return self.device.launch(MER_STREAM_COMPUTE, kernel, grid, THREADS, 0, arguments)

    cdef int activate_rows(self, int64_t first, int64_t n) noexcept nogil:
        """silu(gate) * up as the products with `down` take it: in `mids`, or in place of gate."""
        cdef LayerShape *shape = self.mixture.shape
        cdef int rows = <int>n, inter = <int>shape.inter
        cdef int kind = 1 if self.mixture.gelu_gate else 2 if self.mixture.clamped else 0
        cdef uint64_t gate = self.gate_rows + <uint64_t>(first * inter * 4)
        cdef uint64_t up = self.up_rows + <uint64_t>(first * inter * 4)
        cdef long stride = act_stride(shape.down_format, inter)
        cdef uint64_t mids = self.mids + <uint64_t>(first * stride)
        cdef float alpha = self.mixture.alpha, limit = self.mixture.limit, added = self.mixture.added
        cdef unsigned int[3] grid = [<unsigned int>((inter + THREADS - 1) // THREADS),
                                     <unsigned int>min(n, <int64_t>MOST_Y), 1]
        cdef void **blocks = [&gate, &up, &mids, &stride, &rows, &inter, &kind, &alpha, &limit, &added]
        cdef void **floats = [&gate, &up, &gate, &rows, &inter, &kind, &alpha, &limit, &added]
        if self.kernels[shape.down_format].blocks:
            return self.device.launch(MER_STREAM_COMPUTE, self.activate_quantise, grid, THREADS, 0, blocks)
        grid[1] = 1  # it is done in place, by each thread for elements of its own
        return self.device.launch(MER_STREAM_COMPUTE, self.activate, grid, THREADS, 0, floats)

    cdef int prepare(self, uint64_t x, uint64_t acts, int64_t stride, int64_t cols, int64_t n) noexcept nogil:
        """n rows of activations, one behind the other, quantised."""
        cdef long x_stride = cols, act_bytes = stride
        cdef int n_cols = <int>cols, tokens = <int>n
        cdef unsigned int[3] grid = [<unsigned int>((cols + THREADS - 1) // THREADS), <unsigned int>min(n, <int64_t>MOST_Y),
                                     1]
        cdef void **arguments = [&x, &x_stride, &acts, &act_bytes, &n_cols, &tokens]
        return self.device.launch(MER_STREAM_COMPUTE, self.quantise, grid, THREADS, 0, arguments)

    cdef int wait(self) noexcept nogil:
        cdef int error
        if not self.under_way:
            return 0
        self.under_way = False
        error = self.device.enter()
        if error == 0:
            error = self.device.record(self.done, MER_STREAM_COMPUTE)
        if error == 0:
            error = self.device.wait(self.done)
        return error

    cdef bint can_choose(self, const mer_router *router) noexcept nogil:
        return (router.jitter == 0 and router.score != MER_SCORE_SQRT_SOFTPLUS and router.n_groups <= MER_GPU_MOST_GROUPS
                and self.choice_words(router.n_experts, self.few * router.top_k) * 4 <= MOST_SHARED)

    cdef int64_t choice_words(self, int64_t n_experts, int64_t pairs) noexcept nogil:
        """Of shared memory."""
        return WARPS * (2 * n_experts + MER_GPU_MOST_GROUPS) + 2 * pairs

    cdef bint takes_blocks(self, int64_t layer) noexcept nogil:
        return self.kernels[self.mixture.layers[layer].gate_format].blocks

    cdef int list_experts(self, int64_t layer) noexcept nogil:
        cdef int64_t n = 3 * self.mixture.n_experts
        cdef uint64_t *first = &self.experts[layer * n]
        return self.device.upload(MER_STREAM_COMPUTE, self.inputs + <uint64_t>(<char *>first - self.staging), first, 8 * n)

    cdef int compute_chosen(self, int64_t layer, int64_t tokens, const mer_router *router, uint64_t bias,
                            uint64_t expert_scale, uint64_t x, uint64_t acts, uint64_t ids) noexcept nogil:
        cdef LayerShape *shape = &self.mixture.layers[layer]
        cdef int64_t pairs = tokens * router.top_k, n = min(pairs, router.n_experts)
        cdef const uint64_t *biases = &self.biases[3 * layer]
        cdef uint64_t products = self.inputs + <uint64_t>(<char *>self.products - self.staging)
        cdef uint64_t experts = self.inputs + <uint64_t>(<char *>self.experts - self.staging)
        cdef unsigned int[3] grid = [1, 1, 1]
        cdef mer_gpu_choice choice = mer_gpu_choice(
            self.chosen_logits, bias, expert_scale, experts + <uint64_t>(layer * router.n_experts * 24), biases[0],
            biases[1], biases[2], self.gate_rows, self.up_rows, self.chosen_rows, ids, self.chosen_weights,
            self.chosen_places, self.inputs + <uint64_t>self.x_bytes, products, router.scale, router.epsilon,
            <int32_t>tokens, <int32_t>router.n_experts, <int32_t>router.top_k, <int32_t>router.n_groups,
            <int32_t>router.top_groups, router.group_best, router.score == MER_SCORE_SIGMOID, router.normalise,
            <int32_t>shape.inter, <int32_t>shape.hidden, <int32_t>n)
        cdef void **arguments = [&choice]
        cdef int error = self.device.launch(MER_STREAM_COMPUTE, self.choose, grid, THREADS,
                                            <unsigned int>self.choice_words(router.n_experts, pairs) * 4, arguments)
        if error:
            return error
        self.mixture.shape = shape
        return self.multiply_all(0, n, 0, pairs, acts if self.kernels[shape.gate_format].blocks else x, tokens)
