/* Products with blocks in AVX2: eight rows at a time. */
#if defined(__x86_64__)
#include <immintrin.h> /* before the pragma: its functions carry their own targets */
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include "ahead.h"
#include "products.h"

#define INLINE static inline __attribute__((always_inline))
#define ROWS 8
#define V(NAME) _mm256_##NAME
#define FUNCTION(NAME) mer_avx2_##NAME
#define AS_FLOATS(X) _mm256_castsi256_ps(X)
#define SIGN_SHIFT 0 /* weights with a sign are multiplied as they are */

typedef __m256i vec;
typedef __m256 vecf;

/* A short group of rows repeats its last one. */
typedef struct {
    const char *at[ROWS];
} rows;

INLINE rows open_rows(const char *w, size_t bytes, long n) {
    rows row;
    for (long i = 0; i < ROWS; i++) row.at[i] = w + (size_t)(i < n ? i : n - 1) * bytes;
    return row;
}

INLINE const char *first_row(const rows *row) { return row->at[0]; }

INLINE void store_rows(float *y, vecf v, long n) {
    if (n >= ROWS) {
        _mm256_storeu_ps(y, v);
        return;
    }
    float lanes[ROWS];
    _mm256_storeu_ps(lanes, v);
    memcpy(y, lanes, (size_t)n * sizeof *y);
}

/* 16 bytes of each row: lane r of out[k] holds bytes 4 k to 4 k + 3 of row r. */
INLINE void load_lanes(const rows *row, size_t at, vec out[4]) {
    for (int p = 0; p < 4; p++) {
        const __m128i low = _mm_loadu_si128((const __m128i *)(row->at[p] + at));
        const __m128i high = _mm_loadu_si128((const __m128i *)(row->at[p + 4] + at));
        out[p] = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
    }
    const vec t0 = _mm256_unpacklo_epi32(out[0], out[1]), t1 = _mm256_unpacklo_epi32(out[2], out[3]);
    const vec t2 = _mm256_unpackhi_epi32(out[0], out[1]), t3 = _mm256_unpackhi_epi32(out[2], out[3]);
    out[0] = _mm256_unpacklo_epi64(t0, t1);
    out[1] = _mm256_unpackhi_epi64(t0, t1);
    out[2] = _mm256_unpacklo_epi64(t2, t3);
    out[3] = _mm256_unpackhi_epi64(t2, t3);
}

/* The F16 in the lower half of each lane, the upper one being zero. */
INLINE vecf halves_to_floats(vec x) {
    const vec packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(x, x), 0x08);
    return _mm256_cvtph_ps(_mm256_castsi256_si128(packed));
}

INLINE vec table16(const int8_t *table) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
}

INLINE vec where_bits(vec x, vec bits, const int value) {
    return _mm256_cmpeq_epi8(x & bits, bits) & _mm256_set1_epi8((char)value);
}

INLINE vec with_sign(vec w) { return w; }

/* Sums of the products of 4 n columns. `most`: of how many products of two neighbours the sum fits 16 bits; 0: the
 * weights have a sign, and are -127 at the least. */
INLINE vec dot(const vec *w, const int8_t *q, const int n, const int most) {
    const vec one = _mm256_set1_epi16(1);
    vec sum = _mm256_setzero_si256();
    for (int k = 0, together; k < n; k += together) {
        together = most > n ? n : most ? most : 1;
        vec pairs = _mm256_setzero_si256();
        for (int i = k; i < k + together; i++) {
            int four;
            memcpy(&four, q + 4 * i, 4);
            const vec x = _mm256_set1_epi32(four);
            const vec two = most ? _mm256_maddubs_epi16(w[i], x)
                                 : _mm256_maddubs_epi16(_mm256_abs_epi8(w[i]), _mm256_sign_epi8(x, w[i]));
            pairs = i == k ? two : _mm256_add_epi16(pairs, two);
        }
        const vec fours = _mm256_madd_epi16(pairs, one);
        sum = k == 0 ? fours : _mm256_add_epi32(sum, fours);
    }
    return sum;
}

#include "lanes.h"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
