"""Streams the experts that the router chose and multiplies them, with no barrier between the two.

Tokens are grouped by expert, so an expert is read at most once and its weights pass the processor once per
step. Experts in the cache are pinned first, then all missing ones are submitted as one batch of reads; what is
resident is computed while they are under way, and each further expert as its reads complete. When a step needs
more experts than the cache has slots, it goes on in waves: one slot is enough. Behind the reads of a layer come
those that the next layer will probably ask for.

The result does not depend on any of that: every (token, choice) pair has an output row of its own, and the rows
of a token are added in the router's order.
"""
import numpy as np

from libc.errno cimport ENOSPC
from libc.stdint cimport int32_t, int64_t, uint8_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memset
from posix.stdlib cimport posix_memalign
from posix.time cimport nanosleep, timespec

from mer._ext.cache cimport ACQ_BUSY, ACQ_HIT, ACQ_MISS, ExpertCache, STATE_LOADING, STATE_RESIDENT
from mer._ext.kernels cimport Kernels, Pool, mer_task_fn
from mer._ext.prefetch cimport Prefetcher, plan_bytes, plan_read
from mer._ext.recorder cimport Recorder, SPAN_COMPUTE, SPAN_EXPERTS, SPAN_READ, SPAN_WAIT, now
from mer._ext.uring cimport MER_IO_DEMAND, Reader, ReadOp, mer_read_done

from mer._ext.prefetch import NOTHING_AHEAD
from mer.errors import BudgetError

cdef extern from "mer_formats.h" nogil:
    long mer_block_len(int fmt)
    size_t mer_row_bytes(int fmt, long cols)
    size_t mer_act_bytes(int fmt, long cols)

cdef extern from "mer_group.h" nogil:
    int mer_group(const int32_t *ids, int64_t tokens, int64_t top_k, int64_t n_experts, int64_t *first,
                  int64_t *position)

cdef enum:
    WAITING          # not acquired, or refused: the slots are in use
    LOADING          # our own reads are under way
    BUSY             # somebody else is reading it; pinned
    READY            # resident and pinned
    COMPUTING
    DONE
    N_STATES
    # Once this many (token, expert) pairs are ready they are computed, and then the reads looked at again:
    # so a long prefill keeps the device's queue full, and its middle rows stay in the processor's cache.
    BATCH_ROWS = 256


cdef void input_task(void *arg, long task, int thread) noexcept nogil:
    (<ExpertStreamer>arg).prepare_input(task)


cdef void gate_up_task(void *arg, long task, int thread) noexcept nogil:
    (<ExpertStreamer>arg).gate_up(task)


cdef void middle_task(void *arg, long task, int thread) noexcept nogil:
    (<ExpertStreamer>arg).prepare_middle(task)


cdef void down_task(void *arg, long task, int thread) noexcept nogil:
    (<ExpertStreamer>arg).down(task)


cdef void combine_task(void *arg, long task, int thread) noexcept nogil:
    (<ExpertStreamer>arg).combine(task)


cdef inline void add_rows(float *y, int64_t stride, int64_t count, const float *bias, int64_t r0,
                          int64_t r1) noexcept nogil:
    """y[t, r] += bias[r] for r in [r0, r1)."""
    cdef int64_t t, r
    for t in range(count):
        for r in range(r0, r1):
            y[t * stride + r] += bias[r]


