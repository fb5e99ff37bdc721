/* AVX2 + FMA + F16C: floats, and what is not a product. The products with blocks are in
 * lanes_avx2.c and lanes_avxvnni.c. */
#if defined(__x86_64__)
#include <immintrin.h> /* before the pragma: its functions carry their own targets */
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include "ahead.h"
#include "elementwise.h"
#include "products.h"

#define INLINE static inline __attribute__((always_inline))

/* Float formats: element k goes to lane k mod 16 (two registers of eight), a row's tail padded with zeros. */
#define LANES 16

INLINE __m256 load8(int fmt, const char *w, long k) {
    if (fmt == MER_F32) return _mm256_loadu_ps((const float *)w + k);
    const __m128i h = _mm_loadu_si128((const __m128i *)(w + 2 * k));
    if (fmt == MER_F16) return _mm256_cvtph_ps(h);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

INLINE float sum_lanes(__m256 lo, __m256 hi) {
    const __m256 v8 = _mm256_add_ps(lo, hi);
    const __m128 v4 = _mm_add_ps(_mm256_castps256_ps128(v8), _mm256_extractf128_ps(v8, 1));
    const __m128 v2 = _mm_add_ps(v4, _mm_movehl_ps(v4, v4));
    return _mm_cvtss_f32(_mm_add_ss(v2, _mm_movehdup_ps(v2)));
}

INLINE void tile_float(int fmt, const char *w, size_t bytes, const mer_ahead *ahead, int n_rows,
                       const void *const *acts, int n_tok, long cols, float *y, long y_stride) {
    const size_t step = (size_t)n_rows * LANES * (fmt == MER_F32 ? 4 : 2);
    __m256 acc[2][4][4]; /* half, row, token */
    for (int i = 0; i < n_rows; i++)
        for (int t = 0; t < n_tok; t++) acc[0][i][t] = acc[1][i][t] = _mm256_setzero_ps();
    long k = 0;
    for (; k + LANES <= cols; k += LANES) {
        if (ahead) ahead_step(*ahead, w + (size_t)k / LANES * step, step);
        for (int half = 0; half < 2; half++) {
            __m256 v[4];
            for (int i = 0; i < n_rows; i++) v[i] = load8(fmt, w + (size_t)i * bytes, k + 8 * half);
            for (int t = 0; t < n_tok; t++) {
                const __m256 x = _mm256_loadu_ps((const float *)acts[t] + k + 8 * half);
                for (int i = 0; i < n_rows; i++) acc[half][i][t] = _mm256_fmadd_ps(v[i], x, acc[half][i][t]);
            }
        }
    }
    if (k < cols)
        for (int i = 0; i < n_rows; i++) {
            char tail[4 * LANES] = {0};
            const size_t element = fmt == MER_F32 ? 4 : 2, rest = (size_t)(cols - k);
            memcpy(tail, w + (size_t)i * bytes + (size_t)k * element, rest * element);
            for (int t = 0; t < n_tok; t++) {
                float x[LANES] = {0};
                memcpy(x, (const float *)acts[t] + k, rest * sizeof *x);
                for (int half = 0; half < 2; half++)
                    acc[half][i][t] = _mm256_fmadd_ps(load8(fmt, tail, 8 * half), _mm256_loadu_ps(x + 8 * half),
                                                      acc[half][i][t]);
            }
        }
    for (int i = 0; i < n_rows; i++)
        for (int t = 0; t < n_tok; t++) y[t * y_stride + i] = sum_lanes(acc[0][i][t], acc[1][i][t]);
}

/* Four rows by one to three tokens: with three, two rows at a time keep their twelve sums in registers. */
INLINE void group_float(int fmt, const char *w, size_t bytes, const mer_ahead *ahead, int n_rows,
                        const void *const *acts, int n_tok, long cols, float *y, long y_stride) {
    const int together = n_tok == 1 ? 4 : 2;
    int i = 0;
    for (; i + together <= n_rows; i += together)
        tile_float(fmt, w + (size_t)i * bytes, bytes, ahead, together, acts, n_tok, cols, y + i, y_stride);
    for (; i < n_rows; i++)
        tile_float(fmt, w + (size_t)i * bytes, bytes, NULL, 1, acts, n_tok, cols, y + i, y_stride);
}

#define FLOAT_MATMUL(NAME, FMT)                                                                         \
    static void NAME(const void *w, long cols, long r0, long r1, const void *const *acts, long n_tok, \
                     float *y, long y_stride) {                                                         \
        const size_t bytes = mer_row_bytes(FMT, cols);                                                  \
        const mer_ahead run = ahead_begin((const char *)w + (size_t)r0 * bytes, 4 * bytes);             \
        for (long r = r0; r < r1; r += 4) {                                                             \
            const int n = (int)(r1 - r < 4 ? r1 - r : 4);                                               \
            const char *const row = (const char *)w + (size_t)r * bytes;                                \
            for (long t = 0; t < n_tok; t += 3) {                                                       \
                const mer_ahead *const ahead = t == 0 ? &run : NULL;                                    \
                float *const out = y + t * y_stride + r;                                                \
                switch (n_tok - t) {                                                                    \
                case 1: group_float(FMT, row, bytes, ahead, n, acts + t, 1, cols, out, 0); break;       \
                case 2: group_float(FMT, row, bytes, ahead, n, acts + t, 2, cols, out, y_stride); break;\
                default: group_float(FMT, row, bytes, ahead, n, acts + t, 3, cols, out, y_stride);      \
                }                                                                                       \
            }                                                                                           \
        }                                                                                               \
    }

FLOAT_MATMUL(matmul_f32, MER_F32)
FLOAT_MATMUL(matmul_f16, MER_F16)
FLOAT_MATMUL(matmul_bf16, MER_BF16)

static void quantise(const float *x, void *act, long cols) {
    const mer_act_q8 a = mer_act_view(act, cols);
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    for (long b = 0; b < cols / MER_ACT_BLOCK; b++, x += MER_ACT_BLOCK) {
        __m256 v[4];
        __m256i top = _mm256_setzero_si256();
        for (int i = 0; i < 4; i++) {
            v[i] = _mm256_loadu_ps(x + 8 * i);
            top = _mm256_max_epu32(top, _mm256_and_si256(_mm256_castps_si256(v[i]), magnitude));
        }
        __m128i m = _mm_max_epu32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
        m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4e));
        m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xb1));
        const uint32_t bits = (uint32_t)_mm_cvtsi128_si32(m);
        const float amax = mer_bits_f32(bits);
        if (bits >= 0x7f800000u || amax < MER_ACT_TINY) {
            mer_quantise_block(x, &a, b);
            continue;
        }
        const __m256 scale = _mm256_set1_ps(127.0f / amax);
        __m256i n[4];
        for (int i = 0; i < 4; i++) n[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], scale));
        __m256i s = _mm256_hadd_epi32(_mm256_add_epi32(n[0], n[1]), _mm256_add_epi32(n[2], n[3]));
        s = _mm256_hadd_epi32(s, s); /* each half has two sums, of a half of either half of the block */
        const __m128i halves = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
        const int32_t first = _mm_cvtsi128_si32(halves), second = _mm_extract_epi32(halves, 1);
        const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(n[0], n[1]), _mm256_packs_epi32(n[2], n[3]));
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        _mm256_storeu_si256((__m256i *)(a.q + b * MER_ACT_BLOCK), _mm256_permutevar8x32_epi32(bytes, order));
        mer_store_scale(&a, b, amax, first, second);
    }
}

