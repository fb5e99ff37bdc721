/* What the kernels share: types, loads, conversions. Self-contained: NVRTC has no standard headers.
 *
 * The sources are compiled with -fmad=false: a product is fused with a sum only where the code says so. With
 * MER_SIMULATED they are C++ for the simulated device of the tests, whose header stands for CUDA's own functions. */
#ifndef MER_GPU_CUH
#define MER_GPU_CUH

/* Threads of a block, and rows of a matrix that a block of mer_rows_* takes. */
#define MER_GPU_THREADS 128
#define MER_GPU_ROWS 8

/* Rows and tokens that a block of mer_many_* takes. */
#define MER_GPU_MANY_ROWS 64
#define MER_GPU_MANY_TOKENS 32

#ifdef MER_SIMULATED
#include "cuda_shim.h"
#else
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
#define MER_KERNEL(NAME, ...) extern "C" __global__ void __launch_bounds__(MER_GPU_THREADS) NAME(__VA_ARGS__)
#endif

#define INLINE static __device__ __forceinline__

/* One product of a launch: a matrix with some tokens. The host has the same structure. */
typedef struct {
    uint64_t weights;     /* row 0 of the matrix, any alignment */
    uint64_t bias;        /* f32 [rows], added to each product; 0: none */
    uint64_t y;           /* f32: where the result of the first token goes; the next one's y_stride floats behind */
    uint64_t index;       /* i32 [count]: which prepared row each token is; 0: first, first + 1, ... */
    int32_t first, count; /* tokens */
} mer_gpu_product;

static_assert(sizeof(mer_gpu_product) == 40, "the host's mer_gpu_product");

/* Elements that share one scale of activations. */
#define ACT_BLOCK 32

/* A prepared row of activations, see mer_formats.h. */
struct act_q8 {
    const int8_t *q;
    const float *d;
    const int32_t *sum;
    const float *dsum;
    const int32_t *half;
};

INLINE long pad64(long n) { return (n + 63) & ~63L; }

INLINE act_q8 act_view(const uint8_t *p, int cols) {
    const long q = pad64(cols), n = pad64(4L * (cols / ACT_BLOCK));
    act_q8 a;
    a.q = (const int8_t *)p;
    a.d = (const float *)(p + q);
    a.sum = (const int32_t *)(p + q + n);
    a.dsum = (const float *)(p + q + 2 * n);
    a.half = (const int32_t *)(p + q + 3 * n);
    return a;
}

/* The prepared row of a product's token t. */
INLINE long act_row(const mer_gpu_product &p, int t) { return p.index ? ((const int32_t *)p.index)[t] : p.first + t; }

/* The CPU's quiet NaN; a GPU's own operations give another. */
#define QUIET_NAN __uint_as_float(0x7fc00000u)

/* What is added to each product of a row; none is not zero, which would change a negative zero. */
INLINE float row_bias(const mer_gpu_product &p, int row) { return p.bias ? ((const float *)p.bias)[row] : 0.0f; }

INLINE void store_y(const mer_gpu_product &p, long at, float y, float bias) {
    if (p.bias) y += bias;
    ((float *)p.y)[at] = y != y ? QUIET_NAN : y;
}

INLINE float f16_to_f32(uint16_t h) {
#ifdef MER_SIMULATED
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, mag = h & 0x7fffu;
    if (mag >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | (mag << 13));
    if (mag >= 0x0400u) return __uint_as_float(sign | ((mag << 13) + (112u << 23)));
    const float f = (float)mag * 0x1p-24f;
    return sign ? -f : f;
#else
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
#endif
}

INLINE float bf16_to_f32(uint16_t h) { return __uint_as_float((uint32_t)h << 16); }

/* 16 bytes from global to shared memory, both aligned; they are there after copies_done() and __syncthreads(). */
INLINE void copy16(void *shared, const void *global) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    const uint32_t to = (uint32_t)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
#else
    *(uint4 *)shared = *(const uint4 *)global;
#endif
}

INLINE void copies_done() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

#endif
