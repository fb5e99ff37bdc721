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

INLINE vec add_products(vec sum, vec w, const int8_t *four) { return dot4(sum, w, broadcast4(four)); }

#include "dots.h"

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
