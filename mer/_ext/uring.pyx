"""Reads of file extents: io_uring with O_DIRECT, or `preadv` threads, or buffered reads.

The work is done in csrc/uring; here are its Python face and the awaitable reads.
"""

import asyncio
import errno
import os

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint32_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap

from mer._ext.files import close_all, open_all, size_of, uring_advice
from mer.errors import CheckpointError, ConfigError, DeviceReadError


cdef extern from "mer_io.h" nogil:
    ctypedef struct mer_range:
        int file
        int64_t offset
        int64_t length
        char *dest

    ctypedef struct mer_io_stats:
        int64_t ops
        int64_t prefetch_ops
        int64_t bytes
        int64_t short_reads
        int64_t retries
        int64_t errors
        int64_t fixed_ops
        int64_t batches
        int64_t registered_bytes
        int64_t cached_ops

    enum:
        MER_IO_LATENCIES

    ctypedef struct mer_io_latency:
        int64_t counts[16]
        int64_t total_ns

    const int64_t mer_io_latency_bounds[16]

    int mer_io_open(mer_io **out, const int *fds, int n, int uring, int direct, int depth, int threads)
    void mer_io_close(mer_io *io)
    void mer_io_free(mer_io *io)
    int mer_io_files_registered(const mer_io *io)
    int mer_io_add_buffer(mer_io *io, void *address, size_t length)
    void mer_io_drop_buffers(mer_io *io)
    void mer_io_submit(mer_io *io, ReadOp *ops, long n)
    void mer_io_set_depth(mer_io *io, int depth)
    int mer_io_cached(const mer_io *io, int file, int64_t offset, int64_t length)
    long mer_io_wait(mer_io *io, long min_done)
    void mer_io_poll(mer_io *io)
    uint64_t mer_io_completed(const mer_io *io)
    void mer_io_wait_past(mer_io *io, uint64_t seen)
    int mer_io_read_ranges(mer_io *io, const mer_range *ranges, long n, int priority, long *failed)
    int mer_io_eventfd(const mer_io *io)
    void mer_io_listen(mer_io *io, int on)
    int mer_io_set_fault(mer_io *io, int file, int64_t lo, int64_t hi, int error, int64_t limit, int64_t late_ns, long times)
    void mer_io_clear_faults(mer_io *io)
    void mer_io_get_stats(mer_io *io, mer_io_stats *out)
    void mer_io_get_latency(mer_io *io, mer_io_latency *out)
    int mer_io_measure(mer_io *io, int file, int64_t file_bytes, int64_t block, long depth, double seconds, double ramp,
                       char *memory, size_t room, int64_t *bytes, double *elapsed)
    int mer_dio_alignment(const char *path, uint32_t *memory, uint32_t *offset)


BACKENDS = ("auto", "uring", "preadv", "buffered")
MEASURED_MEMORY = 64 << 20    # that measure() reads into, beyond every cache
HUGE_PAGE = 2 << 20


def dio_alignment(path):
    """(of addresses, of offsets) that O_DIRECT needs for the file at `path`, bytes; (0, 0) where it is refused.

    None where the kernel (before 6.1) or the file system does not say. Raises OSError.
    """
    cdef uint32_t memory = 0, offset = 0
    cdef int rc = mer_dio_alignment(os.fsencode(path), &memory, &offset)
    if rc == -errno.EOPNOTSUPP:
        return None
    if rc < 0:
        raise OSError(-rc, os.strerror(-rc), path)
    return memory, offset


include "memory.pxi"


cdef class _AsyncRead:
    """One awaited read: the aligned superset of an extent, in memory of its own."""
    cdef ReadOp op
    cdef _Memory memory
    cdef int64_t offset, length

    cdef bytes value(self):
        cdef char *start = self.memory.address + (self.offset - self.op.offset)
        return PyBytes_FromStringAndSize(start, self.length)


