/* Eight rows of weights in AVX2 registers. Included behind the pragma that sets the target. */
#ifndef MER_ROWS256_H
#define MER_ROWS256_H

#include "../mer_formats.h"

#define INLINE static inline __attribute__((always_inline))
#define ROWS 8

/* 16 bytes of two rows side by side. */
INLINE __m256i load_pair(const char *low, const char *high) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)low)),
                                   _mm_loadu_si128((const __m128i *)high), 1);
}

INLINE __m256i both_halves(const int8_t *q) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)q));
}

INLINE short load16(const char *p) {
    short v;
    memcpy(&v, p, 2);
    return v;
}

/* The F16 at the same offset of eight rows. */
INLINE __m256 load_scales(const char *const row[ROWS], size_t at) {
    return _mm256_cvtph_ps(_mm_set_epi16(load16(row[7] + at), load16(row[6] + at), load16(row[5] + at),
                                         load16(row[4] + at), load16(row[3] + at), load16(row[2] + at),
                                         load16(row[1] + at), load16(row[0] + at)));
}

/* The F16 at two offsets of eight rows, 18 bytes apart: one in each half. Reads 32 bytes of each row. */
INLINE __m256i load_two_scales(const char *const row[ROWS], size_t at) {
    __m256i r[ROWS];
    for (int i = 0; i < ROWS; i++) r[i] = _mm256_loadu_si256((const __m256i *)(row[i] + at));
    const __m256i r03 = _mm256_unpacklo_epi32(_mm256_unpacklo_epi16(r[0], r[1]), _mm256_unpacklo_epi16(r[2], r[3]));
    const __m256i r47 = _mm256_unpacklo_epi32(_mm256_unpacklo_epi16(r[4], r[5]), _mm256_unpacklo_epi16(r[6], r[7]));
    return _mm256_blend_epi32(_mm256_unpacklo_epi64(r03, r47), _mm256_unpackhi_epi64(r03, r47), 0xf0);
}

/* The scales of a block of eight rows. */
INLINE __m256 load_powers(const char *const row[ROWS], size_t at) {
    uint8_t e[8];
    for (int i = 0; i < ROWS; i++) e[i] = (uint8_t)row[i][at];
    const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)e));
    const __m256i one = _mm256_set1_epi32(1), normal = _mm256_slli_epi32(_mm256_sub_epi32(wide, one), 23);
    const __m256i tiny = _mm256_sllv_epi32(_mm256_set1_epi32(0x00200000), wide);
    return _mm256_castsi256_ps(_mm256_blendv_epi8(tiny, normal, _mm256_cmpgt_epi32(wide, one)));
}

/* The head of a Q4_K block of eight rows: d, dmin, and eight scales and minima each. */
struct q4_k_head {
    __m256 d, dmin, scale[8], min[8];
};

INLINE __m256 half_to_float(__m256i low16_of_lanes) {
    const __m256i packed = _mm256_packus_epi32(low16_of_lanes, low16_of_lanes);
    return _mm256_cvtph_ps(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}

INLINE void load_q4_k_head(const char *const row[ROWS], size_t at, struct q4_k_head *h) {
    const __m256i r0 = load_pair(row[0] + at, row[4] + at), r1 = load_pair(row[1] + at, row[5] + at);
    const __m256i r2 = load_pair(row[2] + at, row[6] + at), r3 = load_pair(row[3] + at, row[7] + at);
    const __m256i t0 = _mm256_unpacklo_epi32(r0, r1), t1 = _mm256_unpacklo_epi32(r2, r3);
    const __m256i t2 = _mm256_unpackhi_epi32(r0, r1), t3 = _mm256_unpackhi_epi32(r2, r3);
    const __m256i dd = _mm256_unpacklo_epi64(t0, t1), a = _mm256_unpackhi_epi64(t0, t1);
    const __m256i b = _mm256_unpacklo_epi64(t2, t3), c = _mm256_unpackhi_epi64(t2, t3);
    h->d = half_to_float(_mm256_and_si256(dd, _mm256_set1_epi32(0xffff)));
    h->dmin = half_to_float(_mm256_srli_epi32(dd, 16));

    const __m256i six = _mm256_set1_epi8(0x3f), four = _mm256_set1_epi8(0x0f), top = _mm256_set1_epi8(0x30);
    const __m256i packed[4] = {
        _mm256_and_si256(a, six),
        _mm256_or_si256(_mm256_and_si256(c, four), _mm256_and_si256(_mm256_srli_epi32(a, 2), top)),
        _mm256_and_si256(b, six),
        _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi32(c, 4), four),
                        _mm256_and_si256(_mm256_srli_epi32(b, 2), top)),
    };
    const __m256i byte = _mm256_set1_epi32(0xff);
    for (int i = 0; i < 4; i++) {
        __m256 *const out = (i < 2 ? h->scale : h->min) + i % 2 * 4;
        out[0] = _mm256_cvtepi32_ps(_mm256_and_si256(packed[i], byte));
        out[1] = _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(packed[i], 8), byte));
        out[2] = _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(packed[i], 16), byte));
        out[3] = _mm256_cvtepi32_ps(_mm256_srli_epi32(packed[i], 24));
    }
}

INLINE void store_rows(float *y, __m256 v, long n) {
    if (n >= ROWS) {
        _mm256_storeu_ps(y, v);
        return;
    }
    float lanes[ROWS];
    _mm256_storeu_ps(lanes, v);
    memcpy(y, lanes, (size_t)n * sizeof *y);
}

#endif
