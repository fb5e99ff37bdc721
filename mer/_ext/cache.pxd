# The expert cache, for modules that acquire experts without the GIL. The contract is in csrc/mer_cache.h.
from libc.stdint cimport int32_t, int64_t


cdef extern from "mer_cache.h" nogil:
    enum:
        ACQ_HIT "MER_ACQ_HIT"      # resident, pinned
        ACQ_MISS "MER_ACQ_MISS"    # slot reserved, pinned: read into it, then publish(), or fail() and release()
        ACQ_BUSY "MER_ACQ_BUSY"    # somebody else reads it, pinned: wait until state() is not STATE_LOADING
        ACQ_FULL "MER_ACQ_FULL"    # nothing taken
        STATE_ABSENT "MER_STATE_ABSENT"
        STATE_LOADING "MER_STATE_LOADING"
        STATE_RESIDENT "MER_STATE_RESIDENT"
        STATE_EVICTING "MER_STATE_EVICTING"
        STATE_FAILED "MER_STATE_FAILED"    # release it, then acquire again

    ctypedef struct mer_cache:
        pass


cdef class ExpertCache:
    cdef mer_cache *_cache
    cdef char *_arena
    cdef readonly int64_t n_experts, n_slots, max_slots, slot_bytes, n_layers
    cdef readonly str policy

    # Experts in [0, n_experts), slots in [0, max_slots): not checked. *slot is set unless ACQ_FULL is returned.
    cdef int acquire(self, int64_t expert, int64_t *slot) noexcept nogil
    # Of an expert that is likely to be wanted at its layer's next turn.
    cdef int acquire_early(self, int64_t expert, int64_t *slot) noexcept nogil
    # Before a layer's experts are acquired: what its tokens chose, ids[n], of the layer. Not checked.
    cdef void visit(self, int64_t layer, const int32_t *ids, int64_t n, int64_t tokens) noexcept nogil
    # Whether processors are wanted for something else than touching memory ahead of its use.
    cdef void hold_prefault(self, bint on) noexcept nogil
    # Whether an expert was dropped: it was there, and neither in use nor in the pinned set.
    cdef bint drop(self, int64_t expert) noexcept nogil
    cdef int64_t free_slots(self) noexcept nogil
    # 0, or -1 where the call makes no sense: not loading; not pinned, or the last pin of a read under way.
    cdef int publish(self, int64_t expert) noexcept nogil
    cdef int fail(self, int64_t expert) noexcept nogil
    cdef int release(self, int64_t expert) noexcept nogil
    cdef int state(self, int64_t expert) noexcept nogil
    # Whether every slot holds a member of the pinned set, so that a miss can't be served.
    cdef bint all_protected(self) noexcept nogil
    cdef char *slot_ptr(self, int64_t slot) noexcept nogil
    cdef int64_t _check(self, int64_t expert) except -1