/* mer_exp1, operation by operation. */
INLINE __m256 exp8(__m256 x) {
    x = _mm256_max_ps(_mm256_set1_ps(EXP_LO), x);
    x = _mm256_min_ps(_mm256_set1_ps(EXP_HI), x);
    const __m256i n = _mm256_cvtps_epi32(_mm256_mul_ps(x, _mm256_set1_ps(EXP_LOG2E)));
    const __m256 nf = _mm256_cvtepi32_ps(n);
    __m256 r = _mm256_sub_ps(x, _mm256_mul_ps(nf, _mm256_set1_ps(EXP_LN2_HI)));
    r = _mm256_sub_ps(r, _mm256_mul_ps(nf, _mm256_set1_ps(EXP_LN2_LO)));
    __m256 p = _mm256_set1_ps(EXP_C7);
    p = _mm256_add_ps(_mm256_mul_ps(p, r), _mm256_set1_ps(EXP_C6));
    p = _mm256_add_ps(_mm256_mul_ps(p, r), _mm256_set1_ps(EXP_C5));
    p = _mm256_add_ps(_mm256_mul_ps(p, r), _mm256_set1_ps(EXP_C4));
    p = _mm256_add_ps(_mm256_mul_ps(p, r), _mm256_set1_ps(EXP_C3));
    p = _mm256_add_ps(_mm256_mul_ps(p, r), _mm256_set1_ps(EXP_C2));
    p = _mm256_add_ps(_mm256_mul_ps(p, _mm256_mul_ps(r, r)), r);
    p = _mm256_add_ps(p, _mm256_set1_ps(1.0f));
    const __m256i bias = _mm256_set1_epi32(127), half = _mm256_srai_epi32(n, 1);
    const __m256i rest = _mm256_sub_epi32(n, half);
    p = _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23)));
    return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23)));
}

