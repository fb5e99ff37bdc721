"""Streams the experts that the router chose and multiplies them, with no barrier between the two.

Tokens are grouped by expert, so an expert is read at most once and its weights pass the processor once per step.
Experts in the cache are pinned first, then all missing ones are submitted as one batch of reads; what is resident is
computed while they are under way, and each further expert as its reads complete. When a step needs more experts than
the cache has slots, it goes on in waves: one slot is enough. When the reads of a layer are over come those that the
next layer will probably ask for; with more than one token right behind.

The result does not depend on any of that: see mixture.pyx, which has the arithmetic.
"""
import numpy as np

from libc.errno cimport ENOSPC
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memset
from posix.stdlib cimport posix_memalign
from posix.time cimport nanosleep, timespec

from mer._ext.cache cimport ACQ_BUSY, ACQ_HIT, ACQ_MISS, ExpertCache, STATE_ABSENT, STATE_LOADING, STATE_RESIDENT
from mer._ext.kernels cimport Kernels, Pool
from mer._ext.device cimport Device
from mer._ext.mixture cimport BATCH_ROWS, Mixture
from mer._ext.prefetch cimport Prefetcher, plan_bytes, plan_read
from mer._ext.recorder cimport Recorder, SPAN_COMPUTE, SPAN_EXPERTS, SPAN_READ, SPAN_WAIT, now
from mer._ext.remote cimport RemoteTier
from mer._ext.vram cimport VramTier
from mer._ext.uring cimport MER_IO_DEMAND, Reader, ReadOp, mer_read_done

from mer._ext.mixture import mixture_bytes
from mer._ext.prefetch import EARLY_LAYERS, NOTHING_AHEAD
from mer._ext.remote import NO_PEERS
from mer._ext.vram import NO_VRAM
from mer.errors import BudgetError

cdef enum:
    WAITING          # not acquired, or refused: the slots are in use
    LOADING          # our own reads are under way
    BUSY             # somebody else is reading it; pinned
    READY            # resident and pinned
    COMPUTING
    ON_DEVICE        # computed by the tier above memory
    ON_PEER          # another machine has been asked
    DONE
    N_STATES


