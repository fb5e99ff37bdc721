# Experts in a device's memory: which, and how they get there.
from libc.stdint cimport int32_t, int64_t, uint64_t

from mer._ext.cache cimport ExpertCache
from mer._ext.decoder cimport mer_router
from mer._ext.device cimport Device
from mer._ext.gpu_mixture cimport GpuMixture
from mer._ext.kernels cimport Pool
from mer._ext.mixture cimport Mixture
from mer._ext.prefetch cimport Prefetcher

ctypedef struct Bounce:
    char *memory               # pinned, slot_bytes
    void *arrived              # an event: the device has what is in it
    void *computed             # the same of one that passes
    int64_t key                # of the expert in it, -1: free
    int64_t slot               # where that goes; -1: it passes, in a slot of its own behind the tier's
    bint launched              # it passes, and its products have been started


cdef class VramTier:
    cdef Device device
    cdef ExpertCache cache             # the tier below
    cdef Mixture mixture
    cdef GpuMixture arithmetic
    cdef Pool pool
    cdef Prefetcher prefetcher         # of the tier below; None: nothing is read ahead
    cdef const int64_t *matrices       # [keys, 3] offsets in a slot
    cdef readonly int64_t n_slots, slot_bytes, n_keys, n_experts, n_layers
    cdef uint64_t arena
    cdef int32_t *slot_of              # [keys] -1: not there
    cdef int32_t *key_of               # [slots] of those that were filled, also of experts on their way
    cdef float *heat                   # [keys] share of the tokens that want it, averaged over the last ones
    cdef int64_t *used                 # [slots] the last layer's call that it was computed in
    cdef int64_t *missing              # [n_layers] how many of its experts are not there
    cdef bint *listed                  # [n_layers] whether the device knows where a complete layer's experts are
    cdef int64_t *seen                 # [n_experts] the last turn that counted it
    cdef bint fills                    # complete layers are of use to somebody
    cdef bint under_way                # the device may still compute what it chose
    cdef void *chosen                  # an event behind that
    cdef Bounce *bounces
    cdef char *bounce_memory
    cdef int64_t n_bounces, n_filled, n_resident, turn, base, coldest
    cdef bint bounces_pinned
    # what a thread of the pool copies
    cdef char *copy_to
    cdef const char *copy_from
    # speeds, ns a byte: of copying an expert to the device; of multiplying with one here, a token
    cdef double copy_ns, multiply_ns
    cdef int error                     # the driver's, which ended the tier; 0: it works
    cdef int64_t hits, promotions, evictions, passed, bus_bytes, wait_ns

    # A layer's turn, after Mixture.begin; its experts begin at `base`.
    cdef void begin(self, int64_t base) noexcept nogil
    cdef bint has(self, int64_t key) noexcept nogil
    # Have an expert that is there computed: at the next `launch`.
    cdef void compute(self, int64_t key) noexcept nogil
    # Whether it was taken over: its weights pass through the device, and are computed there at the next `launch`.
    cdef bint take(self, int64_t key, const char *weights, int64_t count) noexcept nogil
    # The same without computing it, where it is wanted often enough: it will be there some layers later.
    cdef void offer(self, int64_t key, const char *weights) noexcept nogil
    cdef void launch(self) noexcept nogil
    # Until all of the layer is computed. False: it is not, and never will be; nothing is in the tier any more.
    cdef bint wait(self) noexcept nogil
    # Whether all of a layer's experts are there.
    cdef bint complete(self, int64_t layer) noexcept nogil
    # Then, in the place of a turn: see GpuMixture. 0, or the driver's error.
    cdef int compute_chosen(self, int64_t layer, int64_t tokens, const mer_router *router, uint64_t bias,
                            uint64_t expert_scale, uint64_t x, uint64_t acts, uint64_t ids) noexcept nogil
    # When all that was computed so is done: what a layer's tokens chose, ids i32 [tokens, top_k].
    cdef void note_chosen(self, int64_t layer, const int32_t *ids, int64_t tokens) noexcept nogil
    # What the processor took for products with so many bytes of weights, times their tokens.
    cdef void note_multiplied(self, int64_t ns, int64_t byte_tokens) noexcept nogil

    cdef void collect(self) noexcept nogil
    cdef int64_t find_coldest(self) noexcept nogil
    cdef int64_t find_slot(self, int64_t key) noexcept nogil
    cdef Bounce *free_bounce(self) noexcept nogil
    cdef int copy(self, Bounce *b, int64_t key, const char *weights, int64_t slot) noexcept nogil
    cdef Bounce *find_moving(self, int64_t key) noexcept nogil
    cdef uint64_t place_of(self, const Bounce *b) noexcept nogil
    cdef void note_computed(self) noexcept nogil
    cdef void copy_piece(self, int64_t start) noexcept nogil
    cdef void fail(self, int error) noexcept nogil
    cdef void forget(self) noexcept nogil
    cdef void fill(self) noexcept nogil
