/* AVX-512 (F, BW, DQ, VL) with VNNI: floats, and what is not a product. The products with blocks are in
 * lanes_avx512.c.
 *
 * The sixteen lanes are those that avx2.c makes of two registers, so every result has the bytes that AVX2 gives. (The
 * BF16 dot products of some CPUs would round the activations to BF16: not used.) */
#if defined(__x86_64__)
#include <immintrin.h> /* before the pragma: its functions carry their own targets */
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), \
                             apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#endif
#include "ahead.h"
#include "elementwise.h"
#include "products.h"

#define INLINE static inline __attribute__((always_inline))

/* Float formats: element k goes to lane k mod 16; lanes beyond the row's end are zero. */
#define LANES 16

INLINE __m512 load16_floats(int fmt, const char *w, long k, __mmask16 lanes) {
    if (fmt == MER_F32) return _mm512_maskz_loadu_ps(lanes, (const float *)w + k);
    const __m256i h = _mm256_maskz_loadu_epi16(lanes, w + 2 * k);
    if (fmt == MER_F16) return _mm512_cvtph_ps(h);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

/* In the order of avx2.c. */
INLINE float sum_lanes(__m512 v) {
    const __m256 v8 = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 v4 = _mm_add_ps(_mm256_castps256_ps128(v8), _mm256_extractf128_ps(v8, 1));
    const __m128 v2 = _mm_add_ps(v4, _mm_movehl_ps(v4, v4));
    return _mm_cvtss_f32(_mm_add_ss(v2, _mm_movehdup_ps(v2)));
}

INLINE void step_float(int fmt, const char *w, size_t bytes, int n_rows, const void *const *acts, int n_tok, long k,
                       __mmask16 lanes, __m512 acc[4][4]) {
    __m512 v[4];
    for (int i = 0; i < n_rows; i++) v[i] = load16_floats(fmt, w + (size_t)i * bytes, k, lanes);
    for (int t = 0; t < n_tok; t++) {
        const __m512 x = _mm512_maskz_loadu_ps(lanes, (const float *)acts[t] + k);
        for (int i = 0; i < n_rows; i++) acc[i][t] = _mm512_fmadd_ps(v[i], x, acc[i][t]);
    }
}

INLINE void tile_float(int fmt, const char *w, size_t bytes, const mer_ahead *ahead, int n_rows,
                       const void *const *acts, int n_tok, long cols, float *y, long y_stride) {
    const size_t step = (size_t)n_rows * LANES * (fmt == MER_F32 ? 4 : 2);
    __m512 acc[4][4]; /* row, token */
    for (int i = 0; i < n_rows; i++)
        for (int t = 0; t < n_tok; t++) acc[i][t] = _mm512_setzero_ps();
    long k = 0;
    for (; k + LANES <= cols; k += LANES) {
        if (ahead) ahead_step(*ahead, w + (size_t)k / LANES * step, step);
        step_float(fmt, w, bytes, n_rows, acts, n_tok, k, 0xffff, acc);
    }
    if (k < cols) step_float(fmt, w, bytes, n_rows, acts, n_tok, k, (__mmask16)((1u << (cols - k)) - 1), acc);
    for (int i = 0; i < n_rows; i++)
        for (int t = 0; t < n_tok; t++) y[t * y_stride + i] = sum_lanes(acc[i][t]);
}

/* Four rows by one to four tokens, their sums in registers. */
INLINE void group_float(int fmt, const char *w, size_t bytes, const mer_ahead *ahead, int n_rows,
                        const void *const *acts, int n_tok, long cols, float *y, long y_stride) {
    if (n_rows == 4) {
        tile_float(fmt, w, bytes, ahead, 4, acts, n_tok, cols, y, y_stride);
        return;
    }
    for (int i = 0; i < n_rows; i++)
        tile_float(fmt, w + (size_t)i * bytes, bytes, NULL, 1, acts, n_tok, cols, y + i, y_stride);
}

#define FLOAT_MATMUL(NAME, FMT)                                                                         \
    static void NAME(const void *w, long cols, long r0, long r1, const void *const *acts, long n_tok,   \
                     float *y, long y_stride) {                                                         \
        const size_t bytes = mer_row_bytes(FMT, cols);                                                  \
        const mer_ahead run = ahead_begin((const char *)w + (size_t)r0 * bytes, 4 * bytes);             \
        for (long r = r0; r < r1; r += 4) {                                                             \
            const int n = (int)(r1 - r < 4 ? r1 - r : 4);                                               \
            const char *const row = (const char *)w + (size_t)r * bytes;                                \
            for (long t = 0; t < n_tok; t += 4) {                                                       \
                const mer_ahead *const ahead = t == 0 ? &run : NULL;                                    \
                const void *const *const x = acts + t;                                                  \
                float *const out = y + t * y_stride + r;                                                \
                switch (n_tok - t) {                                                                    \
                case 1: group_float(FMT, row, bytes, ahead, n, x, 1, cols, out, y_stride); break;       \
                case 2: group_float(FMT, row, bytes, ahead, n, x, 2, cols, out, y_stride); break;       \
                case 3: group_float(FMT, row, bytes, ahead, n, x, 3, cols, out, y_stride); break;       \
                default: group_float(FMT, row, bytes, ahead, n, x, 4, cols, out, y_stride);             \
                }                                                                                       \
            }                                                                                           \
        }                                                                                               \
    }

FLOAT_MATMUL(matmul_f32, MER_F32)
FLOAT_MATMUL(matmul_f16, MER_F16)
FLOAT_MATMUL(matmul_bf16, MER_BF16)

static void quantise(const float *x, void *act, long cols) {
    const mer_act_q8 a = mer_act_view(act, cols);
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    for (long b = 0; b < cols / MER_ACT_BLOCK; b++, x += MER_ACT_BLOCK) {
        int8_t *const q = (int8_t *)a.q + b * MER_ACT_BLOCK;
        const __m512 v0 = _mm512_loadu_ps(x), v1 = _mm512_loadu_ps(x + 16);
        const __m512i m0 = _mm512_and_si512(_mm512_castps_si512(v0), magnitude);
        const __m512i m1 = _mm512_and_si512(_mm512_castps_si512(v1), magnitude);
        const uint32_t bits = _mm512_reduce_max_epu32(_mm512_max_epu32(m0, m1));
        const float amax = mer_bits_f32(bits);
        if (bits >= 0x7f800000u || amax < MER_ACT_TINY) {
            mer_quantise_block(x, &a, b);
            continue;
        }
        const __m512 scale = _mm512_set1_ps(127.0f / amax);
        const __m512i n0 = _mm512_cvtps_epi32(_mm512_mul_ps(v0, scale));
        const __m512i n1 = _mm512_cvtps_epi32(_mm512_mul_ps(v1, scale));
        _mm_storeu_si128((__m128i *)q, _mm512_cvtepi32_epi8(n0));
        _mm_storeu_si128((__m128i *)(q + 16), _mm512_cvtepi32_epi8(n1));
        mer_store_scale(&a, b, amax, _mm512_reduce_add_epi32(n0), _mm512_reduce_add_epi32(n1));
    }
}

/* mer_exp1, operation by operation. */
INLINE __m512 exp16(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(EXP_LO), x);
    x = _mm512_min_ps(_mm512_set1_ps(EXP_HI), x);
    const __m512i n = _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(EXP_LOG2E)));
    const __m512 nf = _mm512_cvtepi32_ps(n);
    __m512 r = _mm512_sub_ps(x, _mm512_mul_ps(nf, _mm512_set1_ps(EXP_LN2_HI)));
    r = _mm512_sub_ps(r, _mm512_mul_ps(nf, _mm512_set1_ps(EXP_LN2_LO)));
    __m512 p = _mm512_set1_ps(EXP_C7);
    p = _mm512_add_ps(_mm512_mul_ps(p, r), _mm512_set1_ps(EXP_C6));
    p = _mm512_add_ps(_mm512_mul_ps(p, r), _mm512_set1_ps(EXP_C5));
    p = _mm512_add_ps(_mm512_mul_ps(p, r), _mm512_set1_ps(EXP_C4));
    p = _mm512_add_ps(_mm512_mul_ps(p, r), _mm512_set1_ps(EXP_C3));
    p = _mm512_add_ps(_mm512_mul_ps(p, r), _mm512_set1_ps(EXP_C2));
    p = _mm512_add_ps(_mm512_mul_ps(p, _mm512_mul_ps(r, r)), r);
    p = _mm512_add_ps(p, _mm512_set1_ps(1.0f));
    const __m512i bias = _mm512_set1_epi32(127), half = _mm512_srai_epi32(n, 1);
    const __m512i rest = _mm512_sub_epi32(n, half);
    p = _mm512_mul_ps(p, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(half, bias), 23)));
    return _mm512_mul_ps(p, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(rest, bias), 23)));
}

