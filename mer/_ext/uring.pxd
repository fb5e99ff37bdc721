# Reads of file extents that never hold the GIL: io_uring, or threads where it is not to be had.
# The contract of each field and function is in csrc/mer_io.h.
from libc.stdint cimport int64_t, uint64_t


cdef extern from "mer_io.h" nogil:
    enum:
        MER_IO_ALIGN
        MER_IO_DEMAND
        MER_IO_PREFETCH
        MER_IO_TRUNCATED

    # Zero it (calloc, memset) before filling it in. Leave it where it is until done.
    ctypedef struct ReadOp "mer_read_op":
        int file          # index into Reader.paths
        int priority      # MER_IO_DEMAND overtakes MER_IO_PREFETCH
        int64_t offset    # offset, length and dest: multiples of Reader.alignment
        int64_t length
        int64_t needed    # bytes that must arrive; 0: all. Less for a superset that passes the end of the file
        void *dest
        int result        # 0, or -errno; MER_IO_TRUNCATED when the file ended too early

    int mer_read_done(const ReadOp *op)  # inline: any module may call it

    ctypedef struct mer_io:
        pass


cdef class Reader:
    cdef mer_io *_io
    cdef readonly list paths          # of str; ReadOp.file counts them
    cdef readonly str backend         # 'uring', 'preadv' or 'buffered'
    cdef readonly str why             # in words, why this back end
    cdef readonly long alignment      # 4096 with O_DIRECT, else 1
    cdef readonly long queue_depth    # reads the device sees at once
    cdef long _most                   # what that may become
    cdef readonly bint files_registered
    cdef readonly str buffers_note    # '' or why memory could not be registered
    cdef readonly bint closed
    cdef object _loop                 # the event loop that listens to the eventfd, while reads are awaited
    cdef dict _awaited                # _AsyncRead -> Future: it keeps the memory of reads in flight alive

    # Queues ops[0:n] and returns: one submission to the kernel. Beyond queue_depth they wait inside.
    cdef void submit(self, ReadOp *ops, long n) noexcept nogil
    # Blocks until min_done reads (of anyone) completed since it last returned, or none is left; 0 polls.
    # Returns how many did. For the one thread that drives the reader.
    cdef long wait(self, long min_done) noexcept nogil
    # With several threads: seen = completed(); look at your ops; wait_past(seen).
    cdef uint64_t completed(self) noexcept nogil
    cdef void wait_past(self, uint64_t seen) noexcept nogil
    # The exception for a result < 0: CheckpointError or DeviceReadError.
    cpdef object error(self, int file, int64_t offset, int64_t length, int result)
