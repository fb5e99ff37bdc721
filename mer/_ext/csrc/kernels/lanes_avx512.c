/* Products with blocks in AVX-512 with VNNI: sixteen rows at a time. */
#if defined(__x86_64__)
#include <immintrin.h> /* before the pragma: its functions carry their own targets */
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), \
                             apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#endif
#include "ahead.h"
#include "products.h"
#include "rows512.h"

#define V(NAME) _mm512_##NAME
#define FUNCTION(NAME) mer_avx512_##NAME
#define AS_FLOATS(X) _mm512_castsi512_ps(X)
#ifndef TOKENS
#define TOKENS 8 /* there are 32 registers; with less this compiles faster */
#endif
#define TILE(MOST) TOKENS
#define SIGN_SHIFT 7 /* a byte product needs one factor without sign: 128 is added */

typedef __m512i vec;
typedef __m512 vecf;
typedef rows16 rows;

INLINE long group_rows(long left) { return left < ROWS ? left : ROWS; }

INLINE vecf halves_to_floats(vec x) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x)); }

/* The F16 of eight rows from row i on, at `at` in the lower half and 18 bytes on in the upper one; 32 bytes are read. */
INLINE __m256i two_halves(const rows *row, const int i, size_t at) {
    __m256i r[8];
    for (int k = 0; k < 8; k++) r[k] = _mm256_loadu_si256((const __m256i *)(row_at(row, i + k) + at));
    const __m256i r03 = _mm256_unpacklo_epi32(_mm256_unpacklo_epi16(r[0], r[1]), _mm256_unpacklo_epi16(r[2], r[3]));
    const __m256i r47 = _mm256_unpacklo_epi32(_mm256_unpacklo_epi16(r[4], r[5]), _mm256_unpacklo_epi16(r[6], r[7]));
    return _mm256_blend_epi32(_mm256_unpacklo_epi64(r03, r47), _mm256_unpackhi_epi64(r03, r47), 0xf0);
}

INLINE void two_scales(const rows *row, size_t at, vecf *first, vecf *second) {
    const __m256i low = two_halves(row, 0, at), high = two_halves(row, 8, at);
    *first = _mm512_cvtph_ps(_mm256_permute2x128_si256(low, high, 0x20));
    *second = _mm512_cvtph_ps(_mm256_permute2x128_si256(low, high, 0x31));
}

INLINE vec table16(const int8_t *table) { return _mm512_broadcast_i32x4(load128((const char *)table)); }

INLINE vec where_bits(vec x, vec bits, const int value) {
    return _mm512_maskz_mov_epi8(_mm512_test_epi8_mask(x, bits), _mm512_set1_epi8((char)value));
}

INLINE vec with_sign(vec w) { return w ^ _mm512_set1_epi8(-128); }

INLINE vec zeros(void) { return _mm512_setzero_si512(); }

/* sum + the products with four bytes, which compilers load apart. */
INLINE vec add_products(vec sum, vec w, const int8_t *four) {
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(*(const char (*)[4])four));
    return sum;
}

INLINE vec dot4(vec sum, vec w, vec x) { return _mm512_dpbusd_epi32(sum, w, x); }

#include "dots.h"

INLINE vec fold(sums *s, const int most) {
    (void)most;
    turn(s->of);
    return _mm512_add_epi32(_mm512_add_epi32(s->of[0], s->of[1]), _mm512_add_epi32(s->of[2], s->of[3]));
}

#include "lanes.h"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
