"""Copies of the blocks of keys and values that a device has; see gpu_blocks.pyx."""
from libc.stdint cimport int64_t, uint8_t

from mer._ext.device cimport Device
from mer._ext.gpu_decoder cimport GpuDecoder

cdef class GpuBlocks:
    cdef GpuDecoder decoder           # None: closed
    cdef Device device
    cdef readonly int64_t nbytes      # of a block's layers that are there
    cdef list pinned                  # arrays
    # Events: all computing before a copy out, before a copy in (two threads order them); the last copy out.
    cdef void *before_out
    cdef void *before_in
    cdef void *copied

    cdef let_go(self)
    cdef int copy(self, int64_t block, uint8_t *host, bint out) noexcept nogil
    cdef int wait(self) noexcept nogil
