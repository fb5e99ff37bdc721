/* Keys and values in their blocks of 16 positions, as csrc/decoder/kv.c stores them. */
#ifndef MER_KV_CUH
#define MER_KV_CUH

#include "mer_gpu.cuh"

#define KV_BLOCK 16
#define KV_GROUP 32 /* elements that share a scale in Q8_0 */
enum { KV_F32, KV_F16, KV_Q8_0 };

INLINE long kv_part_bytes(int kv, int dim) {
    const long n = (long)KV_BLOCK * dim;
    if (kv != KV_Q8_0) return n * (kv == KV_F16 ? 2 : 4);
    return n + KV_BLOCK * 2L * ((dim + KV_GROUP - 1) / KV_GROUP);
}

/* Round to nearest even; beyond F16's range the largest finite number. */
INLINE uint16_t kv_half(float f) {
    uint32_t bits = __float_as_uint(f);
    const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000u);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return sign | 0x7e00u;
    if (bits >= 0x477fe000u) return sign | 0x7bffu;
    if (bits < 0x38800000u) { /* subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits */
        bits = __float_as_uint(__uint_as_float(bits) + 0.5f);
        return sign | (uint16_t)(bits - 0x3f000000u);
    }
    bits += 0xfffu + (bits >> 13 & 1u);
    return sign | (uint16_t)((bits - 0x38000000u) >> 13);
}

/* Codes of a group and its scale, by a whole warp; a group that is not finite has a scale of NaN. */
INLINE void store_group(float x, bool live, int8_t *q, uint16_t *scale) {
    float top = live ? fabsf(x) : 0.0f;
    const bool wrong = __any_sync(~0u, live && !(x - x == 0.0f));
    for (int by = 16; by; by /= 2) {
        const float other = __shfl_xor_sync(~0u, top, by);
        top = other > top ? other : top;
    }
    const float d = top / 127.0f;
    const float inverse = d > 0.0f && !wrong ? 1.0f / d : 0.0f;
    const float code = inverse > 0.0f ? roundf(x * inverse) : 0.0f;
    if (live) *q = (int8_t)(code > 127.0f ? 127.0f : code < -127.0f ? -127.0f : code);
    if (threadIdx.x % 32 == 0) *scale = wrong ? (uint16_t)0xfe00u : kv_half(d);
}

/* One vector [dim] to place `at` of a part: [dim, 16] by_element, else [16, dim]; by the block of threads. */
INLINE void store_kv(uint8_t *part, int kv, int at, const float *x, int dim, bool by_element) {
    const int first = by_element ? at : at * dim, step = by_element ? KV_BLOCK : 1;
    if (kv == KV_F32) {
        for (int d = threadIdx.x; d < dim; d += MER_GPU_THREADS) ((float *)part)[first + d * step] = x[d];
    } else if (kv == KV_F16) {
        for (int d = threadIdx.x; d < dim; d += MER_GPU_THREADS) ((uint16_t *)part)[first + d * step] = kv_half(x[d]);
    } else {
        const int groups = (dim + KV_GROUP - 1) / KV_GROUP;
        uint16_t *const scales = (uint16_t *)(part + KV_BLOCK * dim);
        for (int g = threadIdx.x / 32; g < groups; g += MER_GPU_THREADS / 32) {
            const int d = g * KV_GROUP + threadIdx.x % 32;
            const bool live = d < dim;
            store_group(live ? x[d] : 0.0f, live, (int8_t *)part + first + (live ? d : 0) * step,
                        scales + (by_element ? g * KV_BLOCK + at : at * groups + g));
        }
    }
}

/* Element d of the key at place `at` of a part. */
template <int KV> INLINE float load_key(const uint8_t *part, int d, int at, int dim) {
    const int i = d * KV_BLOCK + at;
    if (KV == KV_F32) return ((const float *)part)[i];
    if (KV == KV_F16) return f16_to_f32(((const uint16_t *)part)[i]);
    const uint16_t *const scales = (const uint16_t *)(part + KV_BLOCK * dim);
    return (float)((const int8_t *)part)[i] * f16_to_f32(scales[d / KV_GROUP * KV_BLOCK + at]);
}

/* Element d of the value at place `at` of a part. */
template <int KV> INLINE float load_value(const uint8_t *part, int d, int at, int dim) {
    const int i = at * dim + d;
    if (KV == KV_F32) return ((const float *)part)[i];
    if (KV == KV_F16) return f16_to_f32(((const uint16_t *)part)[i]);
    const uint16_t *const scales = (const uint16_t *)(part + KV_BLOCK * dim);
    return (float)((const int8_t *)part)[i] * f16_to_f32(scales[at * ((dim + KV_GROUP - 1) / KV_GROUP) + d / KV_GROUP]);
}

#endif
