# Reading experts ahead of their layer, with what the device has to spare.
from libc.stdint cimport int64_t, uint8_t
from libc.string cimport memset

from mer._ext.cache cimport ExpertCache
from mer._ext.recorder cimport Recorder
from mer._ext.uring cimport Reader, ReadOp

ctypedef struct ReadPlan:
    int64_t file
    int64_t offset             # aligned, bytes in the file
    int64_t length             # aligned
    int64_t needed             # bytes of it that must arrive: the file may end before the aligned end
    int64_t slot_offset        # where in the slot it lands


cdef inline void plan_read(ReadOp *op, const ReadPlan *plan, char *slot, int priority) noexcept nogil:
    memset(op, 0, sizeof(ReadOp))
    op.file, op.offset = <int>plan.file, plan.offset
    op.length, op.needed = plan.length, plan.needed
    op.dest = slot + plan.slot_offset
    op.priority = priority


cdef inline int64_t plan_bytes(const ReadPlan *plans, int64_t max_reads) noexcept nogil:
    cdef int64_t j, total = 0
    for j in range(max_reads):
        if plans[j].length == 0:
            break
        total += plans[j].length
    return total


cdef class Prefetcher:
    cdef ExpertCache cache
    cdef Reader reader
    cdef Recorder recorder             # None: nothing is recorded
    cdef const ReadPlan *plans         # [n_experts of the cache, max_reads]; length 0: not used
    cdef int64_t max_reads, capacity
    cdef ReadOp *ops                   # [capacity, max_reads]
    cdef int64_t *keys                 # [capacity] the expert that is being read, -1: this place is free
    cdef int64_t *asked                # [capacity] when its reads were submitted, ns, if that is recorded
    cdef uint8_t *unused               # [n_experts of the cache] read ahead, and not used since
    cdef readonly int64_t under_way    # experts whose reads have not been collected
    cdef readonly int64_t issued, useful, failed, bytes_read

    # Ends the reads that are over: their experts are resident from then on, and nobody's pin is left.
    cdef void collect(self) noexcept nogil
    # An expert that is there will probably be wanted: others shall make room before it.
    cdef void keep(self, int64_t key) noexcept nogil
    # Starts to read an expert, unless it is there, on its way, or without a slot; whether it did.
    cdef bint ask(self, int64_t key) noexcept nogil
    # The expert is wanted now: counts it if it was read ahead.
    cdef void note_use(self, int64_t key) noexcept nogil
