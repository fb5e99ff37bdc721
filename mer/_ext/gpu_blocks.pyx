"""Blocks of keys and values that a device has, copied out of its memory and into it beside what it computes.

Copies have a stream of their own. A copy out comes after all that is being computed when it is ordered, and what is
computed later waits for it on the device, since it may write into the block: nobody waits here before the bytes are
wanted. A copy in comes after all that is being computed, too, and is waited for: who computes later finds it there.
"""
import cython

from libc.stdint cimport uintptr_t

from mer._ext.device cimport MER_DEVICE_OUT_OF_MEMORY, MER_STREAM_BLOCKS, MER_STREAM_COMPUTE

from mer.errors import GpuError


@cython.no_gc_clear
cdef class GpuBlocks:
    """The blocks of a GpuDecoder that has its layers, whose parts of a block are copied one behind the other.

    One thread, that which computes, may copy out while another one copies in. Raises GpuError.
    """

    def __cinit__(self, GpuDecoder decoder not None):
        cdef long i
        self.decoder, self.device, self.pinned = decoder, decoder.device, []
        for i in range(decoder.gpu_layers):
            self.nbytes += decoder.gpu[i].block_bytes
        self.device.check(self.device.enter(), "making an event")
        self.device.check(self.device.new_event(&self.before_out), "making an event")
        self.device.check(self.device.new_event(&self.before_in), "making an event")
        self.device.check(self.device.new_event(&self.copied), "making an event")

    def __dealloc__(self):
        if self.device is None:
            return
        self.let_go()
        self.device.drop_event(self.before_out)
        self.device.drop_event(self.before_in)
        self.device.drop_event(self.copied)

    def pin(self, arrays):
        """Have the device reach them by itself, where the system allows it: copies are quicker, and overlap."""
        for array in arrays:
            try:
                self.device.pin_py(array)
            except GpuError:
                return
            self.pinned.append(array)

    def unpin(self):
        """Of all that was pinned, once no copy is under way."""
        self.let_go()

    def close(self):
        """Let go of the decoder, once all copies are over; no further ones may be ordered."""
        self.let_go()
        self.decoder = None

    def copy_out(self, int64_t block, uint8_t[::1] to):
        """Whether a copy of a block was ordered; it is there after `finish`. `to` has to stay until then."""
        cdef int error
        with nogil:
            error = self.copy(block, &to[0], True)
        return error == 0

    def copy_in(self, int64_t block, uint8_t[::1] source):
        """Whether a block has been copied; if not, there may be anything in it."""
        cdef int error, waited
        with nogil:
            error = self.copy(block, &source[0], False)
            waited = self.wait()
        return error == 0 and waited == 0

    def finish(self):
        """Wait for all copies that were ordered: whether the device has worked until now."""
        cdef int error
        with nogil:
            error = self.wait()
        return error == 0

    cdef let_go(self):
        self.wait()
        while self.pinned:
            self.device.unpin(<void *><uintptr_t>self.pinned.pop().ctypes.data)

    cdef int copy(self, int64_t block, uint8_t *host, bint out) noexcept nogil:
        cdef void *before = self.before_out if out else self.before_in
        cdef int error = self.device.enter()
        cdef size_t nbytes
        cdef long i
        if error == 0:
            error = self.device.record(before, MER_STREAM_COMPUTE)
        if error == 0:
            error = self.device.follow(MER_STREAM_BLOCKS, before)
        for i in range(self.decoder.gpu_layers):
            nbytes = self.decoder.gpu[i].block_bytes
            if error == 0 and out:
                error = self.device.download(MER_STREAM_BLOCKS, host, self.decoder.gpu[i].blocks + block * nbytes, nbytes)
            elif error == 0:
                error = self.device.upload(MER_STREAM_BLOCKS, self.decoder.gpu[i].blocks + block * nbytes, host, nbytes)
            host += nbytes
        if error == 0 and out:
            error = self.device.record(self.copied, MER_STREAM_BLOCKS)
        if error == 0 and out:
            error = self.device.follow(MER_STREAM_COMPUTE, self.copied)
        if error:
            self.wait()                                # for what was ordered of it
        return error

    cdef int wait(self) noexcept nogil:
        """Until nothing is under way: a wait that finds no memory tells nothing of that."""
        cdef int error = MER_DEVICE_OUT_OF_MEMORY
        while error == MER_DEVICE_OUT_OF_MEMORY:
            error = self.device.enter()
            if error == 0:
                error = self.device.finish(MER_STREAM_BLOCKS)
        return error
