/* The formats that are only read, not written: a unit (256 elements, or a block of 32) becomes small integers with a
 * scale, and where the format has one a minimum, for each group of 16 or 32: element = d * q - m.
 *
 * A row's product with int8 activations is, group by group in ascending order, one float to which is added
 * (d * a.d) * (the exact integer), and from which m * (a.d * sum of a.q) is taken; on every instruction set. */
#ifndef MER_UNITS_H
#define MER_UNITS_H

#include "../mer_kernels.h"

typedef struct {
    int8_t q[256];
    float d[16], m[16];
} mer_unit;

/* FORMAT(name, id, elements of a unit, elements of a group, whether there are minima) */
#define MER_UNIT_FORMATS(FORMAT)        \
    FORMAT(q4_1, MER_Q4_1, 32, 32, 1)   \
    FORMAT(q5_0, MER_Q5_0, 32, 32, 0)   \
    FORMAT(q5_1, MER_Q5_1, 32, 32, 1)   \
    FORMAT(q2_k, MER_Q2_K, 256, 16, 1)  \
    FORMAT(q3_k, MER_Q3_K, 256, 16, 0)  \
    FORMAT(q5_k, MER_Q5_K, 256, 32, 1)  \
    FORMAT(q6_k, MER_Q6_K, 256, 16, 0)  \
    FORMAT(iq4_nl, MER_IQ4_NL, 32, 32, 0) \
    FORMAT(iq4_xs, MER_IQ4_XS, 256, 32, 0)

/* The products of units_avx2.c, which the wider instruction sets use as well. */
#define MER_DECLARE_UNITS(NAME, ID, UNIT, GROUP, MINIMA)                                                        \
    void mer_avx2_matmul_##NAME(const void *w, long cols, long r0, long r1, const void *const *acts, long n_tok, \
                                float *y, long y_stride);
#if defined(__x86_64__)
MER_UNIT_FORMATS(MER_DECLARE_UNITS)
#define MER_UNITS_AVX2(NAME, ID, UNIT, GROUP, MINIMA) [ID] = mer_avx2_matmul_##NAME,
#endif

#define MER_UNIT_INLINE static inline __attribute__((always_inline))

MER_UNIT_INLINE uint16_t mer_load_u16(const uint8_t *p) {
    uint16_t v;
    memcpy(&v, p, 2);
    return v;
}

MER_UNIT_INLINE uint32_t mer_load_u32(const uint8_t *p) {
    uint32_t v;
    memcpy(&v, p, 4);
    return v;
}

MER_UNIT_INLINE float mer_load_f16(const uint8_t *p) { return mer_f16_to_f32(mer_load_u16(p)); }

/* d, m; 16 bytes, the low halves the first 16 elements. */
MER_UNIT_INLINE void mer_unit_q4_1(const uint8_t *p, mer_unit *u) {
    u->d[0] = mer_load_f16(p);
    u->m[0] = -mer_load_f16(p + 2);
    for (int i = 0; i < 16; i++) {
        u->q[i] = (int8_t)(p[4 + i] & 15);
        u->q[i + 16] = (int8_t)(p[4 + i] >> 4);
    }
}

/* 32 elements of five bits: `high` has the fifth ones. */
MER_UNIT_INLINE void mer_five_bits(const uint8_t *low, uint32_t high, int8_t less, int8_t *q) {
    uint8_t bit[32];
    for (int i = 0; i < 32; i++) bit[i] = (uint8_t)(((high >> i) & 1) << 4);
    for (int i = 0; i < 16; i++) {
        q[i] = (int8_t)((low[i] & 15) + bit[i] - less);
        q[i + 16] = (int8_t)((low[i] >> 4) + bit[i + 16] - less);
    }
}

MER_UNIT_INLINE void mer_unit_q5_0(const uint8_t *p, mer_unit *u) {
    u->d[0] = mer_load_f16(p);
    mer_five_bits(p + 6, mer_load_u32(p + 2), 16, u->q);
}

MER_UNIT_INLINE void mer_unit_q5_1(const uint8_t *p, mer_unit *u) {
    u->d[0] = mer_load_f16(p);
    u->m[0] = -mer_load_f16(p + 2);
    mer_five_bits(p + 8, mer_load_u32(p + 4), 0, u->q);
}

/* 16 scales and minima of four bits, 64 bytes of four elements each, d, dmin. */
MER_UNIT_INLINE void mer_unit_q2_k(const uint8_t *p, mer_unit *u) {
    const float d = mer_load_f16(p + 80), min = mer_load_f16(p + 82);
    for (int g = 0; g < 16; g++) {
        u->d[g] = d * (float)(p[g] & 15);
        u->m[g] = min * (float)(p[g] >> 4);
    }
    for (int half = 0; half < 2; half++)
        for (int part = 0; part < 4; part++)
            for (int i = 0; i < 32; i++)
                u->q[half * 128 + part * 32 + i] = (int8_t)((p[16 + half * 32 + i] >> (2 * part)) & 3);
}