cdef list _sizes(const int64_t[:, ::1] layers, const int64_t[:, :, ::1] reads):
    """Bytes of a streamer's buffers, in the order in which it lays them out. Raises ValueError."""
    if not (layers.shape[0] > 0 and layers.shape[1] == 5 and reads.shape[0] > 0 and reads.shape[1] > 0
            and reads.shape[2] == 5 and reads.shape[0] % layers.shape[0] == 0):
        raise ValueError(f"tables do not fit: layers {np.shape(layers)} must be [n_layers, 4], "
                         f"reads {np.shape(reads)} [n_layers * n_experts, max_reads, 5]")
    cdef int64_t keys = reads.shape[0], n_experts = keys // layers.shape[0]
    sizes = (
        keys * reads.shape[1] * sizeof(ReadPlan), keys * 3 * 8,
        2 * n_experts * reads.shape[1] * sizeof(ReadOp),
        n_experts * sizeof(Expert),
    )
    return [(size + 63) // 64 * 64 for size in sizes]


def scratch_bytes(const int64_t[:, ::1] layers, const int64_t[:, :, ::1] reads, int64_t top_k, int64_t max_tokens):
    """Bytes that an ExpertStreamer with these arguments allocates beside the cache. Raises ValueError as it does."""
    own = sum(_sizes(layers, reads))
    return own + mixture_bytes(layers, reads.shape[0] // layers.shape[0], top_k, max_tokens)


cdef class ExpertStreamer:
    """Computes out = sum_k weight_k * down(silu(gate(x)) * up(x)) with experts streamed through a cache.

    layers: int64 [n_layers, 5]: format ids of gate, up and down, hidden, intermediate size.
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
        cdef int64_t i
        sizes = _sizes(layers, reads)
        self.cache, self.reader = cache, reader
        self.n_layers, self.max_reads = layers.shape[0], reads.shape[1]
        self.n_experts = reads.shape[0] // self.n_layers
        self.mixture = Mixture(kernels, pool, layers, self.n_experts, top_k, max_tokens)
        self.top_k, self.max_tokens = top_k, max_tokens
        self.scratch_bytes = sum(sizes) + self.mixture.scratch_bytes
        if matrices.shape[0] != reads.shape[0] or matrices.shape[1] != 3 or cache.n_experts < reads.shape[0]:
            raise ValueError(f"tables do not fit: matrices {np.shape(matrices)} must be [{reads.shape[0]}, 3], and "
                             f"the cache made for as many experts, not {cache.n_experts}")
        if cache.policy != "lru" and (cache.n_layers != self.n_layers or cache.n_experts != reads.shape[0]):
            raise ValueError(f"the cache is made for {cache.n_layers} layers and {cache.n_experts} experts, the tables "
                             f"for {self.n_layers} and {reads.shape[0]}")
        if posix_memalign(&self.memory, 64, <size_t>sum(sizes)):
            raise MemoryError(f"no memory for {sum(sizes)} bytes of expert tables")
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        cdef char *memory = <char *>self.memory
        self.reads = <ReadPlan *>(memory + <int64_t>starts[0])
        self.matrices = <int64_t *>(memory + <int64_t>starts[1])
        self.ops = <ReadOp *>(memory + <int64_t>starts[2])
        self.active = <Expert *>(memory + <int64_t>starts[3])
        for i in range(reads.shape[0]):
            self.add_expert(i, reads[i], matrices[i])
        if prefetch:
            self.prefetcher = Prefetcher(cache, reader, self.max_reads, prefetch, self.n_experts, top_k,
                                         max_tokens * top_k, min(self.n_layers, EARLY_LAYERS))
            self.prefetcher.plans = self.reads

    def __dealloc__(self):
        free(self.memory)

    cdef int add_expert(self, int64_t key, const int64_t[:, ::1] reads, const int64_t[::1] matrices) except -1:
        """Checks and copies one row of the tables."""
        cdef int64_t sizes[3]
        cdef int64_t j, room = self.cache.slot_bytes
        cdef ReadPlan *plan
        self.mixture.matrix_bytes(key, sizes)
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
        cdef int64_t start, mark
        cdef Mixture mixture = self.mixture
        self.ahead, self.layer = NULL, layer
        mixture.begin(layer, x, ids, weights, out)
        if ahead is not None and self.prefetcher is not None and layer + 1 < self.n_layers:
            self.bind_ahead(ahead)
        start = now()
        with nogil:
            self.cache.visit(layer, mixture.ids, mixture.tokens * self.top_k, mixture.tokens)
            mark = now()
            mixture.prepare()
            self.spent(SPAN_COMPUTE, mark)
            error = self.stream(layer * self.n_experts)
            if error == 0 and self.failed is NULL:
                mark = now()
                mixture.combine()
                self.spent(SPAN_COMPUTE, mark)
            if self.recorder is not None:
                self.recorder.add(SPAN_EXPERTS, layer, start, now(), 0)
        if error == ENOSPC:
            raise BudgetError(f"all {self.cache.n_slots} slots of the expert cache hold experts of its pinned set: "
                              "raise --ram, or pin fewer")
        if self.failed is not NULL:
            raise self.reader.error(self.failed.file, self.failed.offset, self.failed.needed, self.failed.result)

    cdef int bind_ahead(self, ahead) except -1:
        if ahead is not self.ahead_array:
            self.ahead_array = None
            self.ahead_view = ahead
            self.ahead_array = ahead
        if self.ahead_view.shape[0] != self.mixture.tokens or self.ahead_view.shape[1] != self.top_k:
            raise ValueError(f"ahead {np.shape(ahead)} must be [{self.mixture.tokens}, {self.top_k}]")
        self.ahead = &self.ahead_view[0, 0]
        return 0

    cdef void plan_reads(self, Expert *e) noexcept nogil:
        """Appends an expert's reads to `ops`: in one step it is read twice at most, so there is room."""
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
            self.recorder.add(SPAN_READ, e.key, e.asked, now(),
                              plan_bytes(&self.reads[e.key * self.max_reads], self.max_reads))
        if failed is NULL:
            self.cache.publish(e.key)
            e.state = READY
        else:
            self.cache.fail(e.key)
            self.cache.release(e.key)
            if self.remote is not None and self.remote.asked[e.key % self.n_experts] >= 0:
                e.state = ON_PEER                    # which may still answer, or has
            else:
                e.state = DONE
                self.failed = failed
        if self.remote is not None and self.remote.came[e.key % self.n_experts]:
            if e.state == READY:
                self.cache.release(e.key)
            e.state = DONE

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
        if e.state == WAITING or e.state == ON_PEER:
            if self.failed is not NULL:
                e.state = DONE
        if e.state == WAITING:
            self.try_acquire(e)

    cdef void begin_device(self, int64_t base, int64_t n) noexcept nogil:
        """Starts what is in the tier above memory."""
        cdef int64_t i
        self.vram.begin(base)
        for i in range(n):
            if self.vram.has(self.active[i].key):
                self.vram.compute(self.active[i].key)
                self.active[i].state = ON_DEVICE
        self.vram.launch()

    cdef bint end_device(self, int64_t n) noexcept nogil:
        """Waits for it. False: it has failed, and its experts are wanted here."""
        cdef int64_t i
        cdef bint done = self.vram.wait()
        if not done:
            for i in range(n):
                if self.active[i].state == ON_DEVICE:
                    self.active[i].state = WAITING
        return done

    cdef void begin_remote(self, int64_t base, int64_t n) noexcept nogil:
        """Asks other machines for what they have, and this one has not."""
        cdef int64_t i
        cdef Expert *each
        self.remote.begin(base)
        for i in range(n):
            each = &self.active[i]
            if (each.state == WAITING and self.cache.state(each.key) == STATE_ABSENT
                    and self.remote.add(each.key - base)):
                each.state = ON_PEER
        self.remote.send(self.layer, self.cache.slot_bytes)
        self.give_up_waiting(n)

    cdef void collect_remote(self, int64_t base, int64_t n) noexcept nogil:
        """What they computed need not be computed here; of who is lost, nothing more comes."""
        cdef int64_t i
        cdef Expert *each
        self.remote.collect()
        for i in range(n):
            each = &self.active[i]
            if not self.remote.came[each.key - base]:
                continue
            if each.state == BUSY or each.state == READY:
                self.cache.release(each.key)
            if each.state == BUSY or each.state == READY or each.state == WAITING or each.state == ON_PEER:
                each.state = DONE                    # one that is being read is DONE when its reads are over
        self.give_up_waiting(n)

    cdef void give_up_waiting(self, int64_t n) noexcept nogil:
        """Of whom no answer is to be expected, the own drive is asked."""
        cdef int64_t i
        for i in range(n):
            if self.active[i].state == ON_PEER and not self.remote.pending(self.active[i].key % self.n_experts):
                self.active[i].state = WAITING

    cdef void compute_ready(self, int64_t n) noexcept nogil:
        cdef int64_t i, start = now(), byte_tokens = 0
        cdef Expert *each
        self.mixture.compute_ready()
        if self.vram is None:
            return
        for i in range(n):
            each = &self.active[i]
            if each.state == COMPUTING:
                byte_tokens += self.cache.slot_bytes * self.mixture.count(each.key % self.n_experts)
                self.vram.offer(each.key, self.cache.slot_ptr(each.slot))
        self.vram.note_multiplied(now() - start, byte_tokens)

    cdef int stream(self, int64_t base) noexcept nogil:
        """Acquires, reads and computes every expert of this step. 0 (see `failed`), or ENOSPC."""
        cdef int64_t n = 0, e, i, mark, submitted = 0, asked_drive = 0, unseen = 0, before = self.bytes_read
        cdef int64_t under_way[N_STATES]
        cdef uint64_t seen
        cdef timespec pause
        cdef Expert *each
        self.failed = NULL
        self.n_ops = 0
        for e in range(self.n_experts):
            if self.mixture.first[e + 1] > self.mixture.first[e]:
                self.active[n] = Expert(base + e, -1, 0, 0, 0, WAITING)
                n += 1
        if self.prefetcher is not None:
            self.prefetcher.judge(base, self.mixture.ids, self.mixture.tokens, self.mixture.first, self.misses,
                                  self.io_wait_ns, self.compute_ns)
        if self.vram is not None:
            self.begin_device(base, n)
        for i in range(n):                           # what is resident is pinned before a miss may evict it
            if self.active[i].state == WAITING and self.cache.state(self.active[i].key) == STATE_RESIDENT:
                self.try_acquire(&self.active[i])
        if self.remote is not None:
            self.begin_remote(base, n)
        while True:
            if self.remote is not None:
                if self.remote.has_news():
                    self.collect_remote(base, n)
                if self.remote.is_overdue():
                    for i in range(n):               # their answers are still of use, if they come first
                        if self.active[i].state == ON_PEER:
                            self.active[i].state = WAITING
            memset(under_way, 0, sizeof(under_way))
            seen = self.reader.completed()           # before the look at the reads: none ends unnoticed
            if self.prefetcher is not None:
                self.prefetcher.collect()
            self.mixture.clear()
            for i in range(n):
                each = &self.active[i]
                self.advance(each)
                if each.state == READY and self.vram is not None and self.vram.take(
                        each.key, self.cache.slot_ptr(each.slot), self.mixture.count(each.key - base)):
                    self.cache.release(each.key)
                    each.state = ON_DEVICE
                if each.state == READY and self.mixture.n_rows < BATCH_ROWS:
                    self.mixture.add_ready(each.key - base, <const uint8_t *>self.cache.slot_ptr(each.slot),
                                           &self.matrices[each.key * 3])
                    each.state = COMPUTING
                if self.remote is not None and (each.state == COMPUTING or each.state == ON_DEVICE):
                    self.remote.forgo(each.key - base)
                under_way[each.state] += 1
            if self.n_ops > submitted:
                asked_drive = asked_drive or now()
                self.reader.submit(&self.ops[submitted], self.n_ops - submitted)
                submitted = self.n_ops
            # What the device does meanwhile delays the layer's own reads; but who computes many tokens looks too rarely.
            if (self.ahead is not NULL and self.failed is NULL and not under_way[WAITING] and not under_way[BUSY]
                    and (not under_way[LOADING] or self.mixture.tokens > 1)):
                self.prefetcher.look_ahead(base + self.n_experts, self.ahead, self.mixture.tokens)
                self.ahead = NULL
            if self.remote is not None and asked_drive and not under_way[LOADING]:
                self.remote.note_read(now() - asked_drive, unseen, self.bytes_read - before)
                asked_drive, before = 0, self.bytes_read
            unseen = 0
            if self.vram is not None:
                self.vram.launch()
            mark = now()
            if self.mixture.n_ready:
                if self.failed is NULL:
                    self.compute_ready(n)
                for i in range(n):
                    if self.active[i].state == COMPUTING:
                        self.cache.release(self.active[i].key)
                        self.active[i].state = DONE
                unseen = self.spent(SPAN_COMPUTE, mark)
                self.reader.wait(0)
            elif under_way[LOADING] or (self.prefetcher is not None and self.prefetcher.under_way
                                        and (under_way[BUSY] or under_way[WAITING])):
                self.cache.hold_prefault(False)
                self.reader.wait_past(seen)
                self.cache.hold_prefault(True)
                self.spent(SPAN_WAIT, mark)
            elif under_way[BUSY] or under_way[WAITING]:
                if not under_way[BUSY] and self.cache.all_protected():
                    if self.vram is not None:
                        self.vram.wait()
                    return ENOSPC
                # It hangs on others, who read it or hold the slots; nothing here is pinned but what they read.
                pause.tv_sec, pause.tv_nsec = 0, 50000
                nanosleep(&pause, NULL)
                self.spent(SPAN_WAIT, mark)
            elif under_way[ON_PEER]:
                self.remote.wait()
            elif self.vram is None or not under_way[ON_DEVICE] or self.end_device(n):
                return 0

    cdef int64_t spent(self, int64_t kind, int64_t since) noexcept nogil:
        cdef int64_t end = now()
        cdef int64_t *total = &self.compute_ns if kind == SPAN_COMPUTE else &self.io_wait_ns
        total[0] += end - since
        if self.recorder is not None:
            self.recorder.add(kind, self.layer, since, end, 0)
        return end - since

    def wants_guesses(self, int64_t tokens):
        """Whether `ahead` would be of use to the next call, of this many tokens."""
        return self.prefetcher is not None and self.prefetcher.wants_guesses(tokens)

    def use_vram(self, Device device not None, int64_t nbytes):
        """Put a tier of as many bytes of the device's memory above the cache; after add_biases, gelu and clamp.

        Raises GpuError, GpuMemoryError where the device can't: nothing has changed then.
        """
        tier = VramTier(device, self.cache, self.mixture, self.mixture.pool, nbytes)
        (<VramTier>tier).matrices, (<VramTier>tier).prefetcher = self.matrices, self.prefetcher
        self.vram = tier
        if self.prefetcher is not None:
            self.prefetcher.elsewhere = self.vram.slot_of

    def use_peers(self, peers, int64_t patience_ns):
        """Ask other machines for experts that are not here, see RemoteTier; returns the tier."""
        self.remote = RemoteTier(self.mixture, self.cache.n_experts, peers, patience_ns)
        if self.prefetcher is not None:
            self.prefetcher.remote, self.prefetcher.slower = self.remote.holder, self.remote.left_out
        return self.remote

    def add_biases(self, list layers):
        """See Mixture.add_biases()."""
        self.mixture.add_biases(layers)

    def gelu(self):
        """See Mixture.gelu()."""
        self.mixture.gelu()

    def clamp(self, float alpha, float limit, float added):
        """See Mixture.clamp()."""
        self.mixture.clamp(alpha, limit, added)

    def settle(self):
        """Wait for what is being read ahead: nothing in the cache is pinned by this one afterwards."""
        if self.prefetcher is not None:
            with nogil:
                self.prefetcher.drain()

    def record(self, Recorder recorder):
        """Have this and every later call recorded; its reads, too."""
        self.recorder = recorder
        if self.prefetcher is not None:
            self.prefetcher.recorder = recorder

    def stats(self):
        """Totals since the start: seconds waiting for reads and computing, bytes asked of the device,
        and experts found in the cache (hits) or read (misses), each counted once a call.

        An expert that is on its way because it was read ahead counts as found. For the rest see StepStats,
        VramTier.stats() and RemoteTier.stats(); prefetch_depth: how many guesses of a token are read ahead now;
        prefetched_early: of the experts read ahead those before a step, early_layers: of how many layers now;
        prefetching: experts on their way.
        """
        ahead = NOTHING_AHEAD if self.prefetcher is None else self.prefetcher.stats()
        return {
            "io_wait_s": self.io_wait_ns / 1e9,
            "compute_s": self.compute_ns / 1e9,
            "bytes_read": self.bytes_read + ahead["prefetch_bytes"],
            "hits": self.hits,
            "misses": self.misses,
            **ahead,
            **(NO_VRAM if self.vram is None else self.vram.stats()),
            **(NO_PEERS if self.remote is None else self.remote.stats()),
        }
