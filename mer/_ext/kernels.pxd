"""The compute pool and the kernels, for other Cython modules. No function here holds the GIL or raises."""

cdef extern from "mer_pool.h" nogil:
    ctypedef struct mer_pool
    ctypedef void (*mer_task_fn)(void *arg, long task, int thread) noexcept nogil

cdef extern from "mer_kernels.h" nogil:
    ctypedef void (*mer_matmul_fn)(const void *w, long cols, long r0, long r1, const void *const *acts,
                                   long n_tok, float *y, long y_stride) noexcept nogil
    ctypedef struct mer_isa:
        const char *name
        void (*swiglu)(const float *gate, const float *up, float *h, long n) noexcept nogil
        void (*geglu)(const float *gate, const float *up, float *h, long n) noexcept nogil
        void (*clamped_swiglu)(const float *gate, const float *up, float *h, long n, float alpha,
                               float limit, float added) noexcept nogil
        mer_matmul_fn *matmul

cdef enum Fmt:
    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q8_0 = 8
    Q4_K = 12
    BF16 = 30
    MXFP4 = 39

cdef class Pool:
    cdef mer_pool *_pool
    cdef readonly int n_threads

    # fn(arg, task, thread) for each task in [0, n_tasks), handed out in ascending order, neighbours to one thread
    # while many are left; thread is in [0, n_threads), the caller being 0. Returns when all are done. Not from
    # within a task.
    cdef void run(self, mer_task_fn fn, void *arg, long n_tasks) noexcept nogil

cdef class Kernels:
    cdef const mer_isa *_isa

    # Bytes of one prepared activation row, a multiple of 64.
    cdef size_t act_bytes(self, int fmt, long cols) noexcept nogil
    # One row of activations into the form that products with `fmt` weights want.
    cdef void prepare(self, int fmt, const float *x, void *act, long cols) noexcept nogil
    # y[t * y_stride + r] = dot(W[r], acts[t]) for r in [r0, r1), t in [0, n_tok); w points to row 0,
    # at any alignment. The same bytes whatever the split into rows and tokens.
    cdef void matmul(self, int fmt, const void *w, long cols, long r0, long r1, const void *const *acts,
                     long n_tok, float *y, long y_stride) noexcept nogil
    # h[i] = silu(gate[i]) * up[i]; h may be gate or up.
    cdef void swiglu(self, const float *gate, const float *up, float *h, long n) noexcept nogil
    # h[i] = gelu(gate[i]) * up[i], gelu by tanh; h may be gate or up.
    cdef void geglu(self, const float *gate, const float *up, float *h, long n) noexcept nogil
    # h[i] = g * sigmoid(alpha * g) * (u + added): g is gate[i], at the most `limit`, u is up[i] within +-limit.
    cdef void clamped_swiglu(self, const float *gate, const float *up, float *h, long n, float alpha,
                             float limit, float added) noexcept nogil
    # y[t * rows + r] = dot(W[r], x[t]) on the pool, for x [n_tok, cols].
    # scratch: linear_scratch_bytes(fmt, cols, n_tok) bytes, any alignment.
    cdef void linear(self, Pool pool, int fmt, const void *w, long rows, long cols, const float *x,
                     long n_tok, float *y, void *scratch) noexcept nogil
    cdef size_t linear_scratch_bytes(self, int fmt, long cols, long n_tok) noexcept nogil
