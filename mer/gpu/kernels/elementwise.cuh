/* What is done element by element; mer/_ext/csrc/kernels/elementwise.h defines it operation by operation. */
#ifndef MER_ELEMENTWISE_CUH
#define MER_ELEMENTWISE_CUH

#include "mer_gpu.cuh"

#define ACT_TINY 0x1p-100f

INLINE float exp_f32(float x) {
    x = -87.0f > x ? -87.0f : x; /* a NaN stays one */
    x = 89.0f < x ? 89.0f : x;
    if (x != x) return x;
    const int n = __float2int_rn(x * 0x1.715476p+0f);
    const float nf = (float)n;
    float r = x - nf * 0x1.62e4p-1f;
    r = r - nf * 0x1.7f7d1cp-20f;
    float p = 0x1.a01a02p-13f;
    p = p * r + 0x1.6c16c2p-10f;
    p = p * r + 0x1.111112p-7f;
    p = p * r + 0x1.555556p-5f;
    p = p * r + 0x1.555556p-3f;
    p = p * r + 0x1p-1f;
    p = p * (r * r) + r;
    p = p + 1.0f;
    const int half = n >> 1; /* 2^128 has no float: two steps */
    p = p * __uint_as_float((uint32_t)(half + 127) << 23);
    return p * __uint_as_float((uint32_t)(n - half + 127) << 23);
}

/* 0: SwiGLU, 1: GELU by tanh, 2: SwiGLU with gate at the most `limit` and up within +-limit, plus `added`. */
INLINE float activate(float gate, float up, int kind, float alpha, float limit, float added) {
    float y = gate;
    if (kind == 1) y = gate * (0x1.988454p+0f + 0x1.2444f2p-4f * (gate * gate));
    if (kind == 2) {
        gate = limit < gate ? limit : gate;
        up = limit < up ? limit : up;
        up = (-limit > up ? -limit : up) + added;
        y = alpha * gate;
    }
    const float h = gate / (1.0f + exp_f32(-y)) * up;
    return h != h ? QUIET_NAN : h;
}

/* Element `lane` of block b of 32 activations into int8: by a whole warp. */
INLINE void quantise_block(float x, const act_q8 &a, int b, int lane) {
    uint32_t top = __float_as_uint(x) & 0x7fffffffu; /* as bits, magnitudes sort like integers, NaN and infinity last */
#pragma unroll
    for (int by = 16; by; by /= 2) {
        const uint32_t other = __shfl_xor_sync(~0u, top, by);
        top = other > top ? other : top;
    }
    const float amax = __uint_as_float(top);
    const bool bad = top >= 0x7f800000u, none = bad || amax < ACT_TINY;
    const float scale = 127.0f / amax;
    const int q = none ? 0 : __float2int_rn(x * scale);
    int sum = q; /* of each half, then of both */
#pragma unroll
    for (int by = 8; by; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
    const int other = __shfl_xor_sync(~0u, sum, 16);
    ((int8_t *)a.q)[b * ACT_BLOCK + lane] = (int8_t)q;
    if (lane % 16 == 0) ((int32_t *)a.half)[2 * b + lane / 16] = sum;
    if (lane) return;
    const float d = bad ? QUIET_NAN : none ? 0.0f : amax / 127.0f;
    ((float *)a.d)[b] = d;
    ((int32_t *)a.sum)[b] = sum + other;
    ((float *)a.dsum)[b] = bad ? QUIET_NAN : d * (float)(sum + other);
}

#endif
