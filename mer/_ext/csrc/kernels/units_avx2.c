/* Products of the formats in units.h. A unit of eight rows is unpacked once for up to 64 tokens; the dot products of
 * eight rows with 16 activations then come out as eight exact integers, as in avx2.c. */
#if defined(__x86_64__)
#include <immintrin.h> /* before the pragma: its functions carry their own targets */
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include "units.h"

#define INLINE MER_UNIT_INLINE
#define ROWS 8
#define STRIP 64

/* 16 weights of two rows side by side. */
INLINE __m256i load_pair(const int8_t *low, const int8_t *high) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)low)),
                                   _mm_loadu_si128((const __m128i *)high), 1);
}

/* Four products of each 32 bits, exact for all of -127..127 (with -128 on one side). */
INLINE __m256i fours(__m256i w, __m256i q) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(q, w));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

INLINE __m256i sum_halves(__m256i a, __m256i b) {
    return _mm256_add_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
}

INLINE __m256i sum_pairs(__m256i a, __m256i b) {
    const __m256 x = _mm256_castsi256_ps(a), y = _mm256_castsi256_ps(b);
    return _mm256_add_epi32(_mm256_castps_si256(_mm256_shuffle_ps(x, y, 0x88)),
                            _mm256_castps_si256(_mm256_shuffle_ps(x, y, 0xdd)));
}

/* Sums over 16 columns, and 16 more where `columns` is 32. Row p is in the lower halves, row p + 4 in the upper. */
INLINE __m256 dot(const __m256i *w, const int8_t *q, const int columns) {
    const __m256i first = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)q));
    __m256i s[4];
    for (int p = 0; p < 4; p++) s[p] = fours(w[p], first);
    if (columns == 32) {
        const __m256i second = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(q + 16)));
        for (int p = 0; p < 4; p++) s[p] = _mm256_add_epi32(s[p], fours(w[4 + p], second));
    }
    return _mm256_cvtepi32_ps(sum_pairs(sum_halves(s[0], s[1]), sum_halves(s[2], s[3])));
}

INLINE int32_t sum16(const int8_t *q) {
    const __m128i both = _mm_sad_epu8(_mm_xor_si128(_mm_loadu_si128((const __m128i *)q), _mm_set1_epi8(-128)),
                                      _mm_setzero_si128());
    return _mm_cvtsi128_si32(both) + _mm_extract_epi16(both, 4) - 16 * 128;
}

INLINE __m256 across_rows(const float *first) {
    const __m256i at = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
                                          _mm256_set1_epi32((int)(sizeof(mer_unit) / sizeof(float))));
    return _mm256_i32gather_ps(first, at, 4);
}

INLINE void store_rows(float *y, __m256 v, long n) {
    float lanes[ROWS];
    _mm256_storeu_ps(lanes, v);
    memcpy(y, lanes, (size_t)(n < ROWS ? n : ROWS) * sizeof *y);
}

INLINE void add_unit(const mer_unit *u, const mer_act_q8 *a, long n_tok, long column, const int unit, const int group,
                     const int minima, __m256 *acc) {
    for (int g = 0; g < unit / group; g++) {
        const __m256 d = across_rows(&u[0].d[g]);
        const __m256 m = minima ? across_rows(&u[0].m[g]) : _mm256_setzero_ps();
        __m256i w[8];
        for (int p = 0; p < 4; p++) {
            w[p] = load_pair(u[p].q + g * group, u[p + 4].q + g * group);
            if (group == 32) w[4 + p] = load_pair(u[p].q + g * 32 + 16, u[p + 4].q + g * 32 + 16);
        }
        const long at = column + g * group;
        for (long t = 0; t < n_tok; t++) {
            const int8_t *const q = a[t].q + at;
            const float ad = a[t].d[at / 32];
            const __m256 scale = _mm256_mul_ps(d, _mm256_set1_ps(ad));
            acc[t] = _mm256_add_ps(acc[t], _mm256_mul_ps(scale, dot(w, q, group)));
            if (minima) {
                const float sum = group == 32 ? a[t].dsum[at / 32] : ad * (float)sum16(q);
                acc[t] = _mm256_sub_ps(acc[t], _mm256_mul_ps(m, _mm256_set1_ps(sum)));
            }
        }
    }
}

#define UNIT_MATMUL(NAME, ID, UNIT, GROUP, MINIMA)                                                               \
    void mer_avx2_matmul_##NAME(const void *w, long cols, long r0, long r1, const void *const *acts, long n_tok, \
                                float *y, long y_stride) {                                                       \
        const size_t bytes = mer_row_bytes(ID, cols), unit_bytes = mer_row_bytes(ID, UNIT);                      \
        for (long t0 = 0; t0 < n_tok; t0 += STRIP) {                                                             \
            const long n = n_tok - t0 < STRIP ? n_tok - t0 : STRIP;                                              \
            mer_act_q8 a[STRIP];                                                                                 \
            for (long t = 0; t < n; t++) a[t] = mer_act_view(acts[t0 + t], cols);                                \
            for (long r = r0; r < r1; r += ROWS) {                                                               \
                __m256 acc[STRIP];                                                                               \
                for (long t = 0; t < n; t++) acc[t] = _mm256_setzero_ps();                                       \
                for (long b = 0; b < cols / UNIT; b++) {                                                         \
                    mer_unit u[ROWS];                                                                            \
                    for (long i = 0; i < ROWS; i++) {                                                            \
                        const size_t row = (size_t)(r + i < r1 ? r + i : r1 - 1);                                \
                        mer_unit_##NAME((const uint8_t *)w + row * bytes + (size_t)b * unit_bytes, &u[i]);       \
                    }                                                                                            \
                    add_unit(u, a, n, b * UNIT, UNIT, GROUP, MINIMA, acc);                                       \
                }                                                                                                \
                for (long t = 0; t < n; t++) store_rows(y + (t0 + t) * y_stride + r, acc[t], r1 - r);            \
            }                                                                                                    \
        }                                                                                                        \
    }

MER_UNIT_FORMATS(UNIT_MATMUL)

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
