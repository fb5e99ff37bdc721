/* The sums and functions of the decoder's vectors, in the order and the operations of csrc/decoder/vec.h and gates.h. */
#ifndef MER_VEC_CUH
#define MER_VEC_CUH

#include "mer_gpu.cuh"

/* A kernel whose blocks have that many threads. */
#ifdef MER_SIMULATED
#define MER_KERNEL_OF(THREADS, NAME, ...) MER_KERNEL(NAME, __VA_ARGS__)
#define MER_DYNAMIC_SHARED(NAME) float *const NAME = (float *)simulated::dynamic_shared
#else
#define MER_KERNEL_OF(THREADS, NAME, ...) extern "C" __global__ void __launch_bounds__(THREADS) NAME(__VA_ARGS__)
#define MER_DYNAMIC_SHARED(NAME) extern __shared__ float NAME[]
#endif

/* The lanes of a warp added pairwise: i and i + 16, then i and i + 8, ...; every lane has the sum. */
INLINE float sum_of_lanes(float x, int lanes) {
    for (int by = lanes / 2; by; by /= 2) x += __shfl_xor_sync(~0u, x, by);
    return x;
}

/* dot(x, x) of n floats, by a whole warp. */
INLINE float sum_of_squares(const float *x, int n) {
    const int lane = threadIdx.x % 32, whole = n / 32 * 32;
    float sum = 0;
#pragma unroll 8
    for (int i = lane; i < whole; i += 32) sum += x[i] * x[i];
    int end = whole;
    if (n - whole >= 16) {
        if (lane < 16) sum += x[whole + lane] * x[whole + lane];
        end += 16;
    }
    sum = sum_of_lanes(sum, 32);
    for (int i = end; i < n; i++) sum += x[i] * x[i];
    return sum;
}

/* total(x) of n floats, by a whole warp: both halves of it do the same. */
INLINE float sum_of_floats(const float *x, int n) {
    const int lane = threadIdx.x % 16, whole = n / 16 * 16;
    float sum = 0;
#pragma unroll 8
    for (int i = lane; i < whole; i += 16) sum += x[i];
    sum = sum_of_lanes(sum, 16);
    for (int i = whole; i < n; i++) sum += x[i];
    return sum;
}

/* What an RMS norm multiplies x by, by a whole warp. */
INLINE float norm_factor(const float *x, int n, float eps) { return 1.0f / sqrtf(sum_of_squares(x, n) / (float)n + eps); }

/* e^x for x <= 0. */
INLINE float exp_below(float x) {
    const float magic = 0x1.8p23f;
    if (x != x) return x; /* the bits of a GPU's own NaN would make a number of it below */
    if (x < -87.0f) x = -87.0f;
    const float shifted = x * 0x1.715476p+0f + magic;
    const float n = shifted - magic;
    float r = x - n * 0x1.62e4p-1f;
    r = r - n * 0x1.7f7d1cp-20f;
    float p = r * 0x1.6c16c2p-10f + 0x1.111112p-7f;
    p = p * r + 0x1.555556p-5f;
    p = p * r + 0x1.555556p-3f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return __uint_as_float(__float_as_uint(p) + (__float_as_uint(shifted) << 23));
}

INLINE float sigmoid(float x) {
    const float e = exp_below(__uint_as_float(__float_as_uint(x) | 0x80000000u));
    return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

#endif
