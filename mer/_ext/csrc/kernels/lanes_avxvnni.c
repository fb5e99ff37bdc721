/* Products with blocks in AVX2 with the byte products that AVX-VNNI adds: eight rows at a time. CPUs have it that have no
 * AVX-512, such as Intel's from Alder Lake on. */
#if defined(__x86_64__)
#include <immintrin.h> /* before the pragma: its functions carry their own targets */
/* MER_DOT4 names a header that has dot4() in C (tests/soft_dot4.h), of which compilers make no such instruction then. */
#ifdef MER_DOT4
#include MER_DOT4
#define TARGET "avx2,fma,f16c"
#else
#define dot4 _mm256_dpbusd_avx_epi32
#define TARGET "avx2,fma,f16c,avxvnni"
#endif
#define TEXT(X) #X
#define PRAGMA(X) _Pragma(TEXT(X))
#ifdef __clang__
#pragma clang attribute push(__attribute__((target(TARGET))), apply_to = function)
#else
PRAGMA(GCC target(TARGET))
#endif
#include "rows256.h"

#define FUNCTION(NAME) mer_avxvnni_##NAME
#define SIGN_SHIFT 7 /* a byte product needs one factor without sign: 128 is added */
#define TILE(MOST) TOKENS

INLINE vec with_sign(vec w) { return w ^ _mm256_set1_epi8(-128); }

/* Adds to n_tok sums the products of 4 n columns from q[t] + at on. An addition takes five cycles, so that few tokens
 * need two chains each. `most` is of no meaning here. */
INLINE void dots(const int n_tok, const vec *w, const int8_t *const *q, const int at, const int n, const int most,
                 vec *sum) {
    (void)most;
    const int chains = n_tok > 4 ? 1 : 2;
    vec other[TOKENS];
    UNROLL for (int t = 0; t < n_tok; t++) other[t] = zeros();
    UNROLL for (int k = 0; k < n; k++)
        UNROLL for (int t = 0; t < n_tok; t++) {
            vec *const to = k % chains ? other : sum;
            to[t] = dot4(to[t], w[k], broadcast4(q[t] + at + 4 * k));
        }
    if (chains == 2) {
        UNROLL for (int t = 0; t < n_tok; t++) sum[t] = _mm256_add_epi32(sum[t], other[t]);
    }
}

/* Products of 32 columns of rows beside each other: sums of neighbours, of rows p and p + 4 in of[p]. */
typedef struct {
    vec of[4];
} sums;

/* Adds the products of 16 columns. */
INLINE void multiply(sums *s, const vec w[4], const int8_t *q, const int most) {
    (void)most;
    for (int p = 0; p < 4; p++) s->of[p] = dot4(s->of[p], w[p], table16(q));
}

INLINE vec fold(const sums *s, const int most) {
    (void)most;
    return FOLD_32(_mm256_add_epi32, FOLD_64(_mm256_add_epi32, s->of[0], s->of[1]),
                   FOLD_64(_mm256_add_epi32, s->of[2], s->of[3]));
}

#include "lanes.h"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
