"""The expert cache: a bounded arena of slots and which expert is in which.

The work is done in csrc/cache; other Cython modules call the methods declared in cache.pxd. The methods whose
names end in `_py` do the same for Python, with every argument checked.
"""

import os

import numpy as np

from cpython.buffer cimport PyBuffer_FillInfo
from libc.errno cimport errno
from libc.stdint cimport int32_t, uintptr_t

from mer.errors import ConfigError

cdef extern from "mer_cache.h" nogil:
    enum:
        MER_CACHE_LRU
        MER_CACHE_NEXT_USE
        MER_CACHE_MAX_SLOTS

    ctypedef struct mer_cache_stats:
        int64_t hits
        int64_t misses
        int64_t busy
        int64_t full
        int64_t evictions
        int64_t failures

    ctypedef struct mer_cache_census:
        int64_t resident
        int64_t loading
        int64_t failed
        int64_t in_use
        int64_t pinned_set

    mer_cache *mer_cache_new(int64_t n_layers, int64_t n_experts, int64_t n_slots, size_t slot_bytes, int policy,
                             int huge)
    void mer_cache_free(mer_cache *c)
    char *mer_cache_arena(const mer_cache *c)
    int mer_cache_huge_pages(const mer_cache *c)
    int64_t mer_cache_resize(mer_cache *c, int64_t n)
    int mer_cache_prefault(mer_cache *c, size_t ahead)
    void mer_cache_hold_prefault(mer_cache *c, int on)
    int mer_cache_acquire(mer_cache *c, int64_t expert, int64_t *slot)
    int mer_cache_acquire_early(mer_cache *c, int64_t expert, int64_t *slot)
    void mer_cache_visit(mer_cache *c, int64_t layer, const int32_t *ids, int64_t n, int64_t tokens)
    int mer_cache_publish(mer_cache *c, int64_t expert)
    int mer_cache_fail(mer_cache *c, int64_t expert)
    int mer_cache_release(mer_cache *c, int64_t expert)
    int mer_cache_state(const mer_cache *c, int64_t expert)
    int64_t mer_cache_pins(const mer_cache *c, int64_t expert)
    void mer_cache_protect(mer_cache *c, int64_t expert, int on)
    int mer_cache_all_protected(mer_cache *c)
    int64_t mer_cache_clear(mer_cache *c)
    int mer_cache_drop(mer_cache *c, int64_t expert)
    void mer_cache_chances(mer_cache *c, double *chances)
    void mer_cache_remember(mer_cache *c, int64_t expert, double chance)
    int64_t mer_cache_free_slots(mer_cache *c)
    void mer_cache_get_stats(const mer_cache *c, mer_cache_stats *out)
    void mer_cache_reset_stats(mer_cache *c)
    void mer_cache_count(const mer_cache *c, mer_cache_census *out)

POLICIES = {"next-use": MER_CACHE_NEXT_USE, "lru": MER_CACHE_LRU}
ACQUIRED = ("hit", "miss", "busy", "full")
STATES = ("absent", "loading", "resident", "evicting", "failed")


