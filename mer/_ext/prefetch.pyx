"""Reading experts ahead of their layer, with what the device has to spare.

A prefetch is a read of low priority into a slot of the cache; demand reads overtake it as long as the device has
not begun it. Used by the one thread that drives the streamer.
"""
cimport cython
from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from mer._ext.ahead cimport AHEAD_IN_THE_WAY, AHEAD_IN_TIME, AHEAD_LATE, AHEAD_SPARE, AheadDepth, AheadSwitch
from mer._ext.cache cimport ACQ_HIT, ACQ_MISS, STATE_ABSENT, STATE_RESIDENT
from mer._ext.recorder cimport SPAN_READ_AHEAD, now
from mer._ext.uring cimport MER_IO_PREFETCH, mer_read_done

# Of so many layers, from the first, what a step will probably want is read before it.
EARLY_LAYERS = 4

# The statistics where nothing is read ahead
NOTHING_AHEAD = dict.fromkeys(("prefetched", "prefetch_used", "prefetch_bytes", "prefetch_used_bytes", "guesses",
                               "guesses_right", "prefetch_depth", "prefetched_early", "early_layers", "prefetching"), 0)


@cython.no_gc_clear  # it waits for the reader when it goes
cdef class Prefetcher:
    """At most `capacity` experts are under way at a time, which tokens of up to `most_pairs` choices ask for.

    n_experts: of a layer. top_k: choices of a token. early_layers: of so many, from the first, what is likely may be
    known before a step.
    """

    def __cinit__(self, ExpertCache cache not None, Reader reader not None, int64_t max_reads, int64_t capacity,
                  int64_t n_experts, int64_t top_k, int64_t most_pairs, int64_t early_layers):
        cdef int64_t i
        self.cache, self.reader = cache, reader
        self.max_reads, self.capacity, self.n_experts, self.top_k = max_reads, capacity, n_experts, top_k
        self.depth, self.early = AheadDepth(top_k), AheadDepth(early_layers)
        self.switch = AheadSwitch()
        self.guessed_base = -1
        self.ops = <ReadOp *>calloc(capacity * max_reads, sizeof(ReadOp))
        self.keys = <int64_t *>calloc(capacity, sizeof(int64_t))
        self.asked = <int64_t *>calloc(capacity, sizeof(int64_t))
        self.unused = <uint8_t *>calloc(cache.n_experts, 1)
        # One more: `ask` writes a place before it is known whether that counts.
        self.asked_key = <int64_t *>calloc(5 * capacity + 1, sizeof(int64_t))
        self.early_key, self.early_place = self.asked_key + capacity, self.asked_key + 2 * capacity
        self.asked_rank, self.asked_place = self.asked_key + 3 * capacity, self.asked_key + 4 * capacity
        self.guesses = <int32_t *>calloc(most_pairs, sizeof(int32_t))
        if (self.ops is NULL or self.keys is NULL or self.asked is NULL or self.unused is NULL
                or self.asked_key is NULL or self.guesses is NULL):
            raise MemoryError("no memory for the prefetcher")
        for i in range(capacity):
            self.keys[i] = -1

    def __dealloc__(self):
        with nogil:
            self.drain()                       # the kernel writes into slots and `ops` until then
        free(self.ops)
        free(self.keys)
        free(self.asked)
        free(self.asked_key)
        free(self.guesses)
        free(self.unused)

    cdef void collect(self) noexcept nogil:
        cdef int64_t i, j, key
        cdef bint over, failed
        cdef ReadOp *op
        for i in range(self.capacity if self.under_way else 0):
            key = self.keys[i]
            if key < 0:
                continue
            over, failed = True, False
            for j in range(self.max_reads):
                op = &self.ops[i * self.max_reads + j]
                if op.length == 0:
                    break
                over = over and mer_read_done(op)
                failed = failed or (over and op.result < 0)
            if not over:
                continue
            if self.recorder is not None:
                self.recorder.add(SPAN_READ_AHEAD, key, self.asked[i], now(),
                                  plan_bytes(&self.plans[key * self.max_reads], self.max_reads))
            if failed:                         # whoever needs it reads it again, and is told why it fails
                self.cache.fail(key)
                self.failed += 1
                self.unused[key] = 0
            else:
                self.cache.publish(key)
            self.cache.release(key)
            self.keys[i] = -1
            self.under_way -= 1

    cdef void drain(self) noexcept nogil:
        cdef uint64_t seen
        while self.under_way:
            seen = self.reader.completed()
            self.collect()
            if self.under_way:
                self.reader.wait_past(seen)

    cdef bint is_chunk(self, int64_t tokens) noexcept nogil:
        """So many tokens want nearly all experts of a layer: to read ahead is right then, whatever the router guesses."""
        return tokens * self.top_k >= self.n_experts

    cdef bint wants_guesses(self, int64_t tokens) noexcept nogil:
        return (self.depth.depth > 0 and self.is_on()) or self.is_chunk(tokens)

    cdef bint is_on(self) noexcept nogil:
        return self.switch is None or self.switch.on

    cdef void judge(self, int64_t base, const int32_t *ids, int64_t tokens, const int64_t *first, int64_t misses,
                    int64_t waited, int64_t computed) noexcept nogil:
        cdef int64_t i, k, e, pairs = tokens * self.top_k
        cdef bint demand = False
        if self.guessed_base == base and self.n_guesses == pairs:
            for i in range(pairs):
                for k in range(i - i % self.top_k, i - i % self.top_k + self.top_k):
                    self.right += ids[k] == self.guesses[i]
            self.guessed += pairs
        self.guessed_base = -1
        self.stepped = True
        self.judge_turn(base, tokens, misses, waited, computed)
        if self.n_asked or self.n_early:
            self.reader.wait(0)
            for e in range(self.n_experts):
                demand = demand or (first[e + 1] > first[e] and self.cache.state(base + e) == STATE_ABSENT)
        for i in range(self.n_asked):
            e = self.asked_key[i] - base
            if not 0 <= e < self.n_experts:
                break                          # the layer that they were for never had its turn
            self.depth.note(self.asked_rank[i], self.outcome(self.asked_key[i], self.asked_place[i],
                                                             first[e + 1] > first[e], demand))
        self.n_asked = 0
        self.judge_early(base, first, demand)
        if self.is_on() and not self.is_chunk(tokens):
            self.depth.tick()
            if base == 0:
                self.early.tick()

    cdef void judge_turn(self, int64_t base, int64_t tokens, int64_t misses, int64_t waited,
                         int64_t computed) noexcept nogil:
        """The turn before, as far as something could be read ahead for it or not."""
        if self.switch is None:
            return
        if not self.was_chunk and (self.depth.depth or self.early.depth):
            self.switch.note(misses - self.misses + (self.useful - self.was_useful if self.switch.on else 0),
                             waited - self.waited, computed - self.computed)
        if base == 0:
            self.switch.begin_step()
        self.misses, self.was_useful, self.was_chunk = misses, self.useful, self.is_chunk(tokens)
        self.waited, self.computed = waited, computed

    cdef void judge_early(self, int64_t base, const int64_t *first, bint demand) noexcept nogil:
        cdef int64_t i, e, left = 0
        for i in range(self.n_early):
            e = self.early_key[i] - base
            if 0 <= e < self.n_experts:
                self.early.note(base // self.n_experts, self.outcome(self.early_key[i], self.early_place[i],
                                                                     first[e + 1] > first[e], demand))
            else:
                self.early_key[left], self.early_place[left] = self.early_key[i], self.early_place[i]
                left += 1
        self.n_early = left

    cdef int outcome(self, int64_t key, int64_t place, bint wanted, bint demand) noexcept nogil:
        """What became of a read, at its layer's turn. demand: whether the layer has to read itself."""
        cdef bint late = self.keys[place] == key and self.reads(place)
        if wanted:
            return AHEAD_LATE if late else AHEAD_IN_TIME
        return AHEAD_IN_THE_WAY if late and demand else AHEAD_SPARE

    cdef void before_step(self, const int32_t *likely, int64_t layers, int64_t tokens) noexcept nogil:
        cdef int64_t layer, i, key
        self.collect()
        if self.stepped:
            self.n_early, self.stepped = 0, False
        for layer in range(min(layers, self.early_layers_now())):
            for i in range(layer * tokens * self.top_k, (layer + 1) * tokens * self.top_k):
                if self.n_early == self.capacity or self.under_way == self.capacity:
                    return
                key = layer * self.n_experts + likely[i]
                if 0 <= likely[i] < self.n_experts and self.ask(key, 0):
                    self.early_key[self.n_early] = key
                    self.early_place[self.n_early] = self.asked_place[self.n_asked]
                    self.n_early += 1
                    self.early_issued += 1

    cdef bint reads(self, int64_t i) noexcept nogil:
        """Whether reads of a place are still under way."""
        cdef int64_t j
        for j in range(i * self.max_reads, (i + 1) * self.max_reads):
            if self.ops[j].length == 0:
                break
            if not mer_read_done(&self.ops[j]):
                return True
        return False

    cdef void look_ahead(self, int64_t base, const int32_t *ahead, int64_t tokens) noexcept nogil:
        cdef int64_t rank, t, i, slot, pairs = tokens * self.top_k
        cdef bint chunk = self.is_chunk(tokens)
        memcpy(self.guesses, ahead, pairs * sizeof(int32_t))
        self.guessed_base, self.n_guesses = base, pairs
        for i in range(pairs):                 # what is there will probably be wanted: others make room before it
            if (0 <= ahead[i] < self.n_experts and self.cache.state(base + ahead[i]) == STATE_RESIDENT
                    and self.cache.acquire_early(base + ahead[i], &slot) == ACQ_HIT):
                self.cache.release(base + ahead[i])
        for rank in range(self.top_k if chunk else self.depth.depth):
            for t in range(tokens):
                i = ahead[t * self.top_k + rank]
                if 0 <= i < self.n_experts and self.ask(base + i, rank) and not chunk:
                    self.asked_key[self.n_asked], self.asked_rank[self.n_asked] = base + i, rank
                    self.n_asked += 1

    cdef bint ask(self, int64_t key, int64_t rank) noexcept nogil:
        """Starts to read an expert, unless it is there, on its way, or without a slot; whether it did."""
        cdef int64_t i = 0, j = 0, slot = -1
        cdef const ReadPlan *plan = &self.plans[key * self.max_reads]
        cdef ReadOp *ops
        cdef int status
        cdef int32_t peer = -1 if self.remote is NULL else self.remote[key]    # once: others may change it
        if self.under_way == self.capacity or self.cache.state(key) != STATE_ABSENT:
            return False
        if self.elsewhere is not NULL and self.elsewhere[key] >= 0:
            return False
        if peer >= 0 and not self.slower[peer % 256]:
            return False
        status = self.cache.acquire_early(key, &slot)
        if status != ACQ_MISS:
            if status == ACQ_HIT:
                self.cache.release(key)
            return False
        while self.keys[i] >= 0:
            i += 1
        ops = &self.ops[i * self.max_reads]
        while j < self.max_reads and plan[j].length:
            plan_read(&ops[j], &plan[j], self.cache.slot_ptr(slot), MER_IO_PREFETCH)
            self.bytes_read += plan[j].length
            j += 1
        if j < self.max_reads:
            ops[j].length = 0
        self.keys[i] = key
        self.asked_place[self.n_asked] = i
        self.asked[i] = now() if self.recorder is not None else 0
        self.unused[key] = 1
        self.under_way += 1
        self.issued += 1
        self.reader.submit(ops, j)
        return True

    cdef void note_use(self, int64_t key) noexcept nogil:
        if self.unused[key]:
            self.useful += 1
            self.useful_bytes += plan_bytes(&self.plans[key * self.max_reads], self.max_reads)
        self.unused[key] = 0

    @property
    def early_layers(self):
        """Of how many layers it is worth knowing before a step what they will want, from the first."""
        return self.early_layers_now()

    cdef int64_t early_layers_now(self) noexcept nogil:
        return self.early.depth if self.is_on() else 0

    def read_likely(self, const int32_t[:, :, ::1] likely):
        """Read ahead what the next step will probably want, i32 [layers, T, top_k]; -1: not known.

        Called where the device has nothing to do. It changes no result. Raises ValueError for another shape.
        """
        if likely.shape[2] != self.top_k or not 0 < likely.shape[0] <= self.early.limit or not likely.shape[1]:
            raise ValueError(f"likely must be [1 to {self.early.limit} layers, tokens, {self.top_k}]")
        with nogil:
            self.before_step(&likely[0, 0, 0], likely.shape[0], likely.shape[1])

    def stats(self):
        """Totals since the start, as ExpertStreamer.stats() explains them, and the depth now."""
        return {
            "prefetched": self.issued,
            "prefetch_used": self.useful,
            "prefetch_bytes": self.bytes_read,
            "prefetch_used_bytes": self.useful_bytes,
            "guesses": self.guessed,
            "guesses_right": self.right,
            "prefetch_depth": self.depth.depth if self.is_on() else 0,
            "prefetched_early": self.early_issued,
            "early_layers": self.early_layers_now(),
            "prefetching": self.under_way,
        }
