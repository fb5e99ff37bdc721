"""A CUDA device by the driver's API: its memory, its streams (computing, copying), a module of kernels, launches.

The driver's library is opened at run time, so nothing of CUDA is needed to build or to run without a device. Other
Cython modules `cimport` the class (see device.pxd) and call it without the GIL. The methods whose names end in `_py` are
for tests and benchmarks; they check what they can.
"""
cimport cython
import numpy as np

from libc.stdint cimport uint64_t, uintptr_t
from libc.string cimport memcpy

from mer.errors import GpuError, GpuMemoryError

cdef extern from "mer_device.h" nogil:
    ctypedef struct mer_device_full "mer_device":
        int ordinal
        int major
        int minor
        int multiprocessors
        int driver_version
        char name[256]
        size_t total

    mer_device *mer_device_open(const char *library, int ordinal, char *why, size_t room)
    void mer_device_close(mer_device *d)
    const char *mer_device_error(mer_device *d, int error)
    int mer_device_enter(mer_device *d)
    int mer_device_load(mer_device *d, const void *image)
    int mer_device_function(mer_device *d, const char *name, void **function)
    int mer_device_allow_shared(mer_device *d, void *function, int bytes)
    int mer_device_memory(mer_device *d, size_t *free, size_t *total)
    int mer_device_alloc(mer_device *d, size_t bytes, uint64_t *pointer)
    int mer_device_free(mer_device *d, uint64_t pointer)
    int mer_device_pin(mer_device *d, void *host, size_t bytes, uint64_t *pointer)
    int mer_device_unpin(mer_device *d, void *host)
    int mer_device_upload(mer_device *d, int stream, uint64_t to, const void *source, size_t bytes)
    int mer_device_download(mer_device *d, int stream, void *to, uint64_t source, size_t bytes)
    int mer_device_copy(mer_device *d, int stream, uint64_t to, uint64_t source, size_t bytes)
    int mer_device_fill(mer_device *d, int stream, uint64_t at, int byte, size_t bytes)
    int mer_device_launch(mer_device *d, int stream, void *function, const unsigned int *grid, unsigned int threads,
                          unsigned int shared, void **arguments)
    int mer_device_finish(mer_device *d, int stream)
    int mer_device_event(mer_device *d, int timed, void **event)
    void mer_device_drop_event(mer_device *d, void *event)
    int mer_device_record(mer_device *d, void *event, int stream)
    int mer_device_follow(mer_device *d, int stream, void *event)
    int mer_device_ready(mer_device *d, void *event)
    int mer_device_wait(mer_device *d, void *event)
    int mer_device_between(mer_device *d, void *first, void *second, float *milliseconds)

cdef enum:
    MOST_ARGUMENTS = 24

DRIVER = "libcuda.so.1"
COMPUTE, COPY = MER_STREAM_COMPUTE, MER_STREAM_COPY