cdef class ExpertCache:
    """Slots for n_slots of n_experts experts, slot_bytes (a multiple of 4096) each; memory is taken when touched.

    max_slots (n_slots, if not given): to how many `resize` may raise that; they take addresses, and no memory.
    policy: who is evicted, one of POLICIES. n_layers: experts have numbers layer * (n_experts / n_layers) + expert of
    the layer. huge_pages: ask the kernel for them; see `huge_pages`.
    The object is a writable buffer of bytes, the arena of max_slots: slot s starts at s * slot_bytes.
    Raises ValueError for sizes that can't be, ConfigError for an unknown policy, MemoryError.
    """

    def __cinit__(self, int64_t n_experts, int64_t n_slots, int64_t slot_bytes, *, int64_t max_slots=0,
                  str policy="lru", int64_t n_layers=1, bint huge_pages=True):
        if policy not in POLICIES:
            raise ConfigError(f"unknown cache policy {policy!r}: choose from {', '.join(POLICIES)}")
        if n_experts < 1 or not 1 <= n_slots <= MER_CACHE_MAX_SLOTS or slot_bytes < 1 or slot_bytes % 4096:
            raise ValueError(f"a cache needs n_experts >= 1, n_slots in 1..{MER_CACHE_MAX_SLOTS} and slot_bytes a "
                             f"multiple of 4096, not {n_experts}, {n_slots} and {slot_bytes}")
        if n_layers < 1 or n_experts % n_layers:
            raise ValueError(f"{n_experts} experts can't be divided into {n_layers} layers")
        self.max_slots = max(n_slots, min(max_slots, MER_CACHE_MAX_SLOTS))
        self.n_experts, self.n_slots, self.slot_bytes, self.policy = n_experts, n_slots, slot_bytes, policy
        self.n_layers = n_layers
        self._cache = mer_cache_new(n_layers, n_experts, self.max_slots, <size_t>slot_bytes, POLICIES[policy],
                                    huge_pages)
        if self._cache is NULL:
            raise MemoryError(f"no memory for {self.max_slots} slots of {slot_bytes} bytes: {os.strerror(errno)}")
        self._arena = mer_cache_arena(self._cache)
        self.n_slots = mer_cache_resize(self._cache, n_slots)

    def __dealloc__(self):
        mer_cache_free(self._cache)

    cdef int acquire(self, int64_t expert, int64_t *slot) noexcept nogil:
        return mer_cache_acquire(self._cache, expert, slot)

    cdef int acquire_early(self, int64_t expert, int64_t *slot) noexcept nogil:
        return mer_cache_acquire_early(self._cache, expert, slot)

    cdef void visit(self, int64_t layer, const int32_t *ids, int64_t n, int64_t tokens) noexcept nogil:
        mer_cache_visit(self._cache, layer, ids, n, tokens)

    cdef void hold_prefault(self, bint on) noexcept nogil:
        mer_cache_hold_prefault(self._cache, on)

    cdef bint drop(self, int64_t expert) noexcept nogil:
        return mer_cache_drop(self._cache, expert)

    cdef int64_t free_slots(self) noexcept nogil:
        return mer_cache_free_slots(self._cache)

    cdef int publish(self, int64_t expert) noexcept nogil:
        return mer_cache_publish(self._cache, expert)

    cdef int fail(self, int64_t expert) noexcept nogil:
        return mer_cache_fail(self._cache, expert)

    cdef int release(self, int64_t expert) noexcept nogil:
        return mer_cache_release(self._cache, expert)

    cdef int state(self, int64_t expert) noexcept nogil:
        return mer_cache_state(self._cache, expert)

    cdef bint all_protected(self) noexcept nogil:
        return mer_cache_all_protected(self._cache)

    cdef char *slot_ptr(self, int64_t slot) noexcept nogil:
        return self._arena + slot * self.slot_bytes

    cdef int64_t _check(self, int64_t expert) except -1:
        if not 0 <= expert < self.n_experts:
            raise IndexError(f"expert {expert} is outside 0..{self.n_experts - 1}")
        return expert

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self._arena, self.max_slots * self.slot_bytes, 0, flags)

    @property
    def arena_address(self):
        """Where the arena starts, a multiple of 2 MiB: to register it for reads into it."""
        return <uintptr_t>self._arena

    @property
    def arena_bytes(self):
        return self.max_slots * self.slot_bytes

    @property
    def huge_pages(self):
        """Whether huge pages were asked for and the kernel knows them."""
        return bool(mer_cache_huge_pages(self._cache))

    def resize(self, int64_t n_slots):
        """Give slots and their memory back, or take such again; returns n_slots, how many there are now.

        More may be left than wanted, where experts are in use or in the pinned set: try again. By the thread that
        computes, between layers; nobody may read into the arena through fixed buffers. Raises ValueError for a number
        outside 1..max_slots.
        """
        if not 1 <= n_slots <= self.max_slots:
            raise ValueError(f"a cache of {self.max_slots} slots at most can't have {n_slots}")
        with nogil:
            n_slots = mer_cache_resize(self._cache, n_slots)
        self.n_slots = n_slots
        return n_slots

    def prefault(self, size_t ahead):
        """Touch the arena's memory in the background, up to `ahead` bytes beyond the slots used so far.

        For the kernel finds and clears memory at its first touch. Call it before anything is acquired. Returns
        False where there is no thread to be had.
        """
        return mer_cache_prefault(self._cache, ahead) == 0

    def hold_prefault_py(self, bint on):
        """Whether the processors are wanted, so that no more than the next 8 slots are touched ahead."""
        self.hold_prefault(on)

    def slot_view(self, int64_t slot):
        """uint8 [slot_bytes], writable: the memory of one slot. It keeps the cache alive."""
        if not 0 <= slot < self.max_slots:
            raise IndexError(f"slot {slot} is outside 0..{self.max_slots - 1}")
        return np.frombuffer(self, np.uint8, self.slot_bytes, slot * self.slot_bytes)

    def visit_py(self, int64_t layer, const int32_t[:, ::1] ids):
        """The turn of a layer, told before its experts are acquired. ids: i32 [T, k], the k experts that each token chose.

        Raises IndexError for a layer or an id that does not exist.
        """
        cdef int64_t i, j, experts = self.n_experts // self.n_layers
        if not 0 <= layer < self.n_layers:
            raise IndexError(f"layer {layer} is outside 0..{self.n_layers - 1}")
        if ids.shape[1] > experts:
            raise IndexError(f"a token can't choose {ids.shape[1]} of {experts} experts")
        for i in range(ids.shape[0]):
            for j in range(ids.shape[1]):
                if not 0 <= ids[i, j] < experts:
                    raise IndexError(f"expert {ids[i, j]} of a layer is outside 0..{experts - 1}")
        if ids.size:
            self.visit(layer, &ids[0, 0], ids.size, ids.shape[0])

    def acquire_early_py(self, int64_t expert):
        """As acquire_py, of an expert that is likely to be wanted at its layer's next turn.

        It counts as wanted until then, and nothing that is expected as soon makes room for it.
        """
        cdef int64_t slot = -1
        cdef int found = self.acquire_early(self._check(expert), &slot)
        return ACQUIRED[found], None if found == ACQ_FULL else slot

    def acquire_py(self, int64_t expert):
        """('hit' | 'miss' | 'busy', slot), with a pin to release; or ('full', None).

        After 'miss' the caller fills the slot and calls publish_py, or fail_py. After 'busy' it waits until
        the state is no longer 'loading'.
        """
        cdef int64_t slot = -1
        cdef int found = self.acquire(self._check(expert), &slot)
        return ACQUIRED[found], None if found == ACQ_FULL else slot

    def publish_py(self, int64_t expert):
        """The read has ended: loading -> resident. Raises ValueError when it is not loading."""
        if self.publish(self._check(expert)):
            raise ValueError(f"expert {expert} is {self.state_py(expert)}, not loading")

    def fail_py(self, int64_t expert):
        """The read has failed: loading -> failed, and absent with the last pin. Raises ValueError as above."""
        if self.fail(self._check(expert)):
            raise ValueError(f"expert {expert} is {self.state_py(expert)}, not loading")

    def release_py(self, int64_t expert):
        """Drop one pin. Raises ValueError when there is none, or when it is the last one of an expert being read."""
        if self.release(self._check(expert)):
            raise ValueError(f"expert {expert} is {'not pinned' if not self.pins(expert) else 'still loading'}")

    def state_py(self, int64_t expert):
        """One of STATES."""
        return STATES[self.state(self._check(expert))]

    def pins(self, int64_t expert):
        """How many callers hold the expert."""
        return mer_cache_pins(self._cache, self._check(expert))

    def pin_set(self, experts):
        """Add experts to the pinned set: once resident, they are never evicted."""
        for expert in [self._check(e) for e in experts]:
            mer_cache_protect(self._cache, expert, 1)

    def unpin_set(self, experts):
        """Take experts out of the pinned set."""
        for expert in [self._check(e) for e in experts]:
            mer_cache_protect(self._cache, expert, 0)

    def chances(self):
        """f64 [n_experts]: of what is resident, the chance that a token wants it (1 where nobody knows), else -1."""
        found = np.empty(self.n_experts)
        cdef double[::1] out = found
        mer_cache_chances(self._cache, &out[0])
        return found

    def remember(self, int64_t expert, double chance):
        """What `chances` said at another time, in (0, 1]: who makes room is chosen accordingly."""
        if not 0 < chance <= 1:
            raise ValueError(f"expert {expert}: a chance can't be {chance}")
        mer_cache_remember(self._cache, self._check(expert), chance)

    def drop_py(self, int64_t expert):
        """Drop an expert, if it is there and neither in use nor in the pinned set; returns whether it was."""
        return bool(self.drop(self._check(expert)))

    def clear(self):
        """Drop every expert that is neither in use nor in the pinned set; returns how many."""
        return mer_cache_clear(self._cache)

    def stats(self):
        """Counts since the start or reset_stats(), then what is in the cache now.

        hits, misses, busy (somebody else was reading it), full (refused), evictions, failures; resident,
        loading, failed, in_use (pinned by a caller), pinned_set (named by pin_set, resident or not).
        """
        cdef mer_cache_stats counts
        cdef mer_cache_census now
        mer_cache_get_stats(self._cache, &counts)
        mer_cache_count(self._cache, &now)
        return {**counts, **now}

    def reset_stats(self):
        """Counts start again from 0."""
        mer_cache_reset_stats(self._cache)