static void swiglu(const float *gate, const float *up, float *h, long n) {
    for (long i = 0; i < n; i += LANES) {
        const __mmask16 lanes = (__mmask16)(n - i < LANES ? (1u << (n - i)) - 1 : 0xffff);
        const __m512 g = _mm512_maskz_loadu_ps(lanes, gate + i), u = _mm512_maskz_loadu_ps(lanes, up + i);
        const __m512 below = _mm512_add_ps(_mm512_set1_ps(1.0f), exp16(_mm512_xor_ps(g, _mm512_set1_ps(-0.0f))));
        _mm512_mask_storeu_ps(h + i, lanes, _mm512_mul_ps(_mm512_div_ps(g, below), u));
    }
}

static void geglu(const float *gate, const float *up, float *h, long n) {
    const __m512 one = _mm512_set1_ps(1.0f), c1 = _mm512_set1_ps(GELU_1), c3 = _mm512_set1_ps(GELU_3);
    for (long i = 0; i < n; i += LANES) {
        const __mmask16 lanes = (__mmask16)(n - i < LANES ? (1u << (n - i)) - 1 : 0xffff);
        const __m512 g = _mm512_maskz_loadu_ps(lanes, gate + i), u = _mm512_maskz_loadu_ps(lanes, up + i);
        const __m512 y = _mm512_mul_ps(g, _mm512_add_ps(c1, _mm512_mul_ps(c3, _mm512_mul_ps(g, g))));
        const __m512 below = _mm512_add_ps(one, exp16(_mm512_xor_ps(y, _mm512_set1_ps(-0.0f))));
        _mm512_mask_storeu_ps(h + i, lanes, _mm512_mul_ps(_mm512_div_ps(g, below), u));
    }
}

