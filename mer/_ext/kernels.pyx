"""The compute pool and the kernels of every instruction set, chosen at run time.

Other Cython modules `cimport` the classes (see kernels.pxd) and call them without the GIL. The methods
whose names end in `_py` do the same on numpy arrays, with every argument checked.
"""

import os

import numpy as np

from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc

from mer._ext.cpus import numa_nodes, share_cpus, usable_cpus
from mer.errors import ConfigError

cdef extern from "mer_pool.h" nogil:
    mer_pool *mer_pool_new(int n_threads, int spin_us)
    void mer_pool_run(mer_pool *pool, mer_task_fn fn, void *arg, long n_tasks)
    void mer_pool_free(mer_pool *pool)
    int mer_pool_pin(mer_pool *pool, int thread, const int *cpus, int n_cpus)
    int mer_interleave(void *p, size_t n, uint64_t nodes)

cdef extern from "mer_kernels.h" nogil:
    int mer_isas(const mer_isa **out, int room)
    long mer_block_len(int fmt)
    size_t mer_row_bytes(int fmt, long cols)
    size_t mer_act_bytes(int fmt, long cols)
    void mer_prepare(const mer_isa *isa, int fmt, const float *x, void *act, long cols)
    size_t mer_linear_scratch_bytes(int fmt, long cols, long n_tok)
    void mer_linear(const mer_isa *isa, mer_pool *pool, int fmt, const void *w, long rows, long cols,
                    const float *x, long n_tok, float *y, void *scratch)
    double mer_memory_bandwidth(mer_pool *pool, long n_pieces, int sweeps)

# Long enough to bridge the gap between two jobs of a layer, short enough not to steal from the I/O.
SPIN_US = 30


def isas() -> list[str]:
    """Names of the instruction sets that this CPU can run, the best first."""
    cdef const mer_isa *found[8]
    cdef int i, n = mer_isas(found, 8)
    return [found[i].name.decode() for i in range(n)]


cdef class Pool:
    """A persistent pool of compute threads; the thread that calls `run` is one of them.

    n_threads: the caller included; None means the CPUs that affinity and cgroup quota leave.
    spin_us: microseconds that a thread without work spins before it sleeps.
    Raises ValueError for a count below 1, OSError when the threads can't be started.
    """

    def __cinit__(self, n_threads: int | None = None, *, int spin_us=SPIN_US):
        cdef int n = usable_cpus() if n_threads is None else n_threads
        if n < 1 or spin_us < 0:
            raise ValueError(f"a pool needs n_threads >= 1 and spin_us >= 0, not {n} and {spin_us}")
        self._pool = mer_pool_new(n, spin_us)
        if self._pool is NULL:
            raise OSError(errno, f"can't start {n - 1} compute threads: {os.strerror(errno)}")
        self.n_threads = n
        self.pin(share_cpus(numa_nodes(), n))

    def pin(self, cpus):
        """Keep thread i on the CPUs `cpus[i]`; the first thread is the caller's own and stays where it is.

        An empty list changes nothing; a CPU that the system refuses leaves its thread free.
        """
        cdef int[::1] each
        cdef int i
        for i in range(1, min(self.n_threads, <int>len(cpus))):
            each = np.array(cpus[i], np.intc)
            mer_pool_pin(self._pool, i, &each[0], <int>each.shape[0])

    def __dealloc__(self):
        mer_pool_free(self._pool)

    cdef void run(self, mer_task_fn fn, void *arg, long n_tasks) noexcept nogil:
        mer_pool_run(self._pool, fn, arg, n_tasks)

    def memory_bandwidth(self, long mebibytes=256, int sweeps=5) -> float:
        """Bytes per second at which the pool's threads together read memory: the best of `sweeps`.

        mebibytes: memory to take for it, much more than the last level of cache.
        Raises OSError when it can't be had.
        """
        cdef double best
        if mebibytes < 1 or sweeps < 1:
            raise ValueError(f"mebibytes and sweeps must be positive, not {mebibytes} and {sweeps}")
        with nogil:
            best = mer_memory_bandwidth(self._pool, mebibytes, sweeps)
        if best < 0:
            raise OSError(<int>-best, f"can't take {mebibytes} MiB to measure memory bandwidth")
        return best


