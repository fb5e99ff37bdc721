/* Keys and values as a block holds them, made into floats. */
#ifndef MER_DECODER_KV_H
#define MER_DECODER_KV_H

#include "../mer_decoder.h"
#include "vec.h"

#define MER_KV_GROUP 32 /* elements of a key or value that share a scale in Q8_0; the last group may be shorter */

uint16_t mer_float_to_half(float f);
/* n a multiple of 16. */
void mer_widen(const uint16_t *h, long n, float *to);
/* A part in Q8_0, codes and scales as mer_kv_store() lays them out. */
void mer_widen_codes(const int8_t *q, const uint16_t *scales, long dim, int by_element, float *to);
uint16_t mer_quantise_group(const float *x, long n, int8_t *q, long step);

/* F16 without F16C and without branches, so that every clone vectorises it; exact, infinities included. */
MER_INLINE float half_to_float(uint16_t h) {
    const uint32_t magnitude = (uint32_t)(h & 0x7fffu) << 13;
    float f;
    memcpy(&f, &magnitude, 4);
    f *= 0x1p112f;
    uint32_t bits;
    memcpy(&bits, &f, 4);
    bits |= (magnitude >= 0x0f800000u) ? 0x7f800000u : 0u;
    bits |= (uint32_t)(h & 0x8000u) << 16;
    memcpy(&f, &bits, 4);
    return f;
}

/* A part of a block, 16 vectors of `dim`, as floats in the same order: by_element, [dim, 16], else [16, dim]. In place
 * for F32, else converted into `to`. */
MER_INLINE const float *as_floats(const char *part, int kv, long dim, int by_element, float *to) {
    const long n = MER_KV_BLOCK * dim;
    if (kv == MER_KV_F32) return (const float *)part;
    if (kv == MER_KV_F16) {
        mer_widen((const uint16_t *)part, n, to);
        return to;
    }
    mer_widen_codes((const int8_t *)part, (const uint16_t *)(part + n), dim, by_element, to);
    return to;
}

/* The vector at one place of a part that is stored by position, as as_floats() gives it. */
MER_INLINE void row_as_floats(const char *part, int kv, long dim, long at, float *to) {
    if (kv == MER_KV_F32) {
        memcpy(to, (const float *)part + at * dim, sizeof(float) * (size_t)dim);
    } else if (kv == MER_KV_F16) {
        const uint16_t *h = (const uint16_t *)part + at * dim;
        for (long d = 0; d < dim; d++) to[d] = half_to_float(h[d]);
    } else {
        const int8_t *q = (const int8_t *)part + at * dim;
        const long groups = (dim + MER_KV_GROUP - 1) / MER_KV_GROUP;
        const uint16_t *scales = (const uint16_t *)(part + MER_KV_BLOCK * dim) + at * groups;
        for (long d = 0; d < dim; d++) to[d] = (float)q[d] * half_to_float(scales[d / MER_KV_GROUP]);
    }
}

/* A row as mer_kv_row_store() wrote it: codes, then scales. */
MER_INLINE void mer_kv_row_load(const char *row, int kv, long n, float *to) {
    if (kv != MER_KV_Q8_0) {
        row_as_floats(row, kv, n, 0, to);
        return;
    }
    for (long i = 0; i < n; i++) to[i] = (float)((const int8_t *)row)[i];
    for (long i = 0; i < n; i += MER_KV_GROUP) {
        const long end = i + MER_KV_GROUP < n ? i + MER_KV_GROUP : n;
        uint16_t half;
        memcpy(&half, row + n + i / MER_KV_GROUP * 2, 2);
        const float scale = half_to_float(half);
        for (long j = i; j < end; j++) to[j] *= scale;
    }
}

#endif
