/* Sixteen rows of weights in AVX-512 registers, one row a lane: what avx512.c and amx.c have in common. Included
 * behind the pragma that sets the target. */
#ifndef MER_ROWS512_H
#define MER_ROWS512_H

#include "../mer_formats.h"

#define INLINE static inline __attribute__((always_inline))
#define ROWS 16

/* Sixteen rows as four runs of four, `step` bytes apart: six registers address them all. */
typedef struct {
    const char *run[4];
    size_t step;
} rows16;

INLINE __m128i load128(const char *p) { return _mm_loadu_si128((const __m128i *)p); }

INLINE const char *row_at(const rows16 *row, int i) { return row->run[i / 4] + (size_t)(i % 4) * row->step; }

/* 16 bytes of rows q, q + 4, q + 8 and q + 12, each in its quarter. */
INLINE __m512i load_rows(const rows16 *row, int q, size_t at) {
    at += (size_t)q * row->step;
    __m512i x = _mm512_castsi128_si512(load128(row->run[0] + at));
    x = _mm512_mask_broadcast_i32x4(x, 0x00f0, load128(row->run[1] + at));
    x = _mm512_mask_broadcast_i32x4(x, 0x0f00, load128(row->run[2] + at));
    return _mm512_mask_broadcast_i32x4(x, 0xf000, load128(row->run[3] + at));
}

/* Within each quarter: lane i of w[k] becomes lane k of w[i]. */
INLINE void turn(__m512i w[4]) {
    const __m512i t0 = _mm512_unpacklo_epi32(w[0], w[1]), t1 = _mm512_unpacklo_epi32(w[2], w[3]);
    const __m512i t2 = _mm512_unpackhi_epi32(w[0], w[1]), t3 = _mm512_unpackhi_epi32(w[2], w[3]);
    w[0] = _mm512_unpacklo_epi64(t0, t1);
    w[1] = _mm512_unpackhi_epi64(t0, t1);
    w[2] = _mm512_unpacklo_epi64(t2, t3);
    w[3] = _mm512_unpackhi_epi64(t2, t3);
}

INLINE void load_beside(const rows16 *row, size_t at, __m512i out[4]) {
    for (int p = 0; p < 4; p++) out[p] = load_rows(row, p, at);
}

/* 16 bytes of each row: lane r of out[k] holds bytes 4 k to 4 k + 3 of row r. */
INLINE void load_lanes(const rows16 *row, size_t at, __m512i out[4]) {
    for (int p = 0; p < 4; p++) out[p] = load_rows(row, p, at);
    turn(out);
}

/* The F16 at the same offset of eight rows from row i on. */
INLINE __m128i load_halves(const rows16 *row, int i, size_t at) {
    uint16_t h[8];
    for (int k = 0; k < 8; k++) memcpy(h + k, row_at(row, i + k) + at, 2);
    return _mm_setr_epi16((short)h[0], (short)h[1], (short)h[2], (short)h[3], (short)h[4], (short)h[5], (short)h[6],
                          (short)h[7]);
}

INLINE __m512 load_scales(const rows16 *row, size_t at) {
    const __m256i low = _mm256_castsi128_si256(load_halves(row, 0, at));
    return _mm512_cvtph_ps(_mm256_inserti128_si256(low, load_halves(row, 8, at), 1));
}

/* The scales of an MXFP4 block, which is one byte and 16: a register of lanes has its first four. */
INLINE __m512 load_powers(const rows16 *row, size_t at) {
    __m512i w[4];
    load_lanes(row, at, w);
    const __m512i e = _mm512_and_si512(w[0], _mm512_set1_epi32(0xff));
    const __m512i normal = _mm512_slli_epi32(_mm512_sub_epi32(e, _mm512_set1_epi32(1)), 23);
    const __mmask16 tiny = _mm512_cmplt_epi32_mask(e, _mm512_set1_epi32(2));
    return _mm512_castsi512_ps(_mm512_mask_sllv_epi32(normal, tiny, _mm512_set1_epi32(0x00200000), e));
}

/* Where run i of a group of n rows starts. A short group's last run overlaps the one before, which gives the
 * same bytes twice; with less than four rows a run is one row. */
INLINE long run_start(long n, int i) {
    const long start = n < 4 ? i : 4 * i, last = n < 4 ? n - 1 : n - 4;
    return start < last ? start : last;
}

INLINE rows16 open_rows(const char *w, size_t bytes, long n) {
    rows16 row = {.step = n < 4 ? 0 : bytes};
    for (int i = 0; i < 4; i++) row.run[i] = w + (size_t)run_start(n, i) * bytes;
    return row;
}

INLINE void store_rows(float *y, __m512 v, long n) {
    if (n >= ROWS) {
        _mm512_storeu_ps(y, v);
        return;
    }
    float lanes[ROWS];
    _mm512_storeu_ps(lanes, v);
    for (int i = 0; i < 4; i++) memcpy(y + run_start(n, i), lanes + 4 * i, (n < 4 ? 1 : 4) * sizeof *y);
}

#endif
