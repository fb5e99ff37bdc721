"""Streams the experts that the router chose and multiplies them, with no barrier between the two.

Tokens are grouped by expert, so an expert is read at most once and its weights pass the processor once per
step. Experts in the cache are pinned first, then all missing ones are submitted as one batch of reads; what is
resident is computed while they are under way, and each further expert as its reads complete. When a step needs
more experts than the cache has slots, it goes on in waves.

The result does not depend on any of that: every (token, choice) pair has an output row of its own, and the rows
of a token are added in the router's order.
"""
from libc.errno cimport ENOSPC
from libc.stdint cimport int32_t, int64_t, uint8_t, uintptr_t
from libc.stdlib cimport free
from libc.string cimport memset
from posix.stdlib cimport posix_memalign
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec, nanosleep

from mer._ext.cache cimport ACQ_BUSY, ACQ_FULL, ACQ_HIT, ACQ_MISS, ExpertCache, STATE_RESIDENT, STATE_LOADING
from mer._ext.kernels cimport Kernels, Pool, mer_task_fn
from mer._ext.uring cimport Reader, ReadOp, mer_read_done

from mer.errors import BudgetError

cdef enum:
    WAITING          # not yet acquired
    LOADING          # our own reads are under way
    BUSY             # somebody else is reading it
    READY            # resident and pinned
    COMPUTING
    DONE
    N_STATES
    # No more (token, expert) pairs than this are computed between two looks at the reads, so that a long
    # prefill keeps the device's queue full.
    MAX_READY_PAIRS = 256


cdef inline int64_t now() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return <int64_t>t.tv_sec * 1000000000 + t.tv_nsec


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


def scratch_bytes(int64_t n_experts, int64_t top_k, int64_t hidden, int64_t inter, int64_t act_bytes,
                  int64_t mid_bytes, int64_t max_tokens):
    """Bytes of the buffers that an ExpertStreamer allocates beside the cache, for the memory budget."""
    cdef int64_t pairs = max_tokens * top_k
    return (n_experts * 128 + max_tokens * act_bytes
            + pairs * (mid_bytes + 8 * inter + 4 * hidden + 3 * 8) + (64 << 10))