@cython.no_gc_clear  # the kernel may write to the memory of _awaited until __dealloc__ has closed the ring
cdef class Reader:
    """Reads extents of `paths`, from any number of threads at once.

    backend: 'auto' takes io_uring with O_DIRECT; where io_uring is not allowed `preadv` threads with O_DIRECT;
    where the file system refuses O_DIRECT ordinary buffered reads. `why` says which reason applied.
    queue_depth: reads the device sees at once, 1..4096 (set_queue_depth() changes it); the others wait inside, demand
    before prefetch.
    threads: of the back ends that are not io_uring, 1..256. With O_DIRECT, too, what the page cache holds already
    (Linux 6.5 says so) is copied from there; nothing is added to it.

    Raises CheckpointError for a file that can't be opened, ConfigError for a back end that is asked for by name
    and not to be had, or a number out of its range.
    """

    def __init__(self, paths, *, str backend="auto", int queue_depth=64, int threads=4):
        if self._io != NULL or self.closed:
            raise RuntimeError("a Reader is opened once")
        if backend not in BACKENDS:
            raise ConfigError(f"I/O back end {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
        if not 1 <= queue_depth <= 4096:
            raise ConfigError(f"queue depth {queue_depth} is out of range: 1 to 4096")
        if not 1 <= threads <= 256:
            raise ConfigError(f"{threads} I/O threads is out of range: 1 to 256")
        self.paths = [os.fspath(p) for p in paths]
        self.queue_depth = self._most = queue_depth
        self.buffers_note = ""
        self._awaited = {}
        if backend == "buffered":
            self._start("buffered", "asked for", queue_depth, threads)
            return
        try:
            close_all(open_all(self.paths, True))
        except OSError as e:
            reason = f"the file system refuses O_DIRECT ({os.strerror(e.errno)})"
            if backend != "auto":
                raise ConfigError(f"I/O back end {backend} needs O_DIRECT: {reason}; use auto or buffered") from None
            self._start("buffered", reason, queue_depth, threads)
            return
        if backend == "preadv":
            self._start("preadv", "asked for", queue_depth, threads)
            return
        try:
            self._start("uring", "asked for" if backend == "uring" else "io_uring and O_DIRECT both work",
                        queue_depth, threads)
        except OSError as e:
            reason = f"io_uring is not to be had ({os.strerror(e.errno)}: {uring_advice(e.errno)})"
            if backend == "uring":
                raise ConfigError(f"I/O back end uring: {reason}; use auto or preadv") from None
            self._start("preadv", reason, queue_depth, threads)

    def _start(self, str backend, str why, int queue_depth, int threads):
        cdef bint direct = backend != "buffered"
        fds = open_all(self.paths, direct)
        cdef int n = len(fds), i, rc
        if direct:
            try:
                fds += open_all(self.paths, False)
            except BaseException:
                close_all(fds)
                raise
        cdef int *numbers = <int *>calloc(len(fds) + 1, sizeof(int))
        if numbers == NULL:
            close_all(fds)
            raise MemoryError()
        for i in range(<int>len(fds)):
            numbers[i] = fds[i]
        cdef bint uring = backend == "uring"
        with nogil:
            rc = mer_io_open(&self._io, numbers, n, uring, direct, queue_depth, threads)
        free(numbers)
        if rc < 0:
            close_all(fds)
            raise OSError(-rc, os.strerror(-rc))
        self.backend = backend
        self.why = why
        self.alignment = MER_IO_ALIGN if direct else 1
        self.files_registered = mer_io_files_registered(self._io)

    def __dealloc__(self):
        if self._io != NULL:
            with nogil:
                mer_io_close(self._io)
            mer_io_free(self._io)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def close(self):
        """Cancels what is queued and waits for what is in flight: no memory is written to afterwards.

        Whoever still waits gets an error. Closing twice is allowed.
        """
        if self._io == NULL or self.closed:
            return
        self.closed = True
        with nogil:
            mer_io_close(self._io)
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._settle)

    def set_queue_depth(self, int depth):
        """From now on the device sees at most `depth` reads at once: 1 to what the reader was opened with.

        Raises ConfigError for another number.
        """
        self._check_open()
        if not 1 <= depth <= self._most:
            raise ConfigError(f"queue depth {depth} is out of range: 1 to {self._most}")
        self.queue_depth = depth
        with nogil:
            mer_io_set_depth(self._io, depth)

    def cached(self, int file, int64_t offset, int64_t length):
        """Whether the page cache holds all of an extent; False where the kernel (before 6.5) does not say."""
        self._check_open()
        self._check_range(file, offset, length)
        return mer_io_cached(self._io, file, offset, length) != 0

    cdef void submit(self, ReadOp *ops, long n) noexcept nogil:
        mer_io_submit(self._io, ops, n)

    cdef long wait(self, long min_done) noexcept nogil:
        return mer_io_wait(self._io, min_done)

    cdef uint64_t completed(self) noexcept nogil:
        return mer_io_completed(self._io)

    cdef void wait_past(self, uint64_t seen) noexcept nogil:
        mer_io_wait_past(self._io, seen)

    def add_buffer(self, uintptr_t address, size_t length):
        """Registers `length` bytes at `address` as fixed buffers: reads into them skip the pinning of pages.

        All of it is touched and pinned at once; it must stay mapped until close(). Returns False where that is not possible (another back end, memlock
        limit); `buffers_note` then says why, and reads work without.
        """
        cdef int rc
        self._check_open()
        with nogil:
            rc = mer_io_add_buffer(self._io, <void *>address, length)
        if rc == -errno.EOPNOTSUPP:
            self.buffers_note = f"the back end {self.backend} has no fixed buffers here"
        elif rc == -errno.ENOMEM:
            self.buffers_note = f"{length} bytes are over the memlock limit (ulimit -l) or over the free memory"
        elif rc < 0:
            self.buffers_note = f"{length} bytes could not be registered: {os.strerror(-rc)}"
        return rc == 0

    def drop_buffers(self):
        """What was registered is ordinary memory again, and may be given back."""
        self._check_open()
        with nogil:
            mer_io_drop_buffers(self._io)

    def read(self, int file, int64_t offset, int64_t length):
        """`length` bytes of file number `file` from `offset` (any alignment) as bytes.

        Raises CheckpointError where the file ends before, DeviceReadError when the read fails.
        """
        self._check_open()
        self._check_range(file, offset, length)
        cdef bytes value = PyBytes_FromStringAndSize(NULL, length)
        cdef mer_range r
        cdef long failed = 0
        cdef int rc
        r.file, r.offset, r.length, r.dest = file, offset, length, PyBytes_AS_STRING(value)
        with nogil:
            rc = mer_io_read_ranges(self._io, &r, 1, MER_IO_DEMAND, &failed)
        if rc < 0:
            raise self.error(file, offset, length, rc)
        return value

    def read_into(self, extents):
        """Reads each (file, offset, length, dest, dest_offset) into dest[dest_offset : dest_offset + length] bytes.

        dest: a writable C-contiguous buffer (ndarray of any dtype). Ranges of any alignment; they go straight
        into place where file offset and memory address agree modulo `alignment` (see `reader.aligned_empty`), else
        through bounce buffers of 16 MiB at most. Errors as for read(); dest is then partly written.
        """
        self._check_open()
        extents = list(extents)
        cdef long n = len(extents), i, held = 0, failed = 0
        cdef int rc
        cdef mer_range *ranges = <mer_range *>calloc(n + 1, sizeof(mer_range))
        cdef Py_buffer *views = <Py_buffer *>calloc(n + 1, sizeof(Py_buffer))
        cdef int64_t at
        try:
            if ranges == NULL or views == NULL:
                raise MemoryError()
            for i in range(n):
                file, offset, length, dest, dest_offset = extents[i]
                self._check_range(file, offset, length)
                PyObject_GetBuffer(dest, &views[i], PyBUF_WRITABLE | PyBUF_SIMPLE)
                held += 1
                at = dest_offset
                if at < 0 or at + length > views[i].len:
                    raise ValueError(f"extent {i}: {length} bytes at {at} do not fit in {views[i].len}")
                ranges[i].file, ranges[i].offset, ranges[i].length = file, offset, length
                ranges[i].dest = <char *>views[i].buf + at
            with nogil:
                rc = mer_io_read_ranges(self._io, ranges, n, MER_IO_DEMAND, &failed)
            if rc < 0:
                raise self.error(ranges[failed].file, ranges[failed].offset, ranges[failed].length, rc)
        finally:
            for i in range(held):
                PyBuffer_Release(&views[i])
            free(views)
            free(ranges)

    async def aread(self, int file, int64_t offset, int64_t length, *, bint prefetch=False):
        """Like read(), awaited: the event loop runs on meanwhile. One event loop at a time."""
        return await self._start_async(file, offset, length, prefetch)

    def _start_async(self, int file, int64_t offset, int64_t length, bint prefetch):
        self._check_open()
        self._check_range(file, offset, length)
        loop = asyncio.get_running_loop()
        if self._loop is not None and self._loop is not loop and self._loop.is_closed():
            self._settle()
        if self._loop is not None and self._loop is not loop:
            raise RuntimeError("another event loop is reading from this Reader")
        cdef _AsyncRead r = _AsyncRead()
        cdef int64_t start = offset // self.alignment * self.alignment
        memset(&r.op, 0, sizeof(ReadOp))
        r.offset, r.length = offset, length
        r.op.file, r.op.offset = file, start
        r.op.needed = offset + length - start
        r.op.length = (r.op.needed + self.alignment - 1) // self.alignment * self.alignment
        r.op.priority = MER_IO_PREFETCH if prefetch else MER_IO_DEMAND
        future = loop.create_future()
        if length == 0:
            future.set_result(b"")
            return future
        r.memory = _Memory(r.op.length)
        r.op.dest = r.memory.address
        if self._loop is None:
            self._loop = loop
            loop.add_reader(mer_io_eventfd(self._io), self._on_event)
            mer_io_listen(self._io, 1)
        self._awaited[r] = future
        with nogil:
            mer_io_submit(self._io, &r.op, 1)
        return future

    def _on_event(self):
        if self.closed:
            return
        # Empty the eventfd first: a completion after that makes it readable again.
        try:
            os.eventfd_read(mer_io_eventfd(self._io))
        except BlockingIOError:
            pass
        with nogil:
            mer_io_poll(self._io)
        self._settle()

    def _settle(self):
        """Gives the reads that are over to those who await them, who may have gone (cancelled) meanwhile."""
        cdef _AsyncRead r
        if self._loop is None:
            return
        alive = not self._loop.is_closed()
        for key in [k for k in self._awaited if mer_read_done(&(<_AsyncRead>k).op)]:
            r = key
            future = self._awaited.pop(r)
            if not alive or future.done():
                continue
            if r.op.result < 0:
                future.set_exception(self.error(r.op.file, r.offset, r.length, r.op.result))
            else:
                future.set_result(r.value())
        if not alive or not self._awaited:
            if alive:
                self._loop.remove_reader(mer_io_eventfd(self._io))
            mer_io_listen(self._io, 0)
            self._loop = None

    cpdef object error(self, int file, int64_t offset, int64_t length, int result):
        """The exception that says what a failed read means; `result` is a ReadOp's, negative."""
        name = self.paths[file] if 0 <= file < len(self.paths) else f"file number {file}"
        where = f"{name}: {length} bytes at offset {offset}"
        if result == MER_IO_TRUNCATED:
            size = size_of(name)
            return CheckpointError(
                f"{where}: the file ends before (it has {size} bytes); it is truncated or still being written: "
                "fetch or convert it again"
            )
        if result == -errno.ECANCELED:
            return DeviceReadError(f"{where}: the reader was closed before the read was over")
        return DeviceReadError(
            f"{where}: {os.strerror(-result)} ({errno.errorcode.get(-result, -result)}); "
            "check the device and the kernel log (dmesg)"
        )

    def set_fault(self, int file, int64_t lo, int64_t hi, *, int error=5, limit=None, long times=1, double late=0):
        """Fault injection: the next `times` requests of `file` that touch bytes [lo, hi) fail with errno `error`.

        With `limit`, they seem to deliver at most that many bytes instead (0: like the end of the file). An error
        comes `late` seconds after it was asked for; EINTR is tried again, which makes a slow read of it.
        """
        self._check_open()
        cdef int64_t most = 0 if limit is None else limit
        if mer_io_set_fault(self._io, file, lo, hi, error if limit is None else 0, most,
                            <int64_t>(late * 1e9), times) < 0:
            raise ValueError("too many faults are set")

    def clear_faults(self):
        """Forgets all that set_fault() asked for."""
        self._check_open()
        mer_io_clear_faults(self._io)

    def stats(self):
        """Counters since the start, as a dict of int: ops, prefetch_ops, bytes, short_reads, retries, errors,
        fixed_ops (into registered memory), batches (submit calls), registered_bytes, cached_ops (from the page cache)."""
        cdef mer_io_stats s
        if self._io == NULL:
            raise RuntimeError("the Reader was not opened")
        mer_io_get_stats(self._io, &s)
        return s

    def latency(self):
        """How long reads took, from the device being asked until it was noticed that they were over.

        (bounds in seconds, counts, sum in seconds): counts[i] reads took at most bounds[i] and more than the
        bound before; the last count, which has no bound, those that took longer than all bounds.
        """
        cdef mer_io_latency found
        cdef int i
        if self._io == NULL:
            raise RuntimeError("the Reader was not opened")
        mer_io_get_latency(self._io, &found)
        bounds = tuple(mer_io_latency_bounds[i] / 1e9 for i in range(MER_IO_LATENCIES - 1))
        return bounds, tuple(found.counts[i] for i in range(MER_IO_LATENCIES)), found.total_ns / 1e9

    def measure(self, int file, int64_t block, long depth, double seconds, into=None, double ramp=0):
        """(bytes, seconds) of random aligned reads of `block` bytes (a multiple of 4096), `depth` at once.

        into: a writable buffer of at least a block that starts on a page, which all reads share; None: memory of its
        own, of up to 64 MiB. ramp: seconds before those, in which the reads begin and nothing is counted.
        """
        self._check_open()
        cdef int64_t size = os.stat(self.paths[file]).st_size, done = 0
        cdef double elapsed = 0
        cdef int rc
        cdef _Memory own
        if block < MER_IO_ALIGN or block % MER_IO_ALIGN or size < block:
            raise ConfigError(f"block {block}: must be a multiple of {MER_IO_ALIGN} and fit in the file ({size} bytes)")
        if into is None:
            # whole huge pages, which Linux gives mappings of such a size alone: what lies beside one is many requests
            into = own = _Memory(-(-max(block, min(block * depth, MEASURED_MEMORY)) // HUGE_PAGE) * HUGE_PAGE)
            memset(own.address, 0, own.size)           # its pages are there before the clock runs
        cdef uint8_t[::1] memory = into
        cdef size_t room = memory.shape[0]
        if room < <size_t>block or <uintptr_t>&memory[0] % MER_IO_ALIGN:
            raise ValueError(f"{room} bytes to read into: must be a block of {block} at least, and start on a page")
        with nogil:
            rc = mer_io_measure(self._io, file, size, block, depth, seconds, ramp, <char *>&memory[0], room, &done,
                                &elapsed)
        if rc < 0:
            raise self.error(file, 0, size, rc)
        return done, elapsed

    def _check_open(self):
        if self._io == NULL or self.closed:
            raise ValueError("the Reader is closed")

    def _check_range(self, int file, int64_t offset, int64_t length):
        if not 0 <= file < len(self.paths):
            raise ValueError(f"file number {file}: there are {len(self.paths)}")
        if offset < 0 or length < 0:
            raise ValueError(f"{self.paths[file]}: extent at {offset} of {length} bytes")