cdef list _sizes(const int64_t[:, ::1] layers, const int64_t[:, :, ::1] reads, int64_t top_k, int64_t max_tokens):
    """Bytes of a streamer's buffers, in the order in which it lays them out. Raises ValueError."""
    cdef int64_t i, hidden = 0, inter = 0, act = 0, mid = 0
    if not (layers.shape[0] > 0 and layers.shape[1] == 4 and reads.shape[0] > 0 and reads.shape[1] > 0
            and reads.shape[2] == 5 and reads.shape[0] % layers.shape[0] == 0):
        raise ValueError(f"tables do not fit: layers {np.shape(layers)} must be [n_layers, 4], "
                         f"reads {np.shape(reads)} [n_layers * n_experts, max_reads, 5]")
    cdef int64_t n_experts = reads.shape[0] // layers.shape[0]
    if not 1 <= top_k <= n_experts or max_tokens < 1:
        raise ValueError(f"top_k {top_k} must be in 1..{n_experts} and max_tokens {max_tokens} above 0")
    for i in range(layers.shape[0]):
        for fmt, cols in ((layers[i, 0], layers[i, 2]), (layers[i, 1], layers[i, 3])):
            if cols < 1 or mer_block_len(fmt) == 0 or cols % mer_block_len(fmt):
                raise ValueError(f"layer {i}: no kernel for weights of format {fmt} with {cols} columns")
        hidden, inter = max(hidden, layers[i, 2]), max(inter, layers[i, 3])
        act = max(act, <int64_t>mer_act_bytes(<int>layers[i, 0], layers[i, 2]))
        mid = max(mid, <int64_t>mer_act_bytes(<int>layers[i, 1], layers[i, 3]))
    cdef int64_t pairs = max_tokens * top_k, keys = reads.shape[0]
    cdef int64_t rows = min(pairs, BATCH_ROWS + max_tokens)
    sizes = (
        layers.shape[0] * sizeof(LayerShape), keys * reads.shape[1] * sizeof(ReadPlan), keys * 3 * 8,
        n_experts * reads.shape[1] * sizeof(ReadOp), n_experts * sizeof(Expert), n_experts * sizeof(Ready),
        (n_experts + 1) * 8, pairs * 8, pairs * sizeof(void *), rows * sizeof(void *), max_tokens * act, rows * mid,
        rows * inter * 4, rows * inter * 4, pairs * hidden * 4,
    )
    return [(size + 63) // 64 * 64 for size in sizes]


def scratch_bytes(const int64_t[:, ::1] layers, const int64_t[:, :, ::1] reads, int64_t top_k, int64_t max_tokens):
    """Bytes that an ExpertStreamer with these arguments allocates beside the cache. Raises ValueError as it does."""
    return sum(_sizes(layers, reads, top_k, max_tokens))


cdef class ExpertStreamer:
    """Computes out = sum_k weight_k * down(silu(gate(x)) * up(x)) with experts streamed through a cache.

    layers: int64 [n_layers, 4]: format id of gate and up, format id of down, hidden, intermediate size.
    reads: int64 [n_layers * n_experts, max_reads, 5]: file, aligned offset, aligned length, bytes needed,
    offset in the slot; length 0 ends the list. matrices: int64 [n_layers * n_experts, 3]: offsets in the slot of
    gate, up and down. At most max_tokens tokens a call, each with top_k distinct experts. prefetch: experts that may
    be on their way before they are asked for.

    Row r of the tables is expert r of the cache; others may use that and the reader at the same time, if they let
    go of what they pin. One caller of `forward` at a time. Raises ValueError for tables that do not fit.
    """

    def __cinit__(self, ExpertCache cache not None, Reader reader not None, Kernels kernels not None,
                  Pool pool not None, const int64_t[:, ::1] layers, const int64_t[:, :, ::1] reads,
                  const int64_t[:, ::1] matrices, int64_t top_k, int64_t max_tokens, int64_t prefetch=0):
        cdef int64_t i, act = 0, mid = 0, rows
        sizes = _sizes(layers, reads, top_k, max_tokens)
        self.cache, self.reader, self.kernels, self.pool = cache, reader, kernels, pool
        self.arrays = (None, None, None, None)
        self.n_layers, self.max_reads = layers.shape[0], reads.shape[1]
        self.n_experts = reads.shape[0] // self.n_layers
        self.top_k, self.max_tokens, self.scratch_bytes = top_k, max_tokens, sum(sizes)
        if matrices.shape[0] != reads.shape[0] or matrices.shape[1] != 3 or cache.n_experts < reads.shape[0]:
            raise ValueError(f"tables do not fit: matrices {np.shape(matrices)} must be [{reads.shape[0]}, 3], and "
                             f"the cache made for as many experts, not {cache.n_experts}")
        if cache.policy != "lru" and (cache.n_layers != self.n_layers or cache.n_experts != reads.shape[0]):
            raise ValueError(f"the cache is made for {cache.n_layers} layers and {cache.n_experts} experts, the tables "
                             f"for {self.n_layers} and {reads.shape[0]}")
        if posix_memalign(&self.memory, 64, <size_t>self.scratch_bytes):
            raise MemoryError(f"no memory for {self.scratch_bytes} bytes of expert buffers")
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        cdef char *memory = <char *>self.memory
        self.layers = <LayerShape *>(memory + <int64_t>starts[0])
        self.reads = <ReadPlan *>(memory + <int64_t>starts[1])
        self.matrices = <int64_t *>(memory + <int64_t>starts[2])
        self.ops = <ReadOp *>(memory + <int64_t>starts[3])
        self.active = <Expert *>(memory + <int64_t>starts[4])
        self.ready = <Ready *>(memory + <int64_t>starts[5])
        self.first = <int64_t *>(memory + <int64_t>starts[6])
        self.position = <int64_t *>(memory + <int64_t>starts[7])
        self.act_pointers = <const void **>(memory + <int64_t>starts[8])
        self.mid_pointers = <const void **>(memory + <int64_t>starts[9])
        self.acts = <uint8_t *>(memory + <int64_t>starts[10])
        self.mids = <uint8_t *>(memory + <int64_t>starts[11])
        self.gate_rows = <float *>(memory + <int64_t>starts[12])
        self.up_rows = <float *>(memory + <int64_t>starts[13])
        self.out_rows = <float *>(memory + <int64_t>starts[14])
        for i in range(self.n_layers):
            self.layers[i] = LayerShape(<int>layers[i, 0], <int>layers[i, 1], layers[i, 2], layers[i, 3],
                                        NULL, NULL, NULL)
            act = max(act, <int64_t>mer_act_bytes(<int>layers[i, 0], layers[i, 2]))
            mid = max(mid, <int64_t>mer_act_bytes(<int>layers[i, 1], layers[i, 3]))
        self.act_stride = act
        rows = min(max_tokens * top_k, BATCH_ROWS + max_tokens)
        for i in range(rows):
            self.mid_pointers[i] = self.mids + i * mid
        for i in range(reads.shape[0]):
            self.add_expert(i, reads[i], matrices[i])
        if prefetch:
            self.prefetcher = Prefetcher(cache, reader, self.max_reads, prefetch, self.n_experts, top_k,
                                         max_tokens * top_k)
            self.prefetcher.plans = self.reads

    def __dealloc__(self):
        free(self.memory)

    cdef int add_expert(self, int64_t key, const int64_t[:, ::1] reads, const int64_t[::1] matrices) except -1:
        """Checks and copies one row of the tables."""
        cdef LayerShape *shape = &self.layers[key // self.n_experts]
        cdef int64_t sizes[3]
        cdef int64_t j, room = self.cache.slot_bytes
        cdef ReadPlan *plan
        sizes[0] = sizes[1] = shape.inter * <int64_t>mer_row_bytes(shape.gate_format, shape.hidden)
        sizes[2] = shape.hidden * <int64_t>mer_row_bytes(shape.down_format, shape.inter)
        for j in range(3):
            if not 0 <= matrices[j] <= room - sizes[j]:
                raise ValueError(f"expert {key}: a matrix of {sizes[j]} bytes at {matrices[j]} is not inside a slot "
                                 f"of {room} bytes")
            self.matrices[key * 3 + j] = matrices[j]
        for j in range(self.max_reads):
            plan = &self.reads[key * self.max_reads + j]
            plan[0] = ReadPlan(reads[j, 0], reads[j, 1], reads[j, 2], reads[j, 3], reads[j, 4])
            if plan.length == 0 and j > 0:
                break
            if not (0 <= plan.file < len(self.reader.paths) and plan.offset >= 0 and 0 < plan.needed <= plan.length
                    and 0 <= plan.slot_offset <= room - plan.length
                    and (plan.offset | plan.length | plan.slot_offset) % self.reader.alignment == 0):
                raise ValueError(f"expert {key}: a read can't be {np.asarray(reads[j]).tolist()} with "
                                 f"{len(self.reader.paths)} files, alignment {self.reader.alignment}, "
                                 f"slots of {room} bytes")
        return 0

    def forward(self, int64_t layer, x, ids, weights, out, ahead=None):
        """x f32 [T, hidden], ids i32 [T, top_k], weights f32 [T, top_k] -> out f32 [T, hidden] (overwritten).

        layer counts MoE layers only. ahead, i32 [T, top_k]: what the next MoE layer will probably want, best first;
        it changes when things are read, and no result. Raises DeviceReadError or CheckpointError when an expert
        can't be read: no demand read is under way then, nothing of this layer pinned, and the next call may
        succeed. BudgetError when the cache's pinned set leaves no slot, ValueError for shapes or ids that do not
        fit, IndexError for a layer.
        """
        cdef int error
        cdef int64_t start
        if not 0 <= layer < self.n_layers:
            raise IndexError(f"layer {layer} is outside 0..{self.n_layers - 1}")
        self.shape, self.layer, self.ahead = &self.layers[layer], layer, NULL
        self.bind(x, ids, weights, out)
        if ahead is not None and self.prefetcher is not None and layer + 1 < self.n_layers:
            self.bind_ahead(ahead)
        start = now()
        if not self.group():
            raise ValueError(f"the ids of a token must be distinct and in 0..{self.n_experts - 1}")
        with nogil:
            self.cache.visit(layer, self.ids, self.tokens * self.top_k, self.tokens)
            self.run_tokens(input_task)
            error = self.stream(layer * self.n_experts)
            if error == 0 and self.failed is NULL:
                self.run_tokens(combine_task)
            if self.recorder is not None:
                self.recorder.add(SPAN_EXPERTS, layer, start, now(), 0)
        if error == ENOSPC:
            raise BudgetError(f"all {self.cache.n_slots} slots of the expert cache hold experts of its pinned set: "
                              "raise --ram, or pin fewer")
        if self.failed is not NULL:
            raise self.reader.error(self.failed.file, self.failed.offset, self.failed.needed, self.failed.result)

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
        self.x, self.ids = &self.x_view[0, 0], &self.ids_view[0, 0]
        self.weights, self.out = &self.weights_view[0, 0], &self.out_view[0, 0]
        return 0

    cdef int bind_ahead(self, ahead) except -1:
        if ahead is not self.ahead_array:
            self.ahead_array = None
            self.ahead_view = ahead
            self.ahead_array = ahead
        if self.ahead_view.shape[0] != self.tokens or self.ahead_view.shape[1] != self.top_k:
            raise ValueError(f"ahead {np.shape(ahead)} must be [{self.tokens}, {self.top_k}]")
        self.ahead = &self.ahead_view[0, 0]
        return 0

    cdef bint group(self) noexcept nogil:
        """The pairs by expert; False for ids that make no sense."""
        cdef int64_t i, top_k = self.top_k
        if mer_group(self.ids, self.tokens, top_k, self.n_experts, self.first, self.position):
            return False
        for i in range(self.tokens * top_k):
            self.act_pointers[self.position[i]] = self.acts + (i // top_k) * self.act_stride
        return True

    cdef void plan_reads(self, Expert *e) noexcept nogil:
        """Appends an expert's reads to `ops`: in one step it is read once at most, so there is room."""
        cdef ReadPlan *plan = &self.reads[e.key * self.max_reads]
        cdef char *slot = self.cache.slot_ptr(e.slot)
        cdef ReadOp *op
        cdef int64_t j
        e.first_op, e.asked = self.n_ops, now() if self.recorder is not None else 0
        for j in range(self.max_reads):
            if plan[j].length == 0:
                break
            op = &self.ops[self.n_ops]
            plan_read(op, &plan[j], slot, MER_IO_DEMAND)
            self.bytes_read += op.length
            self.n_ops += 1
        e.end_op = self.n_ops

    cdef void end_reads(self, Expert *e) noexcept nogil:
        """LOADING -> READY, or DONE and `failed`; only once none of its reads is under way any more."""
        cdef int64_t j
        cdef ReadOp *failed = NULL
        for j in range(e.first_op, e.end_op):
            if not mer_read_done(&self.ops[j]):
                return
            if self.ops[j].result < 0:
                failed = &self.ops[j]
        if self.recorder is not None:
            self.recorder.add(SPAN_READ, e.key, e.asked, now(), plan_bytes(&self.reads[e.key * self.max_reads], self.max_reads))
        if failed is NULL:
            self.cache.publish(e.key)
            e.state = READY
        else:
            self.cache.fail(e.key)
            self.cache.release(e.key)
            e.state = DONE
            self.failed = failed

    cdef void try_acquire(self, Expert *e) noexcept nogil:
        cdef int status = self.cache.acquire(e.key, &e.slot)
        if self.prefetcher is not None and (status == ACQ_HIT or status == ACQ_BUSY):
            self.prefetcher.note_use(e.key)
        if status == ACQ_HIT:
            e.state = READY
            self.hits += 1
        elif status == ACQ_MISS:
            e.state = LOADING
            self.misses += 1
            self.plan_reads(e)
        elif status == ACQ_BUSY:
            e.state = BUSY

    cdef void advance(self, Expert *e) noexcept nogil:
        """On to the next state, where that is possible now. After a failed read nothing new is begun."""
        cdef int status
        if e.state == LOADING:
            self.end_reads(e)
        elif e.state == BUSY:
            status = self.cache.state(e.key)
            if status == STATE_RESIDENT:
                e.state = READY
                self.hits += 1
            elif status != STATE_LOADING or self.failed is not NULL:
                self.cache.release(e.key)            # whoever read it failed: try ourselves
                e.state = WAITING
        if e.state == WAITING:
            if self.failed is not NULL:
                e.state = DONE
            else:
                self.try_acquire(e)

    cdef void add_ready(self, Expert *e) noexcept nogil:
        cdef const uint8_t *slot = <const uint8_t *>self.cache.slot_ptr(e.slot)
        cdef int64_t *places = &self.matrices[e.key * 3]
        self.ready[self.n_ready] = Ready(slot + places[0], slot + places[1], slot + places[2], e.key % self.n_experts,
                                         e.first, e.count, self.n_rows)
        self.n_ready += 1
        self.n_rows += e.count
        e.state = COMPUTING

    cdef int stream(self, int64_t base) noexcept nogil:
        """Acquires, reads and computes every expert of this step. 0 (see `failed`), or ENOSPC."""
        cdef int64_t n = 0, e, i, mark, submitted = 0
        cdef int64_t under_way[N_STATES]
        cdef uint64_t seen
        cdef timespec pause
        self.failed = NULL
        self.n_ops = 0
        for e in range(self.n_experts):
            if self.first[e + 1] > self.first[e]:
                self.active[n] = Expert(base + e, self.first[e], self.first[e + 1] - self.first[e], -1, 0, 0, 0, WAITING)
                n += 1
        if self.prefetcher is not None:
            self.prefetcher.judge(base, self.ids, self.tokens, self.first)
        for i in range(n):                           # what is resident is pinned before a miss may evict it
            if self.cache.state(self.active[i].key) == STATE_RESIDENT:
                self.try_acquire(&self.active[i])
        while True:
            memset(under_way, 0, sizeof(under_way))
            seen = self.reader.completed()           # before the look at the reads: none ends unnoticed
            if self.prefetcher is not None:
                self.prefetcher.collect()
            self.n_ready = self.n_rows = 0
            for i in range(n):
                self.advance(&self.active[i])
                if self.active[i].state == READY and self.n_rows < BATCH_ROWS:
                    self.add_ready(&self.active[i])
                under_way[self.active[i].state] += 1
            if self.n_ops > submitted:
                self.reader.submit(&self.ops[submitted], self.n_ops - submitted)
                submitted = self.n_ops
            if self.ahead is not NULL and not under_way[WAITING] and not under_way[BUSY] and self.failed is NULL:
                self.prefetcher.look_ahead(base + self.n_experts, self.ahead, self.tokens)
                self.ahead = NULL
            mark = now()
            if self.n_ready:
                if self.failed is NULL:
                    self.compute_ready()
                for i in range(n):
                    if self.active[i].state == COMPUTING:
                        self.cache.release(self.active[i].key)
                        self.active[i].state = DONE
                self.spent(SPAN_COMPUTE, mark)
                self.reader.wait(0)
            elif under_way[LOADING] or (self.prefetcher is not None and self.prefetcher.under_way
                                        and (under_way[BUSY] or under_way[WAITING])):
                self.cache.hold_prefault(False)
                self.reader.wait_past(seen)
                self.cache.hold_prefault(True)
                self.spent(SPAN_WAIT, mark)
            elif under_way[BUSY] or under_way[WAITING]:
                if not under_way[BUSY] and self.cache.all_protected():
                    return ENOSPC
                # It hangs on others, who read it or hold the slots; nothing here is pinned but what they read.
                pause.tv_sec, pause.tv_nsec = 0, 50000
                nanosleep(&pause, NULL)
                self.spent(SPAN_WAIT, mark)
            else:
                return 0

    cdef void compute_ready(self) noexcept nogil:
        """Everything in `ready`, as three passes over all of its experts at once."""
        cdef LayerShape *shape = self.shape
        # Rows per task: enough tasks for every thread, enough rows to be worth a turn at the counter.
        self.chunk = max(<int64_t>16, min(<int64_t>128, shape.inter * self.n_ready // (8 * self.pool.n_threads)))
        self.pool.run(gate_up_task, <void *>self, self.n_ready * ((shape.inter + self.chunk - 1) // self.chunk))
        self.pool.run(middle_task, <void *>self, self.n_rows)
        self.pool.run(down_task, <void *>self, self.n_ready * ((shape.hidden + self.chunk - 1) // self.chunk))

    cdef void run_tokens(self, mer_task_fn task) noexcept nogil:
        cdef int64_t mark = now()
        self.pool.run(task, <void *>self, self.tokens)
        self.spent(SPAN_COMPUTE, mark)

    cdef void spent(self, int64_t kind, int64_t since) noexcept nogil:
        cdef int64_t end = now()
        cdef int64_t *total = &self.compute_ns if kind == SPAN_COMPUTE else &self.io_wait_ns
        total[0] += end - since
        if self.recorder is not None:
            self.recorder.add(kind, self.layer, since, end, 0)

    cdef void prepare_input(self, int64_t token) noexcept nogil:
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
        self.kernels.matmul(shape.gate_format, e.up, shape.hidden, r0, r1, acts, e.count, up, shape.inter)
        if shape.gate_bias is not NULL:
            add_rows(gate, shape.inter, e.count, shape.gate_bias + e.expert * shape.inter, r0, r1)
            add_rows(up, shape.inter, e.count, shape.up_bias + e.expert * shape.inter, r0, r1)
        gate += r0
        up += r0
        for i in range(e.count):
            if self.clamped:
                self.kernels.clamped_swiglu(gate, up, gate, r1 - r0, self.alpha, self.limit)
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

    cdef void combine(self, int64_t token) noexcept nogil:
        """out[t] = the sum over its choices, in the router's order, of weight * expert output."""
        cdef int64_t hidden = self.shape.hidden, k, i
        cdef float *out = self.out + token * hidden
        cdef const float *row
        cdef float w
        memset(out, 0, hidden * sizeof(float))
        for k in range(self.top_k):
            w = self.weights[token * self.top_k + k]
            row = self.out_rows + self.position[token * self.top_k + k] * hidden
            for i in range(hidden):
                out[i] += w * row[i]

    def wants_guesses(self, int64_t tokens):
        """Whether `ahead` would be of use to the next call, of this many tokens."""
        return self.prefetcher is not None and self.prefetcher.wants_guesses(tokens)

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

    def clamp(self, float alpha, float limit):
        """Use g * sigmoid(alpha * g) * (u + 1) for silu(g) * u: g at the most limit, u within -limit to limit."""
        self.clamped, self.alpha, self.limit = True, alpha, limit

    def record(self, Recorder recorder):
        """Have this and every later call recorded; its reads, too."""
        self.recorder = recorder
        if self.prefetcher is not None:
            self.prefetcher.recorder = recorder

    def stats(self):
        """Totals since the start: seconds waiting for reads and computing, bytes asked of the device,
        and experts found in the cache (hits) or read (misses), each counted once a call.

        An expert that is on its way because it was read ahead counts as found. For the rest see StepStats;
        prefetch_depth: how many guesses of a token are read ahead now; prefetching: experts on their way.
        """
        ahead = NOTHING_AHEAD if self.prefetcher is None else self.prefetcher.stats()
        return {
            "io_wait_s": self.io_wait_ns / 1e9,
            "compute_s": self.compute_ns / 1e9,
            "bytes_read": self.bytes_read + ahead["prefetch_bytes"],
            "hits": self.hits,
            "misses": self.misses,
            **ahead,
        }