static void swiglu(const float *gate, const float *up, float *h, long n) {
    const __m256 one = _mm256_set1_ps(1.0f), sign = _mm256_set1_ps(-0.0f);
    long i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m256 g = _mm256_loadu_ps(gate + i);
        const __m256 below = _mm256_add_ps(one, exp8(_mm256_xor_ps(g, sign)));
        _mm256_storeu_ps(h + i, _mm256_mul_ps(_mm256_div_ps(g, below), _mm256_loadu_ps(up + i)));
    }
    for (; i < n; i++) h[i] = mer_swiglu1(gate[i], up[i]);
}

static void geglu(const float *gate, const float *up, float *h, long n) {
    const __m256 one = _mm256_set1_ps(1.0f), sign = _mm256_set1_ps(-0.0f);
    const __m256 c1 = _mm256_set1_ps(GELU_1), c3 = _mm256_set1_ps(GELU_3);
    long i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m256 g = _mm256_loadu_ps(gate + i);
        const __m256 y = _mm256_mul_ps(g, _mm256_add_ps(c1, _mm256_mul_ps(c3, _mm256_mul_ps(g, g))));
        const __m256 below = _mm256_add_ps(one, exp8(_mm256_xor_ps(y, sign)));
        _mm256_storeu_ps(h + i, _mm256_mul_ps(_mm256_div_ps(g, below), _mm256_loadu_ps(up + i)));
    }
    for (; i < n; i++) h[i] = mer_geglu1(gate[i], up[i]);
}

static void clamped_swiglu(const float *gate, const float *up, float *h, long n, float alpha, float limit, float added) {
    const __m256 one = _mm256_set1_ps(1.0f), sign = _mm256_set1_ps(-0.0f), a = _mm256_set1_ps(alpha);
    const __m256 high = _mm256_set1_ps(limit), low = _mm256_set1_ps(-limit);
    long i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m256 g = _mm256_min_ps(high, _mm256_loadu_ps(gate + i));
        const __m256 u = _mm256_max_ps(low, _mm256_min_ps(high, _mm256_loadu_ps(up + i)));
        const __m256 below = _mm256_add_ps(one, exp8(_mm256_xor_ps(_mm256_mul_ps(a, g), sign)));
        _mm256_storeu_ps(h + i, _mm256_mul_ps(_mm256_div_ps(g, below), _mm256_add_ps(u, _mm256_set1_ps(added))));
    }
    for (; i < n; i++) h[i] = mer_clamped_swiglu1(gate[i], up[i], alpha, limit, added);
}

#define TABLE(NAME, BLOCK)                 \
    const mer_isa mer_isa_##NAME = {       \
        .name = #NAME,                     \
        .quantise = quantise,              \
        .swiglu = swiglu,                  \
        .geglu = geglu,                    \
        .clamped_swiglu = clamped_swiglu,  \
        .matmul =                          \
            {                              \
                [MER_F32] = matmul_f32,    \
                [MER_F16] = matmul_f16,    \
                [MER_BF16] = matmul_bf16,  \
                MER_BLOCK_FORMATS(BLOCK)   \
            },                             \
    }

TABLE(avx2, MER_AVX2_ENTRY);
TABLE(avxvnni, MER_AVXVNNI_ENTRY);

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
