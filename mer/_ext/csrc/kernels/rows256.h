/* Eight rows of weights in AVX registers, one row a lane: what lanes_avx2.c and lanes_avxvnni.c have in common. Included
 * behind the pragma that sets the target. */
#ifndef MER_ROWS256_H
#define MER_ROWS256_H

#include "ahead.h"
#include "products.h"

#define INLINE static inline __attribute__((always_inline))
#define ROWS 8
#define V(NAME) _mm256_##NAME
#define AS_FLOATS(X) _mm256_castsi256_ps(X)
#ifndef TOKENS
#define TOKENS 8 /* with less this compiles faster */
#endif

typedef __m256i vec;
typedef __m256 vecf;

/* Eight rows as two runs of four, `step` bytes apart: few registers address them all. Where run i starts: a short
 * group's second run overlaps the first, which gives the same bytes twice; with one or two rows a run is one row. */
typedef struct {
    const char *run[2];
    size_t step;
} rows;

INLINE long group_rows(long left) { return left >= ROWS ? ROWS : left == 3 ? 2 : left; }

INLINE long run_start(long n, int i) { return i ? (n < 4 ? n - 1 : n - 4) : 0; }

INLINE rows open_rows(const char *w, size_t bytes, long n) {
    rows row = {.step = n < 4 ? 0 : bytes};
    for (int i = 0; i < 2; i++) row.run[i] = w + (size_t)run_start(n, i) * bytes;
    return row;
}

INLINE const char *row_at(const rows *row, int i) { return row->run[i / 4] + (size_t)(i % 4) * row->step; }

INLINE void store_rows(float *y, vecf v, long n) {
    if (n >= ROWS) {
        _mm256_storeu_ps(y, v);
        return;
    }
    float lanes[ROWS];
    _mm256_storeu_ps(lanes, v);
    for (int i = 0; i < 2; i++) memcpy(y + run_start(n, i), lanes + 4 * i, (n < 4 ? 1 : 4) * sizeof *y);
}

/* 16 bytes of rows p and p + 4 beside each other in out[p]. */
INLINE void load_beside(const rows *row, size_t at, vec out[4]) {
    for (int p = 0; p < 4; p++) {
        const __m128i low = _mm_loadu_si128((const __m128i *)(row_at(row, p) + at));
        const __m128i high = _mm_loadu_si128((const __m128i *)(row_at(row, p + 4) + at));
        out[p] = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
    }
}

/* Lane r of out[k] then holds bytes 4 k to 4 k + 3 of row r. */
INLINE void turn(vec out[4]) {
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

/* The F16 at `at` and 18 bytes on, of each row. Reads 32 bytes. */
INLINE void two_scales(const rows *row, size_t at, vecf *first, vecf *second) {
    vec r[ROWS];
    for (int i = 0; i < ROWS; i++) r[i] = _mm256_loadu_si256((const vec *)(row_at(row, i) + at));
    const vec r03 = _mm256_unpacklo_epi32(_mm256_unpacklo_epi16(r[0], r[1]), _mm256_unpacklo_epi16(r[2], r[3]));
    const vec r47 = _mm256_unpacklo_epi32(_mm256_unpacklo_epi16(r[4], r[5]), _mm256_unpacklo_epi16(r[6], r[7]));
    const vec both = _mm256_blend_epi32(_mm256_unpacklo_epi64(r03, r47), _mm256_unpackhi_epi64(r03, r47), 0xf0);
    *first = _mm256_cvtph_ps(_mm256_castsi256_si128(both));
    *second = _mm256_cvtph_ps(_mm256_extracti128_si256(both, 1));
}

INLINE vec table16(const int8_t *table) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
}

INLINE vec where_bits(vec x, vec bits, const int value) {
    return _mm256_cmpeq_epi8(x & bits, bits) & _mm256_set1_epi8((char)value);
}

INLINE vec zeros(void) { return _mm256_setzero_si256(); }

INLINE vec broadcast4(const int8_t *p) {
    int four;
    memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
}

/* Within each half: sums of a's 64-bit parts, then of b's. Here and below shuffles and an addition, not
 * the horizontal add, which many CPUs take two cycles over. */
#define FOLD_64(ADD, a, b) ADD(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b))

INLINE vec pick_32(vec a, vec b, const int odd) {
    const __m256 x = _mm256_castsi256_ps(a), y = _mm256_castsi256_ps(b);
    return _mm256_castps_si256(odd ? _mm256_shuffle_ps(x, y, 0xdd) : _mm256_shuffle_ps(x, y, 0x88));
}

/* Within each half: sums of a's neighbouring 32-bit parts, then of b's. */
#define FOLD_32(ADD, a, b) ADD(pick_32(a, b, 0), pick_32(a, b, 1))

#endif
