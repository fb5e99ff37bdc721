/* Keys and values into a block. */
#include <math.h>

#include "kv.h"

/* Round to nearest even; beyond F16's range the largest finite number, so that a key never becomes infinite. Without
 * branches, so that every clone vectorises it. */
MER_INLINE uint16_t float_to_half(float f) {
    uint32_t bits, tiny;
    memcpy(&bits, &f, 4);
    const uint32_t sign = bits >> 16 & 0x8000u;
    bits &= 0x7fffffffu;
    memcpy(&f, &bits, 4);
    f += 0.5f; /* of a subnormal that leaves the rounded multiple of 2^-24 in the low bits */
    memcpy(&tiny, &f, 4);
    uint32_t half = (bits + 0xfffu + (bits >> 13 & 1u) - 0x38000000u) >> 13;
    half = bits < 0x38800000u ? tiny - 0x3f000000u : half;
    half = bits >= 0x477fe000u ? 0x7bffu : half;
    half = bits > 0x7f800000u ? 0x7e00u : half;
    return (uint16_t)(sign | half);
}

uint16_t mer_float_to_half(float f) { return float_to_half(f); }

MER_CLONES
static void to_halves(const float *x, long n, uint16_t *to) {
    for (long i = 0; i < n; i++) to[i] = float_to_half(x[i]);
}

size_t mer_kv_part_bytes(int kv, long dim) {
    const size_t n = MER_KV_BLOCK * (size_t)dim;
    if (kv != MER_KV_Q8_0) return n * (kv == MER_KV_F16 ? 2 : 4);
    return n + MER_KV_BLOCK * 2 * (size_t)((dim + MER_KV_GROUP - 1) / MER_KV_GROUP);
}

/* Codes of n neighbours, `step` apart, and their scale, as GGUF's Q8_0 rounds. What is not finite makes all of them NaN. */
uint16_t mer_quantise_group(const float *x, long n, int8_t *q, long step) {
    float top = 0.0f, wrong = 0.0f;
    for (long i = 0; i < n; i++) {
        top = fabsf(x[i]) > top ? fabsf(x[i]) : top;
        wrong += x[i] - x[i];
    }
    const float scale = top / 127.0f;
    const float inverse = scale > 0.0f && wrong == 0.0f ? 1.0f / scale : 0.0f;
    for (long i = 0; i < n; i++) {
        const float code = inverse > 0.0f ? roundf(x[i] * inverse) : 0.0f;
        q[i * step] = (int8_t)(code > 127.0f ? 127.0f : code < -127.0f ? -127.0f : code);
    }
    return mer_float_to_half(wrong == 0.0f ? scale : wrong);
}

/* One vector [dim] to place `at` of a part: [dim, 16] by_element, else [16, dim]. */
static void store(char *part, int kv, long at, const float *x, long dim, int by_element) {
    const long first = by_element ? at : at * dim, step = by_element ? MER_KV_BLOCK : 1;
    if (kv == MER_KV_F32)
        for (long d = 0; d < dim; d++) ((float *)part)[first + d * step] = x[d];
    else if (kv == MER_KV_F16)
        for (long d = 0; d < dim; d += MER_KV_GROUP) {
            uint16_t halves[MER_KV_GROUP];
            const long n = dim - d < MER_KV_GROUP ? dim - d : MER_KV_GROUP;
            to_halves(x + d, n, halves);
            for (long i = 0; i < n; i++) ((uint16_t *)part)[first + (d + i) * step] = halves[i];
        }
    else {
        const long groups = (dim + MER_KV_GROUP - 1) / MER_KV_GROUP;
        uint16_t *scales = (uint16_t *)(part + MER_KV_BLOCK * dim);
        for (long g = 0; g < groups; g++) {
            const long d = g * MER_KV_GROUP, n = dim - d < MER_KV_GROUP ? dim - d : MER_KV_GROUP;
            scales[by_element ? g * MER_KV_BLOCK + at : at * groups + g] =
                mer_quantise_group(x + d, n, (int8_t *)part + first + d * step, step);
        }
    }
}

void mer_kv_store(void *block, int kv, long at, const float *k, const float *v, long n_kv, long dim) {
    const size_t part = mer_kv_part_bytes(kv, dim);
    for (long h = 0; h < n_kv; h++) {
        store((char *)block + h * part, kv, at, k + h * dim, dim, 1);
        store((char *)block + (n_kv + h) * part, kv, at, v + h * dim, dim, 0);
    }
}

void mer_index_store(void *part, int kv, long at, const float *key, long dim) {
    store(part, kv, at, key, dim, 1);
}

void mer_latent_store(void *block, int kv, long at, const float *latent, long dim) {
    store(block, kv, at, latent, dim, 0);
}