def interleave(uintptr_t address, size_t nbytes, nodes) -> bool:
    """Spread the whole pages in `nbytes` bytes at `address` over memory nodes, numbers below 64.

    Returns whether the system did it: some containers don't allow it, and then memory stays where it is.
    """
    cdef uint64_t mask = 0
    for node in nodes:
        mask |= <uint64_t>1 << <int>node
    return mer_interleave(<void *>address, nbytes, mask) == 0


cdef class Kernels:
    """The kernels of one instruction set.

    isa: a name of `isas()`; None takes the environment variable MER_ISA, and without it the best there is.
    Raises ConfigError for a name that is unknown or that this CPU can't run.
    """

    def __cinit__(self, isa: str | None = None):
        cdef const mer_isa *found[8]
        cdef int i, n = mer_isas(found, 8)
        source = "isa"
        if isa is None and os.environ.get("MER_ISA"):
            isa, source = os.environ["MER_ISA"], "MER_ISA"
        for i in range(n):
            if isa is None or found[i].name.decode() == isa:
                self._isa = found[i]
                return
        raise ConfigError(f"{source}={isa!r}: this CPU can run {', '.join(isas())}; name one of them or none")

    @property
    def isa(self) -> str:
        """Name of the instruction set."""
        return self._isa.name.decode()

    cdef size_t act_bytes(self, int fmt, long cols) noexcept nogil:
        return mer_act_bytes(fmt, cols)

    cdef void prepare(self, int fmt, const float *x, void *act, long cols) noexcept nogil:
        mer_prepare(self._isa, fmt, x, act, cols)

    cdef void matmul(self, int fmt, const void *w, long cols, long r0, long r1, const void *const *acts,
                     long n_tok, float *y, long y_stride) noexcept nogil:
        self._isa.matmul[fmt](w, cols, r0, r1, acts, n_tok, y, y_stride)

    cdef void swiglu(self, const float *gate, const float *up, float *h, long n) noexcept nogil:
        self._isa.swiglu(gate, up, h, n)

    cdef void geglu(self, const float *gate, const float *up, float *h, long n) noexcept nogil:
        self._isa.geglu(gate, up, h, n)

    cdef void clamped_swiglu(self, const float *gate, const float *up, float *h, long n, float alpha,
                             float limit, float added) noexcept nogil:
        self._isa.clamped_swiglu(gate, up, h, n, alpha, limit, added)

    cdef void linear(self, Pool pool, int fmt, const void *w, long rows, long cols, const float *x,
                     long n_tok, float *y, void *scratch) noexcept nogil:
        mer_linear(self._isa, pool._pool, fmt, w, rows, cols, x, n_tok, y, scratch)

    cdef size_t linear_scratch_bytes(self, int fmt, long cols, long n_tok) noexcept nogil:
        return mer_linear_scratch_bytes(fmt, cols, n_tok)

    def prepare_py(self, int fmt, x):
        """Prepared activations of x, f32 [n, cols]: uint8 [n, act_bytes].

        Raises ValueError for an unknown format or a cols that is no multiple of its block.
        """
        cdef const float[:, ::1] xs = np.ascontiguousarray(x, np.float32)
        _check(fmt, xs.shape[1])
        acts = np.zeros((xs.shape[0], mer_act_bytes(fmt, xs.shape[1])), np.uint8)
        cdef uint8_t[:, ::1] out = acts
        cdef long t
        if acts.size:
            for t in range(xs.shape[0]):
                self.prepare(fmt, &xs[t, 0], &out[t, 0], xs.shape[1])
        return acts

    def matmul_py(self, int fmt, w, x, long r0=0, r1=None):
        """f32 [n, r1 - r0]: x, f32 [n, cols], times rows [r0, r1) of w, uint8 [rows, row_bytes], on this thread.

        Raises ValueError for an unknown format, or shapes or a row range that do not agree.
        """
        cdef const float[:, ::1] xs = np.ascontiguousarray(x, np.float32)
        cdef const uint8_t[:, ::1] ws = _weights(fmt, w, xs.shape[1])
        cdef long end = ws.shape[0] if r1 is None else r1
        if not 0 <= r0 <= end <= ws.shape[0]:
            raise ValueError(f"rows [{r0}, {end}) of a matrix of {ws.shape[0]} rows")
        y = np.zeros((xs.shape[0], end - r0), np.float32)
        if y.size == 0:
            return y
        cdef float[:, ::1] out = y
        cdef uint8_t[:, ::1] acts = self.prepare_py(fmt, x)
        cdef long t, n = xs.shape[0]
        cdef const void **ptrs = <const void **>malloc(n * sizeof(void *))
        if ptrs is NULL:
            raise MemoryError
        for t in range(n):
            ptrs[t] = &acts[t, 0]
        with nogil:
            # y holds the asked rows only, so its origin lies r0 before the buffer
            self.matmul(fmt, &ws[0, 0], xs.shape[1], r0, end, ptrs, n, &out[0, 0] - r0, end - r0)
        free(ptrs)
        return y

    def linear_py(self, Pool pool not None, int fmt, w, x):
        """f32 [n, rows]: x, f32 [n, cols], times w, uint8 [rows, row_bytes], on the pool.

        Raises ValueError for an unknown format or shapes that do not agree.
        """
        cdef const float[:, ::1] xs = np.ascontiguousarray(x, np.float32)
        cdef const uint8_t[:, ::1] ws = _weights(fmt, w, xs.shape[1])
        y = np.zeros((xs.shape[0], ws.shape[0]), np.float32)
        if y.size == 0:
            return y
        cdef float[:, ::1] out = y
        cdef uint8_t[::1] scratch = np.empty(self.linear_scratch_bytes(fmt, xs.shape[1], xs.shape[0]), np.uint8)
        with nogil:
            self.linear(pool, fmt, &ws[0, 0], ws.shape[0], xs.shape[1], &xs[0, 0], xs.shape[0], &out[0, 0],
                        &scratch[0])
        return y

    def swiglu_py(self, gate, up, clamp=None, gelu=False):
        """silu(gate) * up of two f32 [n], or gelu(gate) * up. Raises ValueError where the lengths differ.

        clamp (alpha, limit, added): g * sigmoid(alpha * g) * (u + added), g being gate, at the most limit, and u
        up within -limit to limit.
        """
        cdef const float[::1] g = np.ascontiguousarray(gate, np.float32)
        cdef const float[::1] u = np.ascontiguousarray(up, np.float32)
        if g.shape[0] != u.shape[0]:
            raise ValueError(f"gate has {g.shape[0]} elements, up {u.shape[0]}")
        h = np.empty(g.shape[0], np.float32)
        cdef float[::1] out = h
        if h.size and gelu:
            self.geglu(&g[0], &u[0], &out[0], h.size)
        elif h.size and clamp is None:
            self.swiglu(&g[0], &u[0], &out[0], h.size)
        elif h.size:
            self.clamped_swiglu(&g[0], &u[0], &out[0], h.size, clamp[0], clamp[1], clamp[2])
        return h


cdef _check(int fmt, long cols):
    if mer_block_len(fmt) == 0:
        raise ValueError(f"weight format {fmt} has no kernel")
    if cols < 1 or cols % mer_block_len(fmt):
        raise ValueError(f"{cols} columns are no positive multiple of the block of {mer_block_len(fmt)}")


cdef _weights(int fmt, w, long cols):
    """w as a contiguous uint8 [rows, row_bytes], checked."""
    _check(fmt, cols)
    if w.dtype != np.uint8 or w.ndim != 2 or w.shape[1] != mer_row_bytes(fmt, cols):
        raise ValueError(
            f"weights of {cols} columns must be uint8 [rows, {mer_row_bytes(fmt, cols)}], not {w.dtype} {w.shape}"
        )
    return np.ascontiguousarray(w)
