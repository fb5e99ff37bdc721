/* F16 to floats by the CPU's own instruction. Apart, because the compiler's clones of a function have one source, and
 * its vectors of _Float16 are converted one by one by GCC 12. */
#include "kv.h"

void mer_widen_portable(const uint16_t *h, long n, float *to) {
    for (long i = 0; i < n; i++) to[i] = half_to_float(h[i]);
}

#if defined(__x86_64__)
#include <immintrin.h>

__attribute__((target("avx,f16c"))) void mer_widen_f16c(const uint16_t *h, long n, float *to) {
    for (long i = 0; i < n; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(h + i))));
}

__attribute__((target("avx512f"))) void mer_widen_avx512(const uint16_t *h, long n, float *to) {
    for (long i = 0; i < n; i += 16)
        _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(h + i))));
}

void mer_widen(const uint16_t *h, long n, float *to) {
    if (__builtin_cpu_supports("avx512f"))
        mer_widen_avx512(h, n, to);
    else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"))
        mer_widen_f16c(h, n, to);
    else
        mer_widen_portable(h, n, to);
}
#else
void mer_widen(const uint16_t *h, long n, float *to) { mer_widen_portable(h, n, to); }
#endif
