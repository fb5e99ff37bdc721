"""Part of uring.pyx: memory that reads go into."""

cdef extern from "Python.h":
    int _fill_info "PyBuffer_FillInfo"(Py_buffer *view, object o, void *buf, Py_ssize_t n, int readonly, int flags)


cdef extern from "<sys/mman.h>" nogil:
    int madvise(void *address, size_t length, int advice)
    int MADV_HUGEPAGE


cdef class _Memory:
    """Page-aligned memory with the buffer protocol, on huge pages where there are any: a read is fewer requests then."""
    cdef char *address
    cdef size_t size

    def __cinit__(self, size_t size):
        cdef void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        if p == MAP_FAILED:
            raise MemoryError(f"{size} bytes for reading")
        madvise(p, size, MADV_HUGEPAGE)
        self.address = <char *>p
        self.size = size

    def __dealloc__(self):
        if self.address != NULL:
            munmap(self.address, self.size)

    def __getbuffer__(self, Py_buffer *view, int flags):
        cdef int rc = _fill_info(view, self, self.address, <Py_ssize_t>self.size, 0, flags)
        if rc < 0:
            raise BufferError("can't export the memory")