static void clamped_swiglu(const float *gate, const float *up, float *h, long n, float alpha, float limit, float added) {
    const __m512 one = _mm512_set1_ps(1.0f), high = _mm512_set1_ps(limit), low = _mm512_set1_ps(-limit);
    for (long i = 0; i < n; i += LANES) {
        const __mmask16 lanes = (__mmask16)(n - i < LANES ? (1u << (n - i)) - 1 : 0xffff);
        const __m512 g = _mm512_min_ps(high, _mm512_maskz_loadu_ps(lanes, gate + i));
        const __m512 u = _mm512_max_ps(low, _mm512_min_ps(high, _mm512_maskz_loadu_ps(lanes, up + i)));
        const __m512 turned = _mm512_xor_ps(_mm512_mul_ps(_mm512_set1_ps(alpha), g), _mm512_set1_ps(-0.0f));
        const __m512 part = _mm512_div_ps(g, _mm512_add_ps(one, exp16(turned)));
        _mm512_mask_storeu_ps(h + i, lanes, _mm512_mul_ps(part, _mm512_add_ps(u, _mm512_set1_ps(added))));
    }
}

const mer_isa mer_isa_avx512 = {
    .name = "avx512",
    .quantise = quantise,
    .swiglu = swiglu,
    .geglu = geglu,
    .clamped_swiglu = clamped_swiglu,
    .matmul =
        {
            [MER_F32] = matmul_f32,
            [MER_F16] = matmul_f16,
            [MER_BF16] = matmul_bf16,
            MER_BLOCK_FORMATS(MER_AVX512_ENTRY)
        },
};
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
