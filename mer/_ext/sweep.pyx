"""Fills free slots of the cache with experts that will probably be wanted, in the background."""

import numpy as np

from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport calloc, free

from mer._ext.cache cimport ACQ_FULL, ACQ_MISS, ExpertCache, STATE_ABSENT
from mer._ext.prefetch cimport ReadPlan, plan_bytes, plan_read
from mer._ext.uring cimport MER_IO_PREFETCH, Reader, ReadOp, mer_read_done

cdef enum:
    LANES = 4          # experts on their way: enough to keep a device busy, few to wait for when a demand read comes


cdef class Sweep:
    """Reads experts into slots that hold nothing, for one thread beside the one that computes.

    reads: the table that ExpertStreamer takes. Nobody makes room for what is read here.
    """
    cdef ExpertCache cache
    cdef Reader reader
    cdef int64_t max_reads
    cdef ReadPlan *plans           # [n_experts of the cache, max_reads]
    cdef ReadOp *ops               # [LANES, max_reads]
    cdef int64_t[LANES] keys       # the expert that a lane reads, -1: none
    cdef int64_t busy
    cdef volatile bint stopped
    cdef readonly int64_t experts, nbytes    # read so far

    def __cinit__(self, ExpertCache cache not None, Reader reader not None, const int64_t[:, :, ::1] reads):
        cdef int64_t i, j
        cdef ReadPlan *plan
        if reads.shape[0] != cache.n_experts or reads.shape[2] != 5:
            raise ValueError(f"reads {np.shape(reads)} must be [{cache.n_experts}, max_reads, 5]")
        self.cache, self.reader, self.max_reads = cache, reader, reads.shape[1]
        self.plans = <ReadPlan *>calloc(reads.shape[0] * reads.shape[1], sizeof(ReadPlan))
        self.ops = <ReadOp *>calloc(LANES * self.max_reads, sizeof(ReadOp))
        if self.plans is NULL or self.ops is NULL:
            raise MemoryError("no memory for reading experts back")
        for i in range(reads.shape[0]):
            for j in range(self.max_reads):
                plan = &self.plans[i * self.max_reads + j]
                plan[0] = ReadPlan(reads[i, j, 0], reads[i, j, 1], reads[i, j, 2], reads[i, j, 3], reads[i, j, 4])
        for i in range(LANES):
            self.keys[i] = -1

    def __dealloc__(self):
        free(self.plans)
        free(self.ops)

    def run(self, const int64_t[::1] keys):
        """Reads these experts in this order, until no slot is free or `stop` is called; blocks, without the GIL.

        Raises IndexError for an expert that does not exist.
        """
        cdef int64_t i, key
        cdef uint64_t seen
        for i in range(keys.shape[0]):
            self.cache._check(keys[i])
        with nogil:
            i = 0
            while self.busy or (i < keys.shape[0] and not self.stopped):
                seen = self.reader.completed()
                self.collect()
                while i < keys.shape[0] and self.busy < LANES and not self.stopped:
                    key = keys[i]
                    i += 1
                    if self.cache.state(key) != STATE_ABSENT:
                        continue
                    if self.cache.free_slots() == 0 or not self.begin(key):
                        i = keys.shape[0]
                if self.busy:
                    self.reader.wait_past(seen)

    def stop(self):
        """From any thread: `run` begins no more reads, and returns when those on their way have ended."""
        self.stopped = True

    cdef bint begin(self, int64_t key) noexcept nogil:
        """Whether there was a slot."""
        cdef int64_t slot = -1, lane = 0, j = 0
        cdef const ReadPlan *plan = &self.plans[key * self.max_reads]
        cdef ReadOp *ops
        cdef int status = self.cache.acquire(key, &slot)
        if status != ACQ_MISS:
            if status != ACQ_FULL:             # somebody else was quicker
                self.cache.release(key)
            return status != ACQ_FULL
        while self.keys[lane] >= 0:
            lane += 1
        ops = &self.ops[lane * self.max_reads]
        while j < self.max_reads and plan[j].length:
            plan_read(&ops[j], &plan[j], self.cache.slot_ptr(slot), MER_IO_PREFETCH)
            j += 1
        if j < self.max_reads:
            ops[j].length = 0
        self.keys[lane] = key
        self.busy += 1
        self.reader.submit(ops, j)
        return True

    cdef void collect(self) noexcept nogil:
        cdef int64_t lane, j
        cdef bint over, failed
        cdef ReadOp *op
        for lane in range(LANES):
            if self.keys[lane] < 0:
                continue
            over, failed = True, False
            for j in range(self.max_reads):
                op = &self.ops[lane * self.max_reads + j]
                if op.length == 0:
                    break
                over = over and mer_read_done(op)
                failed = failed or (over and op.result < 0)
            if not over:
                continue
            if failed:                         # whoever needs it reads it again, and is told why it fails
                self.cache.fail(self.keys[lane])
            else:
                self.cache.publish(self.keys[lane])
                self.experts += 1
                self.nbytes += plan_bytes(&self.plans[self.keys[lane] * self.max_reads], self.max_reads)
            self.cache.release(self.keys[lane])
            self.keys[lane] = -1
            self.busy -= 1
