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
#define SIGN_SHIFT 7 /* a byte product needs one factor without sign: 128 is added */

typedef __m512i vec;
typedef __m512 vecf;
typedef rows16 rows;

INLINE const char *first_row(const rows *row) { return row->run[0]; }

INLINE vecf halves_to_floats(vec x) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x)); }

INLINE vec table16(const int8_t *table) { return _mm512_broadcast_i32x4(load128((const char *)table)); }

INLINE vec where_bits(vec x, vec bits, const int value) {
    return _mm512_maskz_mov_epi8(_mm512_test_epi8_mask(x, bits), _mm512_set1_epi8((char)value));
}

INLINE vec with_sign(vec w) { return w ^ _mm512_set1_epi8(-128); }

/* Sums of the products of 4 n columns: two chains, since an addition takes five cycles. `most` is of no meaning here. */
INLINE vec dot(const vec *w, const int8_t *q, const int n, const int most) {
    (void)most;
    vec sum[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    for (int k = 0; k < n; k++) {
        int four;
        memcpy(&four, q + 4 * k, 4);
        sum[k % 2] = _mm512_dpbusd_epi32(sum[k % 2], w[k], _mm512_set1_epi32(four));
    }
    return _mm512_add_epi32(sum[0], sum[1]);
}

#include "lanes.h"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
