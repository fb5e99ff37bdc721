/* One element of what is done element by element: the definition that the vector versions repeat
 * operation by operation (no fused multiply-add), and use themselves for tails. So a result never
 * depends on where in a vector an element stood, nor on the instruction set. */
#ifndef MER_ELEMENTWISE_H
#define MER_ELEMENTWISE_H

#include "../mer_kernels.h"

/* exp by 2^n * p(r), |r| <= ln2 / 2; within 2 ulp. */
#define EXP_LO (-87.0f) /* below: a tiny positive number instead of 0, which 1 + exp can't tell */
#define EXP_HI 89.0f    /* above: infinity */
#define EXP_LOG2E 0x1.715476p+0f
#define EXP_LN2_HI 0x1.62e4p-1f /* few bits, so that n * LN2_HI is exact */
#define EXP_LN2_LO 0x1.7f7d1cp-20f
/* Taylor's coefficients down to r^2, enough for |r| <= 0.35 at degree 7 */
#define EXP_C7 0x1.a01a02p-13f
#define EXP_C6 0x1.6c16c2p-10f
#define EXP_C5 0x1.111112p-7f
#define EXP_C4 0x1.555556p-5f
#define EXP_C3 0x1.555556p-3f
#define EXP_C2 0x1p-1f

static inline float mer_exp1(float x) {
    /* Written so that a NaN stays one, as the max and min instructions do with x second. */
    x = EXP_LO > x ? EXP_LO : x;
    x = EXP_HI < x ? EXP_HI : x;
    if (x != x) return x;
    const int n = (int)__builtin_lrintf(x * EXP_LOG2E);
    const float nf = (float)n;
    float r = x - nf * EXP_LN2_HI;
    r = r - nf * EXP_LN2_LO;
    float p = EXP_C7;
    p = p * r + EXP_C6;
    p = p * r + EXP_C5;
    p = p * r + EXP_C4;
    p = p * r + EXP_C3;
    p = p * r + EXP_C2;
    p = p * (r * r) + r;
    p = p + 1.0f;
    const int half = n >> 1; /* 2^128 has no float: two steps */
    p = p * mer_bits_f32((uint32_t)(half + 127) << 23);
    return p * mer_bits_f32((uint32_t)(n - half + 127) << 23);
}

static inline float mer_swiglu1(float gate, float up) { return gate / (1.0f + mer_exp1(-gate)) * up; }

/* x / 2 (1 + tanh(y)) is x * sigmoid(2 y), for y = sqrt(2 / pi) (x + 0.044715 x^3): Hendrycks and Gimpel's form of GELU. */
#define GELU_1 0x1.988454p+0f /* 2 sqrt(2 / pi) */
#define GELU_3 0x1.2444f2p-4f /* the same times 0.044715 */

static inline float mer_geglu1(float gate, float up) {
    return gate / (1.0f + mer_exp1(-(gate * (GELU_1 + GELU_3 * (gate * gate))))) * up;
}

static inline float mer_clamped_swiglu1(float gate, float up, float alpha, float limit, float added) {
    gate = limit < gate ? limit : gate;
    up = limit < up ? limit : up;
    up = -limit > up ? -limit : up;
    return gate / (1.0f + mer_exp1(-(alpha * gate))) * (up + added);
}

/* The scale of a block of activations, and the sums of its two halves; see mer_act_q8. */
static inline void mer_store_scale(const mer_act_q8 *a, long b, float amax, int32_t first, int32_t second) {
    const float d = amax / 127.0f;
    const int32_t sum = first + second;
    ((float *)a->d)[b] = d;
    ((int32_t *)a->sum)[b] = sum;
    ((float *)a->dsum)[b] = d * (float)sum;
    ((int32_t *)a->half)[2 * b] = first;
    ((int32_t *)a->half)[2 * b + 1] = second;
}

/* Block b of 32 activations into int8. */
static inline void mer_quantise_block(const float *x, const mer_act_q8 *a, long b) {
    int8_t *const q = (int8_t *)a->q + b * MER_ACT_BLOCK;
    uint32_t top = 0; /* as bits, magnitudes sort like integers and NaN and infinity come last */
    for (int i = 0; i < MER_ACT_BLOCK; i++) {
        const uint32_t bits = mer_f32_bits(x[i]) & 0x7fffffffu;
        top = bits > top ? bits : top;
    }
    const float amax = mer_bits_f32(top);
    const int bad = top >= 0x7f800000u;
    if (bad || amax < MER_ACT_TINY) {
        memset(q, 0, MER_ACT_BLOCK);
        mer_store_scale(a, b, bad ? __builtin_nanf("") : 0.0f, 0, 0);
        return;
    }
    const float scale = 127.0f / amax;
    int32_t half[2] = {0, 0};
    for (int i = 0; i < MER_ACT_BLOCK; i++) {
        q[i] = (int8_t)__builtin_lrintf(x[i] * scale);
        half[i / 16] += q[i];
    }
    mer_store_scale(a, b, amax, half[0], half[1]);
}

#endif
