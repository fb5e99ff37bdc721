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

/* 32 bytes at a time, in a register where the including file has registers of that size (it includes immintrin.h). */
#ifdef __AVX2__
typedef __m256i mer_bytes;

MER_UNIT_INLINE mer_bytes mer_load32(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
MER_UNIT_INLINE void mer_store32(int8_t *q, mer_bytes x) { _mm256_storeu_si256((__m256i *)q, x); }

MER_UNIT_INLINE mer_bytes mer_bits(mer_bytes x, const int shift, const int mask) {
    return _mm256_and_si256(_mm256_srli_epi16(x, shift), _mm256_set1_epi8((char)mask));
}

/* a | b << shift; no bit may leave its byte. */
MER_UNIT_INLINE mer_bytes mer_above(mer_bytes a, mer_bytes b, const int shift) {
    return _mm256_or_si256(a, _mm256_slli_epi16(b, shift));
}

MER_UNIT_INLINE mer_bytes mer_less(mer_bytes x, const int n) { return _mm256_sub_epi8(x, _mm256_set1_epi8((char)n)); }

MER_UNIT_INLINE mer_bytes mer_look_up(const int8_t table[16], mer_bytes x) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table)), x);
}

/* The low halves of 16 bytes, then the high ones. */
MER_UNIT_INLINE mer_bytes mer_halves(const uint8_t *p) {
    const __m128i raw = _mm_loadu_si128((const __m128i *)p), mask = _mm_set1_epi8(15);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_and_si128(raw, mask)),
                                   _mm_and_si128(_mm_srli_epi16(raw, 4), mask), 1);
}

/* Each of 32 bits, as 1 or 0. */
MER_UNIT_INLINE mer_bytes mer_single_bits(uint32_t bits) {
    const __m256i byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bit = _mm256_set1_epi64x((long long)0x8040201008040201u);
    const __m256i spread = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32((int)bits), byte), bit);
    return _mm256_and_si256(_mm256_cmpeq_epi8(spread, bit), _mm256_set1_epi8(1));
}
#else
typedef struct {
    uint8_t at[32];
} mer_bytes;

MER_UNIT_INLINE mer_bytes mer_load32(const uint8_t *p) {
    mer_bytes x;
    memcpy(x.at, p, 32);
    return x;
}

MER_UNIT_INLINE void mer_store32(int8_t *q, mer_bytes x) { memcpy(q, x.at, 32); }

#define MER_EACH_BYTE(VALUE)                                           \
    mer_bytes r;                                                       \
    for (int i = 0; i < 32; i++) r.at[i] = (uint8_t)(VALUE);           \
    return r;

MER_UNIT_INLINE mer_bytes mer_bits(mer_bytes x, const int shift, const int mask) {
    MER_EACH_BYTE((x.at[i] >> shift) & mask)
}

MER_UNIT_INLINE mer_bytes mer_above(mer_bytes a, mer_bytes b, const int shift) {
    MER_EACH_BYTE(a.at[i] | b.at[i] << shift)
}

MER_UNIT_INLINE mer_bytes mer_less(mer_bytes x, const int n) { MER_EACH_BYTE(x.at[i] - n) }

MER_UNIT_INLINE mer_bytes mer_look_up(const int8_t table[16], mer_bytes x) { MER_EACH_BYTE(table[x.at[i]]) }

MER_UNIT_INLINE mer_bytes mer_halves(const uint8_t *p) { MER_EACH_BYTE(i < 16 ? p[i] & 15 : p[i - 16] >> 4) }

MER_UNIT_INLINE mer_bytes mer_single_bits(uint32_t bits) { MER_EACH_BYTE((bits >> i) & 1) }
#endif

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

MER_UNIT_INLINE float mer_load_f16(const uint8_t *p) {
#ifdef __F16C__
    return _cvtsh_ss(mer_load_u16(p));
#else
    return mer_f16_to_f32(mer_load_u16(p));
#endif
}

/* d, m; 16 bytes, the low halves the first 16 elements. */
MER_UNIT_INLINE void mer_unit_q4_1(const uint8_t *p, mer_unit *u) {
    u->d[0] = mer_load_f16(p);
    u->m[0] = -mer_load_f16(p + 2);
    mer_store32(u->q, mer_halves(p + 4));
}

/* d, 32 fifth bits, 16 bytes. */
MER_UNIT_INLINE void mer_unit_q5_0(const uint8_t *p, mer_unit *u) {
    u->d[0] = mer_load_f16(p);
    mer_store32(u->q, mer_less(mer_above(mer_halves(p + 6), mer_single_bits(mer_load_u32(p + 2)), 4), 16));
}

