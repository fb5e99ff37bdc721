"""The tier above memory: experts in the memory of a CUDA device, computed where they are.

An expert gets there by way of memory: its bytes are copied into a pinned buffer, from which the device fetches them
beside all computation. When it has arrived, its slot of the cache below is given up, unless that has room for every
expert. Who makes room is wanted least by the tokens lately; the newcomer must be wanted clearly more often, so that
experts do not take turns. Of a prompt's chunk many tokens want an expert: then it is quicker to have it copied and
computed there than here, and as many as there are buffers for pass through the device, while the processor computes the
others.

A layer all of whose experts are there is complete: then a step of few tokens is computed without a word from here
(`compute_chosen`), and who was chosen is counted when the step is over. So where there is room for every expert, those
that nobody has wanted yet follow, one at a time, while the processor waits for the device anyway (`fill`).

Nothing of that shows in a result: the device gives the same bytes. When the device fails, the tier is empty from then on, and
what it was to compute is computed here.
"""
cimport cython
from libc.math cimport pow
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from posix.stdlib cimport posix_memalign

from mer._ext.cache cimport ACQ_FULL, ACQ_HIT, ACQ_MISS, STATE_ABSENT
from mer._ext.device cimport MER_DEVICE_NOT_READY, MER_STREAM_COMPUTE, MER_STREAM_COPY
from mer._ext.recorder cimport now

from mer._ext.gpu_mixture import buffer_bytes, staging_bytes
from mer.errors import GpuMemoryError

cdef enum:
    PAGE = 4096
    PIECE = 262144         # bytes that one task copies
    MOST_BOUNCES = 16
    BOUNCE_BYTES = 67108864

# The statistics where there is no tier
NO_VRAM = {**dict.fromkeys(("vram_slots", "vram_bytes", "vram_resident", "vram_hits", "vram_passed", "vram_promotions",
                            "vram_evictions", "bus_bytes", "gpu_wait_s"), 0), "lost": None}

# Of one token, in the average of how often an expert is wanted.
cdef double RATE = 0.02
# A newcomer's heat must be that many times the heat of whom it replaces, and this much more: where memory has room for
# every expert, and where it has not, so that whoever leaves the device has to be read again (bench/vram_policy.py).
cdef double CLEARLY = 1.5
cdef double MARGIN = 0.02
cdef double MARGIN_READ = 0.1
# Tokens of an expert from which on it is copied over for being computed, before speeds are known.
cdef double FIRST_GUESS = 8.0
# Of a new measurement in the average of speeds.
cdef double NEW = 0.1


cdef void copy_task(void *arg, long task, int thread) noexcept nogil:
    (<VramTier>arg).copy_piece(<int64_t>task * PIECE)


def host_bytes(const int64_t[:, ::1] layers, int64_t n_experts, int64_t top_k, int64_t max_tokens, int64_t slot_bytes):
    """Bytes of the host's memory that a tier takes, for a streamer with these arguments."""
    return _bounces(slot_bytes) * slot_bytes + staging_bytes(layers, n_experts, top_k, max_tokens)


def slots_in(int64_t nbytes, const int64_t[:, ::1] layers, int64_t n_experts, int64_t top_k, int64_t max_tokens,
             int64_t slot_bytes):
    """For how many experts a tier of `nbytes` has room, for a streamer with these arguments; 0: not for one.

    Raises GpuError for a format without a kernel.
    """
    arithmetic = sum(buffer_bytes(layers, n_experts, top_k, max_tokens))
    return max(0, _slots(nbytes, arithmetic, slot_bytes, layers.shape[0] * n_experts))


