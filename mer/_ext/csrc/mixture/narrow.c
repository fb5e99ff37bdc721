#include "mer_narrow.h"

#include "mer_formats.h"

enum { PIECE = 256 };

/* As the upper half of a float. */
static inline uint32_t round_bf16(float f) {
    const uint32_t bits = mer_f32_bits(f), rounded = bits + 0x7fffu + (bits >> 16 & 1u);
    return ((int32_t)(bits & 0x7fffffffu) > 0x7f800000 ? bits | 0x400000u : rounded) & 0xffff0000u;
}

/* As the F16C instruction has it, NaNs included. */
static uint16_t to_f16(float f) {
    uint32_t bits = mer_f32_bits(f);
    const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000u);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | (bits >> 13 & 0x3ffu));
    if (bits >= 0x47800000u) return sign | 0x7c00u;
    if (bits < 0x38800000u) /* subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits */
        return (uint16_t)(sign | (mer_f32_bits(mer_bits_f32(bits) + 0.5f) - 0x3f000000u));
    bits += 0xfffu + (bits >> 13 & 1u); /* from 65520 on this carries into infinity */
    return (uint16_t)(sign | (bits - 0x38000000u) >> 13);
}

static void narrow_f16(const float *x, long n, uint16_t *to) {
    for (long i = 0; i < n; i++) to[i] = to_f16(x[i]);
}

static void widen_f16(const uint16_t *h, long n, float *to) {
    for (long i = 0; i < n; i++) to[i] = mer_f16_to_f32(h[i]);
}

#if defined(__x86_64__)
#include <immintrin.h>

__attribute__((target("avx,f16c"))) static long narrow_f16c(const float *x, long n, uint16_t *to) {
    long i = 0;
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i *)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
    return i;
}

__attribute__((target("avx,f16c"))) static long widen_f16c(const uint16_t *h, long n, float *to) {
    long i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(h + i))));
    return i;
}

static int has_f16c(void) { return __builtin_cpu_supports("avx") && __builtin_cpu_supports("f16c"); }
#else
static long narrow_f16c(const float *x, long n, uint16_t *to) { return (void)x, (void)n, (void)to, 0; }
static long widen_f16c(const uint16_t *h, long n, float *to) { return (void)h, (void)n, (void)to, 0; }
static int has_f16c(void) { return 0; }
#endif

void mer_narrow(int fmt, const float *x, long n, uint16_t *to) {
    if (fmt == MER_BF16) {
        for (long i = 0; i < n; i++) to[i] = (uint16_t)(round_bf16(x[i]) >> 16);
        return;
    }
    const long done = has_f16c() ? narrow_f16c(x, n, to) : 0;
    narrow_f16(x + done, n - done, to + done);
}

void mer_widen_rows(int fmt, const uint16_t *h, long n, float *to) {
    if (fmt == MER_BF16) {
        for (long i = 0; i < n; i++) to[i] = mer_bf16_to_f32(h[i]);
        return;
    }
    const long done = has_f16c() ? widen_f16c(h, n, to) : 0;
    widen_f16(h + done, n - done, to + done);
}

void mer_round(int fmt, const float *x, long n, float *to) {
    uint16_t narrow[PIECE];
    if (fmt == MER_BF16) { /* without the way through 16 bits, for which old processors have no vectors */
        for (long i = 0; i < n; i++) to[i] = mer_bits_f32(round_bf16(x[i]));
        return;
    }
    for (long i = 0; i < n; i += PIECE) {
        const long count = n - i < PIECE ? n - i : PIECE;
        mer_narrow(fmt, x + i, count, narrow);
        mer_widen_rows(fmt, narrow, count, to + i);
    }
}