cdef class Device:
    """Device `ordinal` of the driver in the library `driver`.

    capability: (major, minor). total: bytes of its memory. driver_version: 13000 is CUDA 13.0. Raises GpuError where
    there is no driver, or no such device.
    """

    def __cinit__(self, int ordinal=0, str driver=DRIVER):
        cdef char why[512]
        cdef mer_device_full *found
        self._functions = {}
        name = driver.encode()
        self._device = mer_device_open(name, ordinal, why, sizeof(why))
        if self._device is NULL:
            raise GpuError(why.decode())
        found = <mer_device_full *>self._device
        self.ordinal, self.driver_version, self.multiprocessors = ordinal, found.driver_version, found.multiprocessors
        self.name, self.capability, self.total = found.name.decode(), (found.major, found.minor), found.total

    def __dealloc__(self):
        mer_device_close(self._device)

    @property
    def lost(self):
        """What ended it, as the driver says it; None: it works."""
        return mer_device_error(self._device, self._device.lost).decode() if self._device.lost else None

    def memory(self):
        """(free, total) bytes of the device now; other programs take of it, too."""
        cdef size_t left = 0, total = 0
        self.check(self.enter(), "asking for its memory")
        self.check(mer_device_memory(self._device, &left, &total), "asking for its memory")
        return left, total

    def load(self, bytes image not None):
        """Load the kernels, once: a cubin for this device. Raises GpuError for what is none."""
        cdef const char *data = image
        self.check(self.enter(), "loading kernels")
        self.check(mer_device_load(self._device, data), "loading kernels")

    cdef str describe(self, int error):
        return mer_device_error(self._device, error).decode()

    cdef int check(self, int error, str what) except -1:
        if error == 0:
            return 0
        text = f"device {self.ordinal} ({self.name}), {what}: {self.describe(error)}"
        raise (GpuMemoryError if error == MER_DEVICE_OUT_OF_MEMORY else GpuError)(text)

    cdef void *function(self, str name) except NULL:
        cdef void *found = NULL
        if name not in self._functions:
            text = name.encode()
            self.check(self.enter(), f"finding kernel {name}")
            self.check(mer_device_function(self._device, text, &found), f"finding kernel {name}")
            self._functions[name] = <uintptr_t>found
        return <void *><uintptr_t>self._functions[name]

    def allow_shared(self, str name, int nbytes):
        """Let a kernel have this much dynamic shared memory. Raises GpuError where the device has not as much."""
        self.check(mer_device_allow_shared(self._device, self.function(name), nbytes), f"giving {name} {nbytes} bytes")

    cdef int lost_error(self) noexcept nogil:
        return self._device.lost

    cdef int enter(self) noexcept nogil:
        return mer_device_enter(self._device)

    cdef int alloc(self, size_t nbytes, uint64_t *pointer) noexcept nogil:
        return mer_device_alloc(self._device, nbytes, pointer)

    cdef int free(self, uint64_t pointer) noexcept nogil:
        return mer_device_free(self._device, pointer)

    cdef int pin(self, void *host, size_t nbytes, uint64_t *pointer) noexcept nogil:
        return mer_device_pin(self._device, host, nbytes, pointer)

    cdef int unpin(self, void *host) noexcept nogil:
        return mer_device_unpin(self._device, host)

    cdef int upload(self, int stream, uint64_t to, const void *source, size_t nbytes) noexcept nogil:
        return mer_device_upload(self._device, stream, to, source, nbytes)

    cdef int download(self, int stream, void *to, uint64_t source, size_t nbytes) noexcept nogil:
        return mer_device_download(self._device, stream, to, source, nbytes)

    cdef int launch(self, int stream, void *function, const unsigned int *grid, unsigned int threads,
                    unsigned int shared, void **arguments) noexcept nogil:
        return mer_device_launch(self._device, stream, function, grid, threads, shared, arguments)

    cdef int finish(self, int stream) noexcept nogil:
        return mer_device_finish(self._device, stream)

    cdef int new_event(self, void **event) noexcept nogil:
        return mer_device_event(self._device, 0, event)

    cdef void drop_event(self, void *event) noexcept nogil:
        mer_device_drop_event(self._device, event)

    cdef int record(self, void *event, int stream) noexcept nogil:
        return mer_device_record(self._device, event, stream)

    cdef int follow(self, int stream, void *event) noexcept nogil:
        return mer_device_follow(self._device, stream, event)

    cdef int ready(self, void *event) noexcept nogil:
        return mer_device_ready(self._device, event)

    cdef int wait(self, void *event) noexcept nogil:
        return mer_device_wait(self._device, event)

    def alloc_py(self, size_t nbytes):
        """A device pointer to so many bytes. Raises GpuMemoryError where there are none."""
        cdef uint64_t pointer = 0
        self.check(self.enter(), "taking memory")
        self.check(self.alloc(nbytes, &pointer), f"taking {nbytes} bytes of memory")
        return pointer

    def free_py(self, uint64_t pointer):
        self.check(self.enter(), "giving memory back")
        self.check(self.free(pointer), "giving memory back")

    def pin_py(self, array not None):
        """Have the device read and write the memory of an array by itself; the device's pointer to it."""
        cdef uint64_t pointer = 0
        cdef uintptr_t host = array.ctypes.data
        self.check(self.enter(), "pinning memory")
        self.check(self.pin(<void *>host, array.nbytes, &pointer), f"pinning {array.nbytes} bytes")
        return pointer

    def unpin_py(self, array not None):
        cdef uintptr_t host = array.ctypes.data
        self.check(self.enter(), "unpinning memory")
        self.check(self.unpin(<void *>host), "unpinning memory")

    def upload_py(self, uint64_t to, array not None, int stream=COMPUTE):
        """Copy a contiguous array to the device; pinned memory has to stay as it is until that is done."""
        cdef uintptr_t source = _address(array)
        self.check(self.enter(), "copying to it")
        self.check(self.upload(stream, to, <const void *>source, array.nbytes), "copying to it")

    def download_py(self, array not None, uint64_t source, int stream=COMPUTE):
        """Copy from the device into a contiguous array; it is there after `finish_py`."""
        cdef uintptr_t to = _address(array)
        self.check(self.enter(), "copying from it")
        self.check(self.download(stream, <void *>to, source, array.nbytes), "copying from it")

    def copy_py(self, uint64_t to, uint64_t source, size_t nbytes, int stream=COMPUTE):
        self.check(self.enter(), "copying inside it")
        self.check(mer_device_copy(self._device, stream, to, source, nbytes), "copying inside it")

    def fill_py(self, uint64_t at, int byte, size_t nbytes, int stream=COMPUTE):
        self.check(self.enter(), "filling memory")
        self.check(mer_device_fill(self._device, stream, at, byte, nbytes), "filling memory")

    def launch_py(self, str name, grid, int threads, arguments, int shared=0, int stream=COMPUTE):
        """Start a kernel. grid: three numbers. arguments: numpy scalars, or structures, as the kernel takes them."""
        cdef unsigned int blocks[3]
        cdef void *pointers[MOST_ARGUMENTS]
        cdef int i
        if len(arguments) > MOST_ARGUMENTS:
            raise ValueError(f"a kernel takes {MOST_ARGUMENTS} arguments at the most")
        for i in range(3):
            blocks[i] = grid[i]
        raw = [argument.tobytes() for argument in arguments]
        for i in range(len(raw)):
            pointers[i] = <char *>raw[i]
        self.check(self.enter(), f"starting {name}")
        self.check(self.launch(stream, self.function(name), blocks, threads, shared, pointers), f"starting {name}")

    def finish_py(self, int stream=COMPUTE):
        """Wait until everything in the stream is done. Raises GpuError where something of it failed."""
        cdef int error
        self.check(self.enter(), "waiting for it")
        with nogil:
            error = self.finish(stream)
        self.check(error, "waiting for it")


cdef uintptr_t _address(array) except? 0:
    if not array.flags.c_contiguous:
        raise ValueError("an array that is copied must be contiguous")
    return array.ctypes.data


@cython.no_gc_clear  # what it gives back belongs to the device
cdef class Event:
    """A moment in a stream, with its time."""

    def __cinit__(self, Device device not None):
        self.device = device
        device.check(device.enter(), "making an event")
        device.check(mer_device_event(device._device, 1, &self._event), "making an event")

    def __dealloc__(self):
        if self.device is not None:
            self.device.drop_event(self._event)

    def record(self, int stream=COMPUTE):
        self.device.check(self.device.record(self._event, stream), "recording an event")

    def since(self, Event other not None):
        """Milliseconds between two moments that are over."""
        cdef float found = 0
        self.device.check(mer_device_between(self.device._device, other._event, self._event, &found), "timing")
        return found