MER_UNIT_INLINE void mer_unit_q5_1(const uint8_t *p, mer_unit *u) {
    u->d[0] = mer_load_f16(p);
    u->m[0] = -mer_load_f16(p + 2);
    mer_store32(u->q, mer_above(mer_halves(p + 8), mer_single_bits(mer_load_u32(p + 4)), 4));
}

/* 16 scales and minima of four bits, 64 bytes of four elements each, d, dmin. */
MER_UNIT_INLINE void mer_unit_q2_k(const uint8_t *p, mer_unit *u) {
    const float d = mer_load_f16(p + 80), min = mer_load_f16(p + 82);
    for (int g = 0; g < 16; g++) {
        u->d[g] = d * (float)(p[g] & 15);
        u->m[g] = min * (float)(p[g] >> 4);
    }
#pragma GCC unroll 8
    for (int n = 0; n < 8; n++)
        mer_store32(u->q + n * 32, mer_bits(mer_load32(p + 16 + n / 4 * 32), 2 * (n % 4), 3));
}

/* 32 bytes of third bits, 64 of four elements each, 16 scales of six bits, d. */
MER_UNIT_INLINE void mer_unit_q3_k(const uint8_t *p, mer_unit *u) {
    const uint8_t *const packed = p + 96;
    const float d = mer_load_f16(p + 108);
    for (int g = 0; g < 16; g++) {
        const int four = g < 8 ? packed[g] & 15 : packed[g - 8] >> 4;
        const int two = (packed[8 + g % 4] >> (2 * (g / 4))) & 3;
        u->d[g] = d * (float)((four | two << 4) - 32);
    }
    const mer_bytes third = mer_load32(p);
#pragma GCC unroll 8
    for (int n = 0; n < 8; n++) {
        const mer_bytes two = mer_bits(mer_load32(p + 32 + n / 4 * 32), 2 * (n % 4), 3);
        mer_store32(u->q + n * 32, mer_less(mer_above(two, mer_bits(third, n, 1), 2), 4));
    }
}

/* As Q4_K, with 32 bytes of fifth bits between the scales and the rest. */
MER_UNIT_INLINE void mer_unit_q5_k(const uint8_t *p, mer_unit *u) {
    const float d = mer_load_f16(p), min = mer_load_f16(p + 2);
    uint8_t sc[16];
    mer_q4_k_unpack(p + 4, sc);
    for (int g = 0; g < 8; g++) {
        u->d[g] = d * (float)sc[g];
        u->m[g] = min * (float)sc[8 + g];
    }
    const mer_bytes fifth = mer_load32(p + 16);
#pragma GCC unroll 8
    for (int n = 0; n < 8; n++) {
        const mer_bytes four = mer_bits(mer_load32(p + 48 + n / 2 * 32), 4 * (n % 2), 15);
        mer_store32(u->q + n * 32, mer_above(four, mer_bits(fifth, n, 1), 4));
    }
}

/* 128 bytes of low halves, 64 of upper quarters, 16 scales (int8), d. */
MER_UNIT_INLINE void mer_unit_q6_k(const uint8_t *p, mer_unit *u) {
    const float d = mer_load_f16(p + 208);
    for (int g = 0; g < 16; g++) u->d[g] = d * (float)(int8_t)p[192 + g];
#pragma GCC unroll 8
    for (int n = 0; n < 8; n++) {
        const mer_bytes low = mer_bits(mer_load32(p + n / 4 * 64 + n % 2 * 32), n % 4 / 2 * 4, 15);
        const mer_bytes high = mer_bits(mer_load32(p + 128 + n / 4 * 32), 2 * (n % 4), 3);
        mer_store32(u->q + n * 32, mer_less(mer_above(low, high, 4), 32));
    }
}

static const int8_t mer_iq4[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

/* d, 16 bytes of codes that choose a value. */
MER_UNIT_INLINE void mer_unit_iq4_nl(const uint8_t *p, mer_unit *u) {
    u->d[0] = mer_load_f16(p);
    mer_store32(u->q, mer_look_up(mer_iq4, mer_halves(p + 2)));
}

/* d, eight scales of six bits (upper quarters first), 128 bytes as IQ4_NL's. */
MER_UNIT_INLINE void mer_unit_iq4_xs(const uint8_t *p, mer_unit *u) {
    const float d = mer_load_f16(p);
    const unsigned high = mer_load_u16(p + 2);
    for (int g = 0; g < 8; g++) {
        const int scale = ((p[4 + g / 2] >> (4 * (g % 2))) & 15) | (int)((high >> (2 * g)) & 3) << 4;
        u->d[g] = d * (float)(scale - 32);
        mer_store32(u->q + g * 32, mer_look_up(mer_iq4, mer_halves(p + 8 + g * 16)));
    }
}

#endif
