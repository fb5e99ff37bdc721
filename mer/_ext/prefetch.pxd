# Reading experts ahead of their layer, with what the device has to spare.
from libc.stdint cimport int32_t, int64_t, uint8_t
from libc.string cimport memset

from mer._ext.ahead cimport AheadDepth, AheadSwitch
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
    cdef const int32_t *elsewhere      # [n_experts of the cache] >= 0: it is in a tier above; NULL: there is none
    cdef const int32_t *remote         # the same: another machine has it
    cdef const uint8_t *slower         # [256] whether it (its number modulo 256) was slower than the drive of late
    cdef int64_t max_reads, capacity, n_experts, top_k
    cdef public AheadSwitch switch     # whether anything is read ahead of a layer that is not a chunk's; None: it is
    cdef readonly AheadDepth depth     # how many of each token's guesses are asked for then
    cdef ReadOp *ops                   # [capacity, max_reads]
    cdef int64_t *keys                 # [capacity] the expert that is being read, -1: this place is free
    cdef int64_t *asked                # [capacity] when its reads were submitted, ns, if that is recorded
    cdef uint8_t *unused               # [n_experts of the cache] read ahead, and not used since
    cdef int64_t *asked_key            # [capacity] what was asked for at the last turn of a layer,
    cdef int64_t *asked_rank           # [capacity] as which guess,
    cdef int64_t *asked_place          # [capacity] and where in `keys` that was
    cdef int64_t n_asked
    # The same of what was asked for before a step, until the layer that it was for has had its turn
    cdef readonly AheadDepth early     # of how many layers; its ranks are layers
    cdef int64_t *early_key            # [capacity]
    cdef int64_t *early_place          # [capacity]
    cdef int64_t n_early
    cdef bint stepped                  # a layer has had its turn since
    # At the last turn of a layer: the totals until then, and whether that was a chunk's
    cdef int64_t misses, waited, computed, was_useful
    cdef bint was_chunk
    cdef int32_t *guesses              # [most pairs] what the next layer was expected to choose
    cdef int64_t guessed_base, n_guesses
    cdef readonly int64_t under_way    # experts whose reads have not been collected
    # totals: experts read ahead, and wanted then; their bytes; guesses, and right ones
    # early: of the experts, those read before a step
    cdef readonly int64_t issued, early_issued, useful, failed, bytes_read, useful_bytes, guessed, right

    # Ends the reads that are over: their experts are resident from then on, and nobody's pin is left.
    cdef void collect(self) noexcept nogil
    # Waits for all reads that are under way.
    cdef void drain(self) noexcept nogil
    # Whether guesses for the next layer of a step of this many tokens will be of use.
    cdef bint wants_guesses(self, int64_t tokens) noexcept nogil
    # The turn of a layer whose experts begin at `base`, before they are acquired: its tokens chose ids[tokens, top_k],
    # expert e is wanted by first[e + 1] - first[e] of them. What was guessed for it is compared with that. misses,
    # waited: experts that had to be read without a guess, and ns waited for reads, since the start; computed: ns in
    # which experts were multiplied.
    cdef void judge(self, int64_t base, const int32_t *ids, int64_t tokens, const int64_t *first, int64_t misses,
                    int64_t waited, int64_t computed) noexcept nogil
    # Reads ahead of what ahead[tokens, top_k] guesses of the layer at `base`: every token's likeliest first.
    cdef void look_ahead(self, int64_t base, const int32_t *ahead, int64_t tokens) noexcept nogil
    # Before a step whose tokens will probably choose likely[layers, tokens, top_k] in the first layers; -1: not known.
    cdef void before_step(self, const int32_t *likely, int64_t layers, int64_t tokens) noexcept nogil
    cdef void judge_early(self, int64_t base, const int64_t *first, bint demand) noexcept nogil
    cdef int outcome(self, int64_t key, int64_t place, bint wanted, bint demand) noexcept nogil
    cdef bint ask(self, int64_t key, int64_t rank) noexcept nogil
    cdef bint reads(self, int64_t i) noexcept nogil
    cdef bint is_chunk(self, int64_t tokens) noexcept nogil
    cdef bint is_on(self) noexcept nogil
    cdef void judge_turn(self, int64_t base, int64_t tokens, int64_t misses, int64_t waited,
                         int64_t computed) noexcept nogil
    cdef int64_t early_layers_now(self) noexcept nogil
    # The expert is wanted now: counts it if it was read ahead.
    cdef void note_use(self, int64_t key) noexcept nogil