cdef class ExpertStreamer:
    """Computes out = sum_k weight_k * down(silu(gate(x)) * up(x)) with experts streamed through a cache.

    layers: int64 [n_layers, 4]: format id of gate and up, format id of down, hidden, intermediate size.
    reads: int64 [n_layers * n_experts, max_reads, 5]: file, aligned offset, aligned length, bytes needed,
    offset in the slot. matrices: int64 [n_layers * n_experts, 3]: offsets in the slot of gate, up and down.
    At most max_tokens tokens a call, each with top_k distinct experts. One caller at a time.
    """

    def __init__(self, ExpertCache cache not None, Reader reader not None, Kernels kernels not None,
                 Pool pool not None, const int64_t[:, ::1] layers, const int64_t[:, :, ::1] reads,
                 const int64_t[:, ::1] matrices, int64_t top_k, int64_t max_tokens):
        cdef int64_t i, j, act = 0, mid = 0, inter = 0, hidden = 0, pairs = max_tokens * top_k
        self.cache, self.reader, self.kernels, self.pool = cache, reader, kernels, pool
        self.n_layers = layers.shape[0]
        self.n_experts = reads.shape[0] // max(self.n_layers, 1)
        self.max_reads = reads.shape[1]
        self.top_k, self.max_tokens = top_k, max_tokens
        for i in range(self.n_layers):
            inter = max(inter, layers[i, 3])
            hidden = max(hidden, layers[i, 2])
            act = max(act, <int64_t>kernels.act_bytes(<int>layers[i, 0], layers[i, 2]))
            mid = max(mid, <int64_t>kernels.act_bytes(<int>layers[i, 1], layers[i, 3]))
        sizes = [
            self.n_layers * sizeof(LayerShape), reads.shape[0] * self.max_reads * sizeof(ReadPlan),
            reads.shape[0] * 3 * 8, self.n_experts * self.max_reads * sizeof(ReadOp),
            (self.n_experts + 1) * 8, pairs * 8, self.n_experts * 8, self.n_experts * 8, self.n_experts,
            self.n_experts * sizeof(Ready), pairs * 8, pairs * 8, max_tokens * act, pairs * mid,
            pairs * inter * 4, pairs * inter * 4, pairs * hidden * 4,
        ]
        starts, total = [], 0
        for size in sizes:
            starts.append(total)
            total += (int(size) + 63) // 64 * 64
        if posix_memalign(&self.arena, 64, <size_t>total):
            raise MemoryError(f"no memory for {total} bytes of expert buffers")
        places = [<uintptr_t>self.arena + start for start in starts]
        self.layers = <LayerShape *><uintptr_t>places[0]
        self.reads = <ReadPlan *><uintptr_t>places[1]
        self.matrices = <int64_t *><uintptr_t>places[2]
        self.ops = <ReadOp *><uintptr_t>places[3]
        self.first = <int64_t *><uintptr_t>places[4]
        self.position = <int64_t *><uintptr_t>places[5]
        self.active = <int64_t *><uintptr_t>places[6]
        self.slots = <int64_t *><uintptr_t>places[7]
        self.states = <uint8_t *><uintptr_t>places[8]
        self.ready = <Ready *><uintptr_t>places[9]
        self.act_pointers = <const void **><uintptr_t>places[10]
        self.mid_pointers = <const void **><uintptr_t>places[11]
        self.acts = <uint8_t *><uintptr_t>places[12]
        self.mids = <uint8_t *><uintptr_t>places[13]
        self.gate_rows = <float *><uintptr_t>places[14]
        self.up_rows = <float *><uintptr_t>places[15]
        self.out_rows = <float *><uintptr_t>places[16]
        for i in range(self.n_layers):
            self.layers[i] = LayerShape(
                <int>layers[i, 0], <int>layers[i, 1], layers[i, 2], layers[i, 3],
                <int64_t>kernels.act_bytes(<int>layers[i, 0], layers[i, 2]),
                <int64_t>kernels.act_bytes(<int>layers[i, 1], layers[i, 3]))
        for i in range(reads.shape[0]):
            for j in range(self.max_reads):
                self.reads[i * self.max_reads + j] = ReadPlan(
                    reads[i, j, 0], reads[i, j, 1], reads[i, j, 2], reads[i, j, 3], reads[i, j, 4])
            for j in range(3):
                self.matrices[i * 3 + j] = matrices[i, j]

    def __dealloc__(self):
        free(self.arena)

    def forward(self, int64_t layer, const float[:, ::1] x, const int32_t[:, ::1] ids,
                const float[:, ::1] weights, float[:, ::1] out):
        """x f32 [T, hidden], ids i32 [T, top_k], weights f32 [T, top_k] -> out f32 [T, hidden] (overwritten).

        layer counts MoE layers only. Raises DeviceReadError when an expert can't be read; the cache is then
        as if the call had not been made, and the next call may succeed.
        """
        cdef int error
        if not 0 <= layer < self.n_layers:
            raise IndexError(f"layer {layer} of {self.n_layers}")
        self.shape = &self.layers[layer]
        self.tokens = x.shape[0]
        if not (0 < self.tokens <= self.max_tokens and x.shape[1] == self.shape.hidden
                and ids.shape[0] == self.tokens and ids.shape[1] == self.top_k
                and weights.shape[0] == self.tokens and weights.shape[1] == self.top_k
                and out.shape[0] == self.tokens and out.shape[1] == self.shape.hidden):
            raise ValueError(f"shapes do not fit: x {x.shape[:2]}, ids {ids.shape[:2]}, out {out.shape[:2]}")
        self.x, self.weights, self.out = &x[0, 0], &weights[0, 0], &out[0, 0]
        with nogil:
            error = self.group(&ids[0, 0])
            if error == 0:
                self.run_tokens(input_task)
                error = self.stream(layer)
            if error == 0:
                self.run_tokens(combine_task)
        if error == 0:
            return
        if error == ENOSPC:
            raise BudgetError(f"no slot of the expert cache is free ({self.cache.n_slots} in all): raise --ram")
        if error < 0:
            raise ValueError(f"an expert id is outside 0..{self.n_experts - 1}")
        raise self.reader.error(<int>self.failed_file, self.failed_offset, self.failed_length, -error)

    cdef int group(self, const int32_t *ids) noexcept nogil:
        """Counting sort of (token, choice) pairs by expert; -1 when an id is out of range."""
        cdef int64_t pairs = self.tokens * self.top_k, i, e, p
        memset(self.first, 0, (self.n_experts + 1) * sizeof(int64_t))
        for i in range(pairs):
            if ids[i] < 0 or ids[i] >= self.n_experts:
                return -1
            self.first[ids[i] + 1] += 1
        for e in range(self.n_experts):
            self.first[e + 1] += self.first[e]
        for i in range(pairs):
            p = self.first[ids[i]]
            self.first[ids[i]] = p + 1
            self.position[i] = p
            self.act_pointers[p] = self.acts + (i // self.top_k) * self.shape.gate_act_bytes
            self.mid_pointers[p] = self.mids + p * self.shape.down_act_bytes
        for e in range(self.n_experts, 0, -1):
            self.first[e] = self.first[e - 1]
        self.first[0] = 0
        return 0

    cdef void start_read(self, int64_t key, int64_t place) noexcept nogil:
        cdef ReadOp *op
        cdef ReadPlan *plan
        cdef int64_t j, n = 0
        cdef char *slot = self.cache.slot_ptr(self.slots[place])
        for j in range(self.max_reads):
            plan = &self.reads[key * self.max_reads + j]
            if plan.length == 0:
                break
            op = &self.ops[place * self.max_reads + j]
            memset(op, 0, sizeof(ReadOp))
            op.file = <int>plan.file
            op.offset = plan.offset
            op.length = plan.length
            op.needed = plan.needed
            op.dest = slot + plan.slot_offset
            self.bytes_read += plan.length
            n += 1
        self.reader.submit(&self.ops[place * self.max_reads], n)

    cdef int poll_read(self, int64_t key, int64_t place) noexcept nogil:
        """0: all read, 1: not yet, else -errno (only once none of its reads is under way any more)."""
        cdef ReadOp *op
        cdef int64_t j
        cdef int error = 0
        for j in range(self.max_reads):
            if self.reads[key * self.max_reads + j].length == 0:
                break
            op = &self.ops[place * self.max_reads + j]
            if not mer_read_done(op):
                return 1
            if op.result < 0 and error == 0:
                error = op.result
                self.failed_file, self.failed_offset, self.failed_length = op.file, op.offset, op.needed
        return error

    cdef void try_acquire(self, int64_t key, int64_t place) noexcept nogil:
        cdef int status = self.cache.acquire(key, &self.slots[place])
        if status == ACQ_HIT:
            self.states[place] = READY
            self.hits += 1
        elif status == ACQ_MISS:
            self.states[place] = LOADING
            self.misses += 1
            self.start_read(key, place)
        elif status == ACQ_BUSY:
            self.states[place] = BUSY

    cdef int advance(self, int64_t key, int64_t place) noexcept nogil:
        """Move an expert on from LOADING or BUSY if it can; 0, or the errno of its failed read."""
        cdef int status
        if self.states[place] == LOADING:
            status = self.poll_read(key, place)
            if status == 0:
                self.cache.publish(key)
                self.states[place] = READY
            elif status < 0:
                self.cache.fail(key)
                self.cache.release(key)
                self.states[place] = DONE
                return -status
        elif self.states[place] == BUSY:
            status = self.cache.state(key)
            if status == STATE_RESIDENT:
                self.states[place] = READY
                self.hits += 1
            elif status != STATE_LOADING:            # the one who read it failed: try ourselves
                self.cache.release(key)
                self.states[place] = WAITING
                self.try_acquire(key, place)
        return 0

    cdef void add_ready(self, int64_t key, int64_t place) noexcept nogil:
        cdef int64_t e = self.active[place]
        cdef const uint8_t *slot = <const uint8_t *>self.cache.slot_ptr(self.slots[place])
        cdef Ready *r = &self.ready[self.n_ready]
        r.gate = slot + self.matrices[key * 3]
        r.up = slot + self.matrices[key * 3 + 1]
        r.down = slot + self.matrices[key * 3 + 2]
        r.first = self.first[e]
        r.count = self.first[e + 1] - self.first[e]
        self.n_ready += 1

    cdef int stream(self, int64_t layer) noexcept nogil:
        """Acquire, read and compute every expert of this step; 0, ENOSPC, or the errno of a failed read."""
        cdef int64_t base = layer * self.n_experts, n = 0, e, i, pairs, mark
        cdef int64_t under_way[N_STATES]
        cdef int error = 0, status
        cdef timespec pause
        pause.tv_sec, pause.tv_nsec = 0, 20000
        for e in range(self.n_experts):
            if self.first[e + 1] > self.first[e]:
                self.active[n] = e
                self.states[n] = WAITING
                n += 1
        for i in range(n):                           # what is resident is pinned before a miss may evict it
            if self.cache.state(base + self.active[i]) == STATE_RESIDENT:
                self.try_acquire(base + self.active[i], i)
        while True:
            memset(under_way, 0, sizeof(under_way))
            self.n_ready = pairs = 0
            for i in range(n):
                if self.states[i] == WAITING:
                    if error:
                        self.states[i] = DONE
                    else:
                        self.try_acquire(base + self.active[i], i)
                status = self.advance(base + self.active[i], i)
                if status:
                    error = status
                if self.states[i] == READY and pairs < MAX_READY_PAIRS:
                    pairs += self.first[self.active[i] + 1] - self.first[self.active[i]]
                    self.add_ready(base + self.active[i], i)
                    self.states[i] = COMPUTING
                under_way[self.states[i]] += 1
            if self.n_ready:
                if error == 0:
                    self.compute_ready()
                for i in range(n):
                    if self.states[i] == COMPUTING:
                        self.cache.release(base + self.active[i])
                        self.states[i] = DONE
                self.reader.wait(0)
            elif under_way[LOADING]:
                mark = now()
                self.reader.wait(1)
                self.io_wait_ns += now() - mark
            elif under_way[BUSY]:
                mark = now()
                self.reader.wait(0)
                nanosleep(&pause, NULL)
                self.io_wait_ns += now() - mark
            elif under_way[WAITING] and error == 0:
                return ENOSPC                        # nothing of ours is pinned: others hold every slot
            else:
                return error

    cdef void compute_ready(self) noexcept nogil:
        """Everything in `ready`, as three passes over all of its experts at once."""
        cdef LayerShape *shape = self.shape
        cdef int64_t mark = now()
        # Rows per task: enough tasks for every thread, enough rows to be worth a turn at the counter.
        self.chunk = max(<int64_t>16, min(<int64_t>128, shape.inter * self.n_ready // (8 * self.pool.n_threads)))
        self.pool.run(gate_up_task, <void *>self, self.n_ready * ((shape.inter + self.chunk - 1) // self.chunk))
        self.pool.run(middle_task, <void *>self, self.n_ready)
        self.pool.run(down_task, <void *>self, self.n_ready * ((shape.hidden + self.chunk - 1) // self.chunk))
        self.compute_ns += now() - mark

    cdef void run_tokens(self, mer_task_fn task) noexcept nogil:
        cdef int64_t mark = now()
        self.pool.run(task, <void *>self, self.tokens)
        self.compute_ns += now() - mark

    cdef void prepare_input(self, int64_t token) noexcept nogil:
        self.kernels.prepare(self.shape.gate_format, self.x + token * self.shape.hidden,
                             self.acts + token * self.shape.gate_act_bytes, self.shape.hidden)

    cdef void gate_up(self, int64_t task) noexcept nogil:
        """Some rows of one expert's gate and up for all of its tokens, then silu(gate) * up in place of gate."""
        cdef LayerShape *shape = self.shape
        cdef int64_t chunks = (shape.inter + self.chunk - 1) // self.chunk
        cdef Ready *e = &self.ready[task // chunks]
        cdef int64_t r0 = (task % chunks) * self.chunk
        cdef int64_t r1 = min(r0 + self.chunk, shape.inter)
        cdef float *gate = self.gate_rows + e.first * shape.inter
        cdef float *up = self.up_rows + e.first * shape.inter
        cdef const void **acts = self.act_pointers + e.first
        cdef int64_t i
        self.kernels.matmul(shape.gate_format, e.gate, shape.hidden, r0, r1, acts, e.count, gate, shape.inter)
        self.kernels.matmul(shape.gate_format, e.up, shape.hidden, r0, r1, acts, e.count, up, shape.inter)
        for i in range(r0, r0 + e.count * shape.inter, shape.inter):
            self.kernels.swiglu(gate + i, up + i, gate + i, r1 - r0)

    cdef void prepare_middle(self, int64_t task) noexcept nogil:
        cdef Ready *e = &self.ready[task]
        cdef int64_t i
        for i in range(e.first, e.first + e.count):
            self.kernels.prepare(self.shape.down_format, self.gate_rows + i * self.shape.inter,
                                 self.mids + i * self.shape.down_act_bytes, self.shape.inter)

    cdef void down(self, int64_t task) noexcept nogil:
        cdef LayerShape *shape = self.shape
        cdef int64_t chunks = (shape.hidden + self.chunk - 1) // self.chunk
        cdef Ready *e = &self.ready[task // chunks]
        cdef int64_t r0 = (task % chunks) * self.chunk
        self.kernels.matmul(shape.down_format, e.down, shape.inter, r0, min(r0 + self.chunk, shape.hidden),
                            self.mid_pointers + e.first, e.count, self.out_rows + e.first * shape.hidden,
                            shape.hidden)

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

    def stats(self):
        """Totals since the start: seconds waiting for reads and computing, bytes read, hits and misses."""
        return {
            "io_wait_s": self.io_wait_ns / 1e9,
            "compute_s": self.compute_ns / 1e9,
            "bytes_read": self.bytes_read,
            "hits": self.hits,
            "misses": self.misses,
        }