/* 32 bytes of third bits, 64 of four elements each, 16 scales of six bits, d. */
MER_UNIT_INLINE void mer_unit_q3_k(const uint8_t *p, mer_unit *u) {
    const uint8_t *const third = p, *const low = p + 32, *const packed = p + 96;
    const float d = mer_load_f16(p + 108);
    for (int g = 0; g < 16; g++) {
        const int four = g < 8 ? packed[g] & 15 : packed[g - 8] >> 4;
        const int two = (packed[8 + g % 4] >> (2 * (g / 4))) & 3;
        u->d[g] = d * (float)((four | two << 4) - 32);
    }
    for (int half = 0; half < 2; half++)
        for (int part = 0; part < 4; part++)
            for (int i = 0; i < 32; i++) {
                const int bits = (low[half * 32 + i] >> (2 * part)) & 3;
                const int bit = (third[i] >> (half * 4 + part)) & 1;
                u->q[half * 128 + part * 32 + i] = (int8_t)(bits + 4 * bit - 4);
            }
}

/* As Q4_K, with 32 bytes of fifth bits between the scales and the rest. */
MER_UNIT_INLINE void mer_unit_q5_k(const uint8_t *p, mer_unit *u) {
    const float d = mer_load_f16(p), min = mer_load_f16(p + 2);
    const uint8_t *const fifth = p + 16, *const low = p + 48;
    uint8_t sc[16];
    mer_q4_k_unpack(p + 4, sc);
    for (int g = 0; g < 8; g++) {
        u->d[g] = d * (float)sc[g];
        u->m[g] = min * (float)sc[8 + g];
    }
    for (int pair = 0; pair < 4; pair++)
        for (int i = 0; i < 32; i++) {
            const int a = (fifth[i] >> (2 * pair)) & 1, b = (fifth[i] >> (2 * pair + 1)) & 1;
            u->q[pair * 64 + i] = (int8_t)((low[pair * 32 + i] & 15) + 16 * a);
            u->q[pair * 64 + 32 + i] = (int8_t)((low[pair * 32 + i] >> 4) + 16 * b);
        }
}

/* 128 bytes of low halves, 64 of upper quarters, 16 scales (int8), d. */
MER_UNIT_INLINE void mer_unit_q6_k(const uint8_t *p, mer_unit *u) {
    const float d = mer_load_f16(p + 208);
    for (int g = 0; g < 16; g++) u->d[g] = d * (float)(int8_t)p[192 + g];
    for (int half = 0; half < 2; half++) {
        const uint8_t *const low = p + half * 64, *const high = p + 128 + half * 32;
        int8_t *const q = u->q + half * 128;
        for (int i = 0; i < 32; i++) {
            q[i] = (int8_t)(((low[i] & 15) | (high[i] & 3) << 4) - 32);
            q[i + 32] = (int8_t)(((low[i + 32] & 15) | (high[i] >> 2 & 3) << 4) - 32);
            q[i + 64] = (int8_t)((low[i] >> 4 | (high[i] >> 4 & 3) << 4) - 32);
            q[i + 96] = (int8_t)((low[i + 32] >> 4 | (high[i] >> 6) << 4) - 32);
        }
    }
}

static const int8_t mer_iq4[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

MER_UNIT_INLINE void mer_unit_iq4_nl(const uint8_t *p, mer_unit *u) {
    u->d[0] = mer_load_f16(p);
    for (int i = 0; i < 16; i++) {
        u->q[i] = mer_iq4[p[2 + i] & 15];
        u->q[i + 16] = mer_iq4[p[2 + i] >> 4];
    }
}

/* d, eight scales of six bits (upper quarters first), 128 bytes as IQ4_NL's. */
MER_UNIT_INLINE void mer_unit_iq4_xs(const uint8_t *p, mer_unit *u) {
    const float d = mer_load_f16(p);
    const unsigned high = mer_load_u16(p + 2);
    for (int g = 0; g < 8; g++) {
        const int scale = ((p[4 + g / 2] >> (4 * (g % 2))) & 15) | (int)((high >> (2 * g)) & 3) << 4;
        u->d[g] = d * (float)(scale - 32);
        for (int i = 0; i < 16; i++) {
            u->q[g * 32 + i] = mer_iq4[p[8 + g * 16 + i] & 15];
            u->q[g * 32 + 16 + i] = mer_iq4[p[8 + g * 16 + i] >> 4];
        }
    }
}

#endif
