/* F16 and the codes of Q8_0 to floats by the CPU's own instructions. Apart, because the compiler's clones of a function have
 * one source, and its vectors of _Float16 and of bytes are converted one by one by GCC 12. */
#include "kv.h"

void mer_widen_portable(const uint16_t *h, long n, float *to) {
    for (long i = 0; i < n; i++) to[i] = half_to_float(h[i]);
}

static long group_end(long begin, long dim) { return begin + MER_KV_GROUP < dim ? begin + MER_KV_GROUP : dim; }

void mer_widen_codes_portable(const int8_t *q, const uint16_t *scales, long dim, int by_element, float *to) {
    const long groups = (dim + MER_KV_GROUP - 1) / MER_KV_GROUP;
    for (long i = 0; i < MER_KV_BLOCK; i++)
        for (long d = 0; d < dim; d++) {
            const long g = d / MER_KV_GROUP, at = by_element ? d * MER_KV_BLOCK + i : i * dim + d;
            to[at] = (float)q[at] * half_to_float(scales[by_element ? g * MER_KV_BLOCK + i : i * groups + g]);
        }
}

#if defined(__x86_64__)
#include <immintrin.h>

#define CODES_8(Q) _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(Q))))
#define CODES_16(Q) _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(Q))))

__attribute__((target("avx2,f16c"))) void mer_widen_codes_avx2(const int8_t *q, const uint16_t *scales, long dim,
                                                               int by_element, float *to) {
    if (by_element)
        for (long d = 0; d < dim; d++, q += 16, to += 16) {
            const __m128i *const h = (const __m128i *)(scales + d / MER_KV_GROUP * MER_KV_BLOCK);
            _mm256_storeu_ps(to, _mm256_mul_ps(CODES_8(q), _mm256_cvtph_ps(_mm_loadu_si128(h))));
            _mm256_storeu_ps(to + 8, _mm256_mul_ps(CODES_8(q + 8), _mm256_cvtph_ps(_mm_loadu_si128(h + 1))));
        }
    else
        for (long i = 0; i < MER_KV_BLOCK; i++, q += dim, to += dim)
            for (long begin = 0; begin < dim; begin = group_end(begin, dim), scales++) {
                const __m256 scale = _mm256_cvtph_ps(_mm_set1_epi16((short)*scales));
                long d = begin;
                for (; d + 8 <= group_end(begin, dim); d += 8)
                    _mm256_storeu_ps(to + d, _mm256_mul_ps(CODES_8(q + d), scale));
                for (; d < group_end(begin, dim); d++) to[d] = (float)q[d] * _mm256_cvtss_f32(scale);
            }
}

__attribute__((target("avx512f"))) void mer_widen_codes_avx512(const int8_t *q, const uint16_t *scales, long dim,
                                                               int by_element, float *to) {
    if (by_element)
        for (long begin = 0; begin < dim; begin = group_end(begin, dim), scales += MER_KV_BLOCK) {
            const __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)scales));
            for (long d = begin; d < group_end(begin, dim); d++, q += 16, to += 16)
                _mm512_storeu_ps(to, _mm512_mul_ps(CODES_16(q), scale));
        }
    else
        for (long i = 0; i < MER_KV_BLOCK; i++, q += dim, to += dim)
            for (long begin = 0; begin < dim; begin = group_end(begin, dim), scales++) {
                const __m512 scale = _mm512_cvtph_ps(_mm256_set1_epi16((short)*scales));
                long d = begin;
                for (; d + 16 <= group_end(begin, dim); d += 16)
                    _mm512_storeu_ps(to + d, _mm512_mul_ps(CODES_16(q + d), scale));
                for (; d < group_end(begin, dim); d++) to[d] = (float)q[d] * _mm512_cvtss_f32(scale);
            }
}

void mer_widen_codes(const int8_t *q, const uint16_t *scales, long dim, int by_element, float *to) {
    if (__builtin_cpu_supports("avx512f"))
        mer_widen_codes_avx512(q, scales, dim, by_element, to);
    else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"))
        mer_widen_codes_avx2(q, scales, dim, by_element, to);
    else
        mer_widen_codes_portable(q, scales, dim, by_element, to);
}

__attribute__((target("avx,f16c"))) void mer_widen_f16c(const uint16_t *h, long n, float *to) {
    for (long i = 0; i < n; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(h + i))));
}

__attribute__((target("avx512f"))) void mer_widen_avx512(const uint16_t *h, long n, float *to) {
    _Pragma("GCC unroll 4") for (long i = 0; i < n; i += 16)
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
void mer_widen_codes(const int8_t *q, const uint16_t *scales, long dim, int by_element, float *to) {
    mer_widen_codes_portable(q, scales, dim, by_element, to);
}

void mer_widen(const uint16_t *h, long n, float *to) { mer_widen_portable(h, n, to); }
#endif