cdef int64_t _slots(int64_t nbytes, int64_t arithmetic, int64_t slot_bytes, int64_t n_keys):
    return min((nbytes - arithmetic) // slot_bytes - _bounces(slot_bytes), n_keys)


cdef int64_t _bounces(int64_t slot_bytes):
    return max(<int64_t>2, min(<int64_t>MOST_BOUNCES, BOUNCE_BYTES // slot_bytes))


@cython.no_gc_clear  # what it gives back belongs to the device
cdef class VramTier:
    """Experts of a streamer in at most `nbytes` of a device's memory; fewer where it has not as much left.

    Raises GpuError, GpuMemoryError where not even one fits.
    """

    def __cinit__(self, Device device not None, ExpertCache cache not None, Mixture mixture not None, Pool pool not None,
                  int64_t nbytes):
        cdef int64_t i, n_slots
        cdef uint64_t pointer = 0
        self.device, self.cache, self.mixture, self.pool = device, cache, mixture, pool
        self.slot_bytes, self.n_keys, self.n_experts = cache.slot_bytes, cache.n_experts, mixture.n_experts
        self.n_layers = self.n_keys // self.n_experts
        self.n_bounces = _bounces(self.slot_bytes)
        self.arithmetic = GpuMixture(device, mixture)
        n_slots = _slots(nbytes, self.arithmetic.nbytes, self.slot_bytes, self.n_keys)
        if n_slots < 1:
            least = self.arithmetic.nbytes + (self.n_bounces + 1) * self.slot_bytes
            raise GpuMemoryError(f"{nbytes >> 20} MiB of its memory are too little: one expert and what is needed beside "
                                 f"it take {(least >> 20) + 1} MiB")
        self.slot_of = <int32_t *>calloc(self.n_keys, sizeof(int32_t))
        self.key_of = <int32_t *>calloc(n_slots, sizeof(int32_t))
        self.heat = <float *>calloc(self.n_keys, sizeof(float))
        self.used = <int64_t *>calloc(n_slots, sizeof(int64_t))
        self.bounces = <Bounce *>calloc(self.n_bounces, sizeof(Bounce))
        self.missing = <int64_t *>calloc(self.n_layers, sizeof(int64_t))
        self.listed = <bint *>calloc(self.n_layers, sizeof(bint))
        self.seen = <int64_t *>calloc(self.n_experts, sizeof(int64_t))
        if (self.slot_of is NULL or self.key_of is NULL or self.heat is NULL or self.used is NULL or self.bounces is NULL
                or self.missing is NULL or self.listed is NULL or self.seen is NULL or posix_memalign(<void **>&self.bounce_memory, PAGE, self.n_bounces * self.slot_bytes)):
            raise MemoryError("no memory for the tables of a VRAM tier")
        self.forget()
        device.check(device.new_event(&self.chosen), "making an event")
        device.check(device.pin(self.bounce_memory, self.n_bounces * self.slot_bytes, &pointer), "pinning buffers")
        self.bounces_pinned = True
        for i in range(self.n_bounces):
            self.bounces[i] = Bounce(self.bounce_memory + i * self.slot_bytes, NULL, NULL, -1, -1, False)
            device.check(device.new_event(&self.bounces[i].arrived), "making an event")
            device.check(device.new_event(&self.bounces[i].computed), "making an event")
        self.n_slots = self.take_slots(n_slots)

    def take_slots(self, int64_t n):
        """The slots' memory: as many of n as there are, and those of experts that pass."""
        while n > 0:
            error = self.device.alloc((n + self.n_bounces) * self.slot_bytes, &self.arena)
            if error == 0:
                return n
            try:
                self.device.check(error, f"taking {n} slots of {self.slot_bytes} bytes for experts")
            except GpuMemoryError:
                n = n * 7 // 8
        raise GpuMemoryError(f"device {self.device.ordinal} ({self.device.name}) has no memory left for an expert of "
                             f"{self.slot_bytes} bytes")

    def __dealloc__(self):
        cdef int64_t i
        if self.device is None:
            return
        self.device.enter()
        self.device.finish(MER_STREAM_COPY)
        self.device.drop_event(self.chosen)
        for i in range(self.n_bounces if self.bounces is not NULL else 0):
            self.device.drop_event(self.bounces[i].arrived)
            self.device.drop_event(self.bounces[i].computed)
        if self.bounces_pinned:
            self.device.unpin(self.bounce_memory)
        self.device.free(self.arena)
        free(self.bounce_memory)
        free(self.bounces)
        free(self.slot_of)
        free(self.key_of)
        free(self.heat)
        free(self.used)
        free(self.missing)
        free(self.listed)
        free(self.seen)

    cdef bint has(self, int64_t key) noexcept nogil:
        return self.slot_of[key] >= 0

    cdef void fail(self, int error) noexcept nogil:
        """The device is of no use any more: every expert is where it was before, or in the files."""
        self.error = error
        self.forget()

    cdef void forget(self) noexcept nogil:
        cdef int64_t layer
        memset(self.slot_of, 0xff, self.n_keys * sizeof(int32_t))
        self.n_resident = 0
        for layer in range(self.n_layers):
            self.missing[layer], self.listed[layer] = self.n_experts, False

    cdef void begin(self, int64_t base) noexcept nogil:
        cdef int64_t e, count, tokens = self.mixture.tokens
        cdef float kept = <float>pow(1.0 - RATE, <double>tokens)
        self.base = base
        self.turn += 1
        self.coldest = -1
        for e in range(self.n_experts):
            count = self.mixture.first[e + 1] - self.mixture.first[e]
            self.heat[base + e] = self.heat[base + e] * kept + (1 - kept) * <float>count / <float>tokens
        if self.error == 0:
            self.collect()
        if self.error == 0:
            self.arithmetic.begin()

    cdef void collect(self) noexcept nogil:
        """What has arrived is in the tier from now on; buffers are free that the device has done with."""
        cdef int64_t i
        cdef int error = self.device.enter()
        cdef Bounce *b
        for i in range(self.n_bounces):
            b = &self.bounces[i]
            if b.key < 0 or (b.slot < 0 and not b.launched):
                continue
            if error == 0:
                error = self.device.ready(b.arrived if b.slot >= 0 else b.computed)
            if error == MER_DEVICE_NOT_READY:
                error = 0
                continue
            if error:
                self.fail(error)
                return
            if b.slot >= 0:
                self.slot_of[b.key] = <int32_t>b.slot
                self.missing[b.key // self.n_experts] -= 1
                self.n_resident += 1
                if self.cache.n_slots < self.n_keys:   # its slot there is of use to others
                    self.cache.drop(b.key)
            b.key = -1

    cdef void compute(self, int64_t key) noexcept nogil:
        cdef int64_t slot = self.slot_of[key]
        self.used[slot] = self.turn
        self.hits += 1
        self.arithmetic.add(key - self.base, self.arena + <uint64_t>(slot * self.slot_bytes), &self.matrices[key * 3])

    cdef int64_t find_coldest(self) noexcept nogil:
        """The slot of whom is wanted least, -1: all are on their way, or computed by this layer's call."""
        cdef int64_t slot, best = -1
        cdef float least = 0, heat
        for slot in range(self.n_filled):
            if self.used[slot] == self.turn or self.slot_of[self.key_of[slot]] != slot:
                continue
            heat = self.heat[self.key_of[slot]]
            if best < 0 or heat < least:
                best, least = slot, heat
        return best

    cdef int64_t find_slot(self, int64_t key) noexcept nogil:
        """A slot for an expert, -1: it is not worth one."""
        cdef int64_t best
        cdef double margin = MARGIN if self.cache.n_slots >= self.n_keys else MARGIN_READ
        if self.n_filled < self.n_slots:
            self.n_filled += 1
            return self.n_filled - 1
        if self.coldest < 0:
            self.coldest = self.find_coldest()
        best = self.coldest
        if best < 0 or self.heat[key] <= CLEARLY * self.heat[self.key_of[best]] + margin:
            return -1
        self.coldest = -1
        self.slot_of[self.key_of[best]] = -1
        self.missing[self.key_of[best] // self.n_experts] += 1
        self.listed[self.key_of[best] // self.n_experts] = False
        self.n_resident -= 1
        self.evictions += 1
        return best

    cdef Bounce *free_bounce(self) noexcept nogil:
        """NULL: all are in use."""
        cdef int64_t i
        for i in range(self.n_bounces):
            if self.bounces[i].key < 0:
                return &self.bounces[i]
        return NULL

    cdef int copy(self, Bounce *b, int64_t key, const char *weights, int64_t slot) noexcept nogil:
        """An expert's bytes into a buffer, and from there to the device beside all else; slot -1: it passes."""
        cdef int64_t start = now()
        cdef int error
        self.copy_to, self.copy_from = b.memory, weights
        self.pool.run(copy_task, <void *>self, (self.slot_bytes + PIECE - 1) // PIECE)
        self.copy_ns += ((now() - start) / <double>self.slot_bytes - self.copy_ns) * (NEW if self.copy_ns else 1.0)
        b.key, b.slot, b.launched = key, slot, False
        if slot >= 0:
            self.key_of[slot], self.used[slot] = <int32_t>key, self.turn
            self.promotions += 1
        self.bus_bytes += self.slot_bytes
        error = self.device.enter()
        if error == 0 and self.under_way:                # it may still compute with what is overwritten
            error = self.device.record(self.chosen, MER_STREAM_COMPUTE)
            if error == 0:
                error = self.device.follow(MER_STREAM_COPY, self.chosen)
        if error == 0:
            error = self.device.upload(MER_STREAM_COPY, self.place_of(b), b.memory, self.slot_bytes)
        if error == 0:
            error = self.device.record(b.arrived, MER_STREAM_COPY)
        return error

    cdef void copy_piece(self, int64_t start) noexcept nogil:
        memcpy(self.copy_to + start, self.copy_from + start, min(<int64_t>PIECE, self.slot_bytes - start))

    cdef bint take(self, int64_t key, const char *weights, int64_t count) noexcept nogil:
        cdef double least = FIRST_GUESS
        cdef int error = 0
        cdef Bounce *b
        if self.multiply_ns and self.copy_ns:
            least = max(2.0, 2 * self.copy_ns / self.multiply_ns)  # of one token it is no less to read than to copy
        if self.error or count < least:
            return False
        if self.has(key):                              # it has arrived since the layer's turn began
            self.compute(key)
            return True
        b = self.find_moving(key)
        if b is NULL:
            b = self.free_bounce()
            if b is NULL:
                self.collect()
                b = self.free_bounce() if self.error == 0 else NULL
            if b is NULL:
                return False
            error = self.copy(b, key, weights, self.find_slot(key))
        if error == 0:
            error = self.device.follow(MER_STREAM_COMPUTE, b.arrived)
        if error:
            self.fail(error)
            return False
        if b.slot >= 0:
            self.used[b.slot] = self.turn
        else:
            self.passed += 1
        self.arithmetic.add(key - self.base, self.place_of(b), &self.matrices[key * 3])
        return True

    cdef void offer(self, int64_t key, const char *weights) noexcept nogil:
        cdef Bounce *b
        cdef int64_t slot
        cdef int error
        if self.error or self.slot_of[key] >= 0 or self.find_moving(key) is not NULL:
            return
        b = self.free_bounce()
        if b is NULL:
            return
        slot = self.find_slot(key)
        if slot < 0:
            return
        error = self.copy(b, key, weights, slot)
        if error:
            self.fail(error)

    cdef Bounce *find_moving(self, int64_t key) noexcept nogil:
        """The buffer by which an expert is on its way into the tier; NULL: there is none."""
        cdef int64_t i
        for i in range(self.n_bounces):
            if self.bounces[i].key == key and self.bounces[i].slot >= 0:
                return &self.bounces[i]
        return NULL

    cdef uint64_t place_of(self, const Bounce *b) noexcept nogil:
        """Where the device has what is in a buffer."""
        return self.arena + <uint64_t>((b.slot if b.slot >= 0 else self.n_slots + (b - self.bounces)) * self.slot_bytes)

    cdef void note_computed(self) noexcept nogil:
        """Experts that pass have been computed when the stream is where it is now."""
        cdef int64_t i
        cdef int error = 0
        for i in range(self.n_bounces):
            if self.bounces[i].key >= 0 and self.bounces[i].slot < 0 and not self.bounces[i].launched and error == 0:
                self.bounces[i].launched = True
                error = self.device.record(self.bounces[i].computed, MER_STREAM_COMPUTE)
        if error:
            self.fail(error)

    cdef void fill(self) noexcept nogil:
        """One more expert of the layer on its way here, or into memory."""
        cdef int64_t key, slot = -1
        cdef int status, error
        cdef Bounce *b = self.free_bounce()
        if self.prefetcher is not None and self.prefetcher.under_way:
            self.prefetcher.reader.wait(0)               # else nobody may look at reads that have ended
        if b is NULL or self.error or self.n_slots < self.n_keys or self.complete(self.base // self.n_experts):
            return
        for key in range(self.base, self.base + self.n_experts):
            if self.slot_of[key] >= 0 or self.find_moving(key) is not NULL:
                continue
            if self.cache.state(key) == STATE_ABSENT:
                if (self.prefetcher is not None and self.prefetcher.n_asked < self.prefetcher.capacity
                        and self.prefetcher.ask(key, 0)):
                    return
                continue
            status = self.cache.acquire_early(key, &slot)
            error = self.copy(b, key, self.cache.slot_ptr(slot), self.find_slot(key)) if status == ACQ_HIT else 0
            if status == ACQ_MISS:                       # it has just left
                self.cache.fail(key)
            if status == ACQ_HIT and self.prefetcher is not None:
                self.prefetcher.note_use(key)
            if status != ACQ_FULL:
                self.cache.release(key)
            if error:
                self.fail(error)
            if status == ACQ_HIT:
                return

    cdef void launch(self) noexcept nogil:
        cdef int error = self.arithmetic.launch() if self.error == 0 else 0
        if error:
            self.fail(error)
        if self.error == 0:
            self.note_computed()

    cdef bint wait(self) noexcept nogil:
        cdef int64_t start
        cdef int error
        if self.fills:
            self.fill()
        start = now()
        error = self.arithmetic.wait()
        self.wait_ns += now() - start
        if error and not self.error:
            self.fail(error)
        return self.error == 0

    cdef bint complete(self, int64_t layer) noexcept nogil:
        return self.error == 0 and self.missing[layer] == 0 and self.mixture.rounding == 0  # rounding is done by the host

    cdef int compute_chosen(self, int64_t layer, int64_t tokens, const mer_router *router, uint64_t bias,
                            uint64_t expert_scale, uint64_t x, uint64_t acts, uint64_t ids) noexcept nogil:
        cdef int64_t i, key
        cdef int error
        if not self.listed[layer]:
            for i in range(3 * self.n_experts):
                key = layer * self.n_experts + i // 3
                self.arithmetic.experts[3 * layer * self.n_experts + i] = (
                    self.arena + <uint64_t>(self.slot_of[key] * self.slot_bytes + self.matrices[3 * key + i % 3]))
            error = self.arithmetic.list_experts(layer)
            if error:
                return error
            self.listed[layer] = True
        self.under_way = True
        return self.arithmetic.compute_chosen(layer, tokens, router, bias, expert_scale, x, acts, ids)

    cdef void note_chosen(self, int64_t layer, const int32_t *ids, int64_t tokens) noexcept nogil:
        cdef int64_t i, base = layer * self.n_experts
        cdef float kept = <float>pow(1.0 - RATE, <double>tokens)
        self.turn += 1
        self.under_way = False
        for i in range(self.n_experts):
            self.heat[base + i] *= kept
        for i in range(tokens * self.mixture.top_k):
            self.heat[base + ids[i]] += (1 - kept) / <float>tokens
            self.hits += self.seen[ids[i]] != self.turn
            self.seen[ids[i]] = self.turn

    cdef void note_multiplied(self, int64_t ns, int64_t byte_tokens) noexcept nogil:
        self.multiply_ns += (ns / <double>byte_tokens - self.multiply_ns) * (NEW if self.multiply_ns else 1.0)

    def stats(self):
        """Totals since the start, and what is there now.

        vram_slots, vram_bytes: of the tier, activations included; vram_resident: experts in it; vram_hits: experts found
        there, counted once a call; vram_passed: copied for one layer's call, and computed there; vram_promotions,
        vram_evictions; bus_bytes: of weights copied to the device;
        gpu_wait_s: time with nothing to compute here but the device not done; lost: why the tier was given up, or None.
        """
        return {
            "vram_slots": self.n_slots,
            "vram_bytes": (self.n_slots + self.n_bounces) * self.slot_bytes + self.arithmetic.nbytes,
            "vram_resident": self.n_resident,
            "vram_hits": self.hits,
            "vram_passed": self.passed,
            "vram_promotions": self.promotions,
            "vram_evictions": self.evictions,
            "bus_bytes": self.bus_bytes,
            "gpu_wait_s": self.wait_ns / 1e9,
            "lost": self.device.describe(self.error) if self.error else None,
        }
