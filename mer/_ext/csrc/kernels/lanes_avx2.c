/* Products with blocks in AVX2: eight rows at a time. */
#if defined(__x86_64__)
#include <immintrin.h> /* before the pragma: its functions carry their own targets */
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include "rows256.h"

#define FUNCTION(NAME) mer_avx2_##NAME
#define SIGN_SHIFT 0 /* weights with a sign are multiplied as they are */
/* There are sixteen registers: where a block's products take one sum of 16 bits a token, it has eight; else four. */
#define TILE(MOST) (TOKENS == 8 && (MOST) != 8 ? 4 : TOKENS)

/* Compilers add up products in an order of their own, for which there are too few registers. */
#define IN_ORDER(X) __asm__("" : "+x"(X))

INLINE vec with_sign(vec w) { return w; }

/* Adds to n_tok sums the products of 4 n columns from q[t] + at on. `most`: of how many products of two neighbours the
 * sum fits 16 bits; 0: the weights have a sign, and are -127 at the least. */
INLINE void dots(const int n_tok, const vec *w, const int8_t *const *q, const int at, const int n, const int most,
                 vec *sum) {
    const vec one = _mm256_set1_epi16(1);
    const int together = most > n ? n : most ? most : 1;
    UNROLL for (int k = 0; k < n; k += together) {
        vec pairs[TOKENS];
        UNROLL for (int i = k; i < k + together; i++) {
            const vec wi = w[i];
            const vec ab = most ? wi : _mm256_abs_epi8(wi);
            UNROLL for (int t = 0; t < n_tok; t++) {
                const vec x = broadcast4(q[t] + at + 4 * i);
                const vec two = most ? _mm256_maddubs_epi16(wi, x)
                                     : _mm256_maddubs_epi16(ab, _mm256_sign_epi8(x, wi));
                pairs[t] = i == k ? two : _mm256_add_epi16(pairs[t], two);
                IN_ORDER(pairs[t]);
            }
        }
        UNROLL for (int t = 0; t < n_tok; t++) {
            sum[t] = _mm256_add_epi32(sum[t], _mm256_madd_epi16(pairs[t], one));
            IN_ORDER(sum[t]);
        }
    }
}

/* Products of 32 columns of rows beside each other: sums of neighbours, of rows p and p + 4 in of[p]. They have 16 bits
 * as long as `most` says that they may. */
typedef struct {
    vec of[4];
} sums;

INLINE vec widened(vec x) { return _mm256_madd_epi16(x, _mm256_set1_epi16(1)); }

/* Adds the products of 16 columns. */
INLINE void multiply(sums *s, const vec w[4], const int8_t *q, const int most) {
    const vec x = table16(q);
    for (int p = 0; p < 4; p++) {
        const vec two = most ? _mm256_maddubs_epi16(w[p], x)
                             : _mm256_maddubs_epi16(_mm256_abs_epi8(w[p]), _mm256_sign_epi8(x, w[p]));
        s->of[p] = most >= 2 ? _mm256_add_epi16(s->of[p], two) : _mm256_add_epi32(s->of[p], widened(two));
    }
}

INLINE vec fold(const sums *s, const int most) {
    const vec *const of = s->of;
    if (most < 2)
        return FOLD_32(_mm256_add_epi32, FOLD_64(_mm256_add_epi32, of[0], of[1]),
                       FOLD_64(_mm256_add_epi32, of[2], of[3]));
    const vec a = FOLD_64(_mm256_add_epi16, of[0], of[1]), b = FOLD_64(_mm256_add_epi16, of[2], of[3]);
    if (most < 8) return FOLD_32(_mm256_add_epi32, widened(a), widened(b)); /* 4 at the least */
    return widened(FOLD_32(_mm256_add_epi16, a, b));
}

#include "lanes.h"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
