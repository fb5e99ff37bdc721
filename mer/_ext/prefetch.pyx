"""Reading experts ahead of their layer, with what the device has to spare.

A prefetch is a read of low priority into a slot of the cache; demand reads overtake it as long as the device has
not begun it. Used by the one thread that drives the streamer.
"""
cimport cython
from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free

from mer._ext.cache cimport ACQ_HIT, ACQ_MISS, STATE_ABSENT, STATE_RESIDENT
from mer._ext.recorder cimport SPAN_READ_AHEAD, now
from mer._ext.uring cimport MER_IO_PREFETCH, mer_read_done


@cython.no_gc_clear  # it waits for the reader when it goes
cdef class Prefetcher:
    """At most `capacity` experts are under way at a time."""

    def __cinit__(self, ExpertCache cache not None, Reader reader not None, int64_t max_reads, int64_t capacity):
        cdef int64_t i
        self.cache, self.reader = cache, reader
        self.max_reads, self.capacity = max_reads, capacity
        self.ops = <ReadOp *>calloc(capacity * max_reads, sizeof(ReadOp))
        self.keys = <int64_t *>calloc(capacity, sizeof(int64_t))
        self.asked = <int64_t *>calloc(capacity, sizeof(int64_t))
        self.unused = <uint8_t *>calloc(cache.n_experts, 1)
        if self.ops is NULL or self.keys is NULL or self.asked is NULL or self.unused is NULL:
            raise MemoryError("no memory for the prefetcher")
        for i in range(capacity):
            self.keys[i] = -1

    def __dealloc__(self):
        cdef uint64_t seen
        if self.under_way:
            with nogil:
                while self.under_way:          # the kernel writes into slots and `ops` until then
                    seen = self.reader.completed()
                    self.collect()
                    if self.under_way:
                        self.reader.wait_past(seen)
        free(self.ops)
        free(self.keys)
        free(self.asked)
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

    cdef void keep(self, int64_t key) noexcept nogil:
        cdef int64_t slot
        if self.cache.state(key) == STATE_RESIDENT and self.cache.acquire_early(key, &slot) == ACQ_HIT:
            self.cache.release(key)

    cdef bint ask(self, int64_t key) noexcept nogil:
        cdef int64_t i = 0, j = 0, slot = -1
        cdef const ReadPlan *plan = &self.plans[key * self.max_reads]
        cdef ReadOp *ops
        cdef int status
        if self.under_way == self.capacity or self.cache.state(key) != STATE_ABSENT:
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
        self.asked[i] = now() if self.recorder is not None else 0
        self.unused[key] = 1
        self.under_way += 1
        self.issued += 1
        self.reader.submit(ops, j)
        return True

    cdef void note_use(self, int64_t key) noexcept nogil:
        self.useful += self.unused[key]
        self.unused[key] = 0
