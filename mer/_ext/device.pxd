"""A CUDA device, for other Cython modules. Methods below return 0 or the driver's error and hold no GIL: see csrc/mer_device.h."""
from libc.stdint cimport int32_t, uint64_t

cdef extern from "mer_device.h" nogil:
    enum:
        MER_STREAM_COMPUTE
        MER_STREAM_COPY
        MER_STREAM_BLOCKS
        MER_DEVICE_OUT_OF_MEMORY
        MER_DEVICE_NOT_READY

    ctypedef struct mer_gpu_product:
        uint64_t weights
        uint64_t bias
        uint64_t y
        uint64_t index
        int32_t first
        int32_t count

    ctypedef struct mer_device:
        int lost


cdef class Device:
    cdef mer_device *_device
    cdef dict _functions
    cdef readonly int ordinal, driver_version, multiprocessors
    cdef readonly str name
    cdef readonly tuple capability
    cdef readonly object total

    # Raises GpuError for a name that the module has not.
    cdef void *function(self, str name) except NULL
    # What the driver calls an error.
    cdef str describe(self, int error)
    # Raises GpuError, GpuMemoryError where error is not 0; `what` was tried.
    cdef int check(self, int error, str what) except -1
    cdef int lost_error(self) noexcept nogil
    cdef int enter(self) noexcept nogil
    cdef int alloc(self, size_t nbytes, uint64_t *pointer) noexcept nogil
    cdef int free(self, uint64_t pointer) noexcept nogil
    cdef int pin(self, void *host, size_t nbytes, uint64_t *pointer) noexcept nogil
    cdef int unpin(self, void *host) noexcept nogil
    cdef int upload(self, int stream, uint64_t to, const void *source, size_t nbytes) noexcept nogil
    cdef int download(self, int stream, void *to, uint64_t source, size_t nbytes) noexcept nogil
    cdef int launch(self, int stream, void *function, const unsigned int *grid, unsigned int threads,
                    unsigned int shared, void **arguments) noexcept nogil
    cdef int finish(self, int stream) noexcept nogil
    cdef int new_event(self, void **event) noexcept nogil
    cdef void drop_event(self, void *event) noexcept nogil
    cdef int record(self, void *event, int stream) noexcept nogil
    cdef int follow(self, int stream, void *event) noexcept nogil
    cdef int ready(self, void *event) noexcept nogil
    cdef int wait(self, void *event) noexcept nogil


cdef class Event:
    cdef Device device
    cdef void *_event
