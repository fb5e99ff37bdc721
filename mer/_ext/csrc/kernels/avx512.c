/* AVX-512 (F, BW, DQ, VL) with VNNI.
 *
 * As avx2.c, with sixteen rows at a time: row q + 4 l stands in quarter l of register q. A byte product
 * needs one factor without sign: nibbles have none, int8 weights get 128 added and the activations' sum,
 * which is known, takes it off again. Float formats use the sixteen lanes that avx2.c makes of two registers,
 * so every result has the bytes that AVX2 gives. (The BF16 dot products of some CPUs would round the
 * activations to BF16: not used.)
 */
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

#define INLINE static inline __attribute__((always_inline))
#define ROWS 16
#define TOKENS 4

/* 16 bytes of four rows, each in its quarter. */
INLINE __m512i load_rows(const char *const row[ROWS], int q, size_t at) {
    __m512i v = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(row[q] + at)));
    v = _mm512_mask_broadcast_i32x4(v, 0x00f0, _mm_loadu_si128((const __m128i *)(row[q + 4] + at)));
    v = _mm512_mask_broadcast_i32x4(v, 0x0f00, _mm_loadu_si128((const __m128i *)(row[q + 8] + at)));
    return _mm512_mask_broadcast_i32x4(v, 0xf000, _mm_loadu_si128((const __m128i *)(row[q + 12] + at)));
}

INLINE __m512i all_quarters(const int8_t *q) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)q));
}

INLINE short load16(const char *p) {
    short v;
    memcpy(&v, p, 2);
    return v;
}

/* The F16 at the same offset of eight rows. */
INLINE __m128i load_halves(const char *const row[8], size_t at) {
    return _mm_set_epi16(load16(row[7] + at), load16(row[6] + at), load16(row[5] + at), load16(row[4] + at),
                         load16(row[3] + at), load16(row[2] + at), load16(row[1] + at), load16(row[0] + at));
}

INLINE __m512 load_scales(const char *const row[ROWS], size_t at) {
    const __m256i low = _mm256_castsi128_si256(load_halves(row, at));
    return _mm512_cvtph_ps(_mm256_inserti128_si256(low, load_halves(row + 8, at), 1));
}

/* Within each quarter: sums of a's neighbouring parts, then of b's. */
INLINE __m512i fold_64(__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}

INLINE __m512i fold_32(__m512i a, __m512i b) {
    const __m512 x = _mm512_castsi512_ps(a), y = _mm512_castsi512_ps(b);
    return _mm512_add_epi32(_mm512_castps_si512(_mm512_shuffle_ps(x, y, 0x88)),
                            _mm512_castps_si512(_mm512_shuffle_ps(x, y, 0xdd)));
}

/* Sums of 32 products of unsigned bytes and int8 per row. */
INLINE __m512i dot_bytes(const __m512i first[4], const __m512i second[4], const int8_t *q) {
    const __m512i q0 = all_quarters(q), q1 = all_quarters(q + 16);
    __m512i s[4];
    for (int p = 0; p < 4; p++)
        s[p] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), first[p], q0), second[p], q1);
    return fold_32(fold_64(s[0], s[1]), fold_64(s[2], s[3]));
}

INLINE void open_acts(const void *const *acts, int n_tok, long cols, mer_act_q8 *a, __m512 *acc) {
    for (int t = 0; t < n_tok; t++) {
        a[t] = mer_act_view(acts[t], cols);
        acc[t] = _mm512_setzero_ps();
    }
}

/* acc + d * da * (n - offset * sum), offset = 2^shift being what was added to each weight. */
INLINE __m512 add_block(__m512 acc, __m512 d, __m512i n, const mer_act_q8 *a, long b, unsigned shift) {
    n = _mm512_sub_epi32(n, _mm512_slli_epi32(_mm512_set1_epi32(a->sum[b]), shift));
    const __m512 scale = _mm512_mul_ps(d, _mm512_set1_ps(a->d[b]));
    return _mm512_add_ps(acc, _mm512_mul_ps(scale, _mm512_cvtepi32_ps(n)));
}

INLINE void tile_q4_0(const char *const row[ROWS], const mer_ahead *ahead, const void *const *acts, int n_tok,
                      long cols, __m512 *acc) {
    const __m512i mask = _mm512_set1_epi8(15);
    mer_act_q8 a[TOKENS];
    open_acts(acts, n_tok, cols, a, acc);
    for (long b = 0; b < cols / 32; b++) {
        const size_t at = (size_t)b * sizeof(mer_block_q4_0);
        if (ahead) ahead_step(*ahead, row[0] + ROWS * at, ROWS * sizeof(mer_block_q4_0));
        const __m512 d = load_scales(row, at);
        __m512i lo[4], hi[4];
        for (int p = 0; p < 4; p++) {
            const __m512i raw = load_rows(row, p, at + 2);
            lo[p] = _mm512_and_si512(raw, mask);
            hi[p] = _mm512_and_si512(_mm512_srli_epi16(raw, 4), mask);
        }
        for (int t = 0; t < n_tok; t++)
            acc[t] = add_block(acc[t], d, dot_bytes(lo, hi, a[t].q + b * 32), &a[t], b, 3);
    }
}

INLINE void tile_q8_0(const char *const row[ROWS], const mer_ahead *ahead, const void *const *acts, int n_tok,
                      long cols, __m512 *acc) {
    const __m512i bias = _mm512_set1_epi8(-128);
    mer_act_q8 a[TOKENS];
    open_acts(acts, n_tok, cols, a, acc);
    for (long b = 0; b < cols / 32; b++) {
        const size_t at = (size_t)b * sizeof(mer_block_q8_0);
        if (ahead) ahead_step(*ahead, row[0] + ROWS * at, ROWS * sizeof(mer_block_q8_0));
        const __m512 d = load_scales(row, at);
        __m512i first[4], second[4];
        for (int p = 0; p < 4; p++) {
            first[p] = _mm512_xor_si512(load_rows(row, p, at + 2), bias);
            second[p] = _mm512_xor_si512(load_rows(row, p, at + 18), bias);
        }
        for (int t = 0; t < n_tok; t++)
            acc[t] = add_block(acc[t], d, dot_bytes(first, second, a[t].q + b * 32), &a[t], b, 7);
    }
}

/* The head of a Q4_K block of sixteen rows: d, dmin, and eight scales and minima each. */
struct q4_k_head {
    __m512 d, dmin, scale[8], min[8];
};

INLINE void load_q4_k_head(const char *const row[ROWS], size_t at, struct q4_k_head *h) {
    const __m512i r0 = load_rows(row, 0, at), r1 = load_rows(row, 1, at);
    const __m512i r2 = load_rows(row, 2, at), r3 = load_rows(row, 3, at);
    const __m512i t0 = _mm512_unpacklo_epi32(r0, r1), t1 = _mm512_unpacklo_epi32(r2, r3);
    const __m512i t2 = _mm512_unpackhi_epi32(r0, r1), t3 = _mm512_unpackhi_epi32(r2, r3);
    const __m512i dd = _mm512_unpacklo_epi64(t0, t1), a = _mm512_unpackhi_epi64(t0, t1);
    const __m512i b = _mm512_unpacklo_epi64(t2, t3), c = _mm512_unpackhi_epi64(t2, t3);
    h->d = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(dd));
    h->dmin = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(dd, 16)));

    const __m512i six = _mm512_set1_epi8(0x3f), four = _mm512_set1_epi8(0x0f), top = _mm512_set1_epi8(0x30);
    const __m512i packed[4] = {
        _mm512_and_si512(a, six),
        _mm512_or_si512(_mm512_and_si512(c, four), _mm512_and_si512(_mm512_srli_epi32(a, 2), top)),
        _mm512_and_si512(b, six),
        _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi32(c, 4), four),
                        _mm512_and_si512(_mm512_srli_epi32(b, 2), top)),
    };
    const __m512i byte = _mm512_set1_epi32(0xff);
    for (int i = 0; i < 4; i++) {
        __m512 *const out = (i < 2 ? h->scale : h->min) + i % 2 * 4;
        out[0] = _mm512_cvtepi32_ps(_mm512_and_si512(packed[i], byte));
        out[1] = _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(packed[i], 8), byte));
        out[2] = _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(packed[i], 16), byte));
        out[3] = _mm512_cvtepi32_ps(_mm512_srli_epi32(packed[i], 24));
    }
}

INLINE void tile_q4_k(const char *const row[ROWS], const mer_ahead *ahead, const void *const *acts, int n_tok,
                      long cols, __m512 *acc) {
    const __m512i mask = _mm512_set1_epi8(15);
    mer_act_q8 a[TOKENS];
    open_acts(acts, n_tok, cols, a, acc);
    for (long b = 0; b < cols / 256; b++) {
        const size_t at = (size_t)b * sizeof(mer_block_q4_k);
        struct q4_k_head h;
        load_q4_k_head(row, at, &h);
        __m512 sum[TOKENS], min[TOKENS];
        for (int t = 0; t < n_tok; t++) sum[t] = min[t] = _mm512_setzero_ps();
        for (int j = 0; j < 8; j++) {
            const size_t qs = at + 16 + (size_t)(j / 2 * 32), share = 2 * sizeof(mer_block_q4_k);
            if (ahead) ahead_step(*ahead, row[0] + ROWS * at + (size_t)j * share, share);
            __m512i first[4], second[4];
            for (int p = 0; p < 4; p++) {
                first[p] = load_rows(row, p, qs);
                second[p] = load_rows(row, p, qs + 16);
                if (j % 2) {
                    first[p] = _mm512_srli_epi16(first[p], 4);
                    second[p] = _mm512_srli_epi16(second[p], 4);
                }
                first[p] = _mm512_and_si512(first[p], mask);
                second[p] = _mm512_and_si512(second[p], mask);
            }
            for (int t = 0; t < n_tok; t++) {
                const __m512i n = dot_bytes(first, second, a[t].q + b * 256 + j * 32);
                const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(n), h.scale[j]);
                sum[t] = _mm512_add_ps(sum[t], _mm512_mul_ps(scaled, _mm512_set1_ps(a[t].d[b * 8 + j])));
                min[t] = _mm512_add_ps(min[t], _mm512_mul_ps(h.min[j], _mm512_set1_ps(a[t].dsum[b * 8 + j])));
            }
        }
        for (int t = 0; t < n_tok; t++) {
            acc[t] = _mm512_add_ps(acc[t], _mm512_mul_ps(h.d, sum[t]));
            acc[t] = _mm512_sub_ps(acc[t], _mm512_mul_ps(h.dmin, min[t]));
        }
    }
}

/* Rows in sixteens, tokens in fours; a short group of rows repeats its last one. The switch makes the
 * number of tokens a constant, so that each tile unrolls with its sums in registers. */
#define INT_MATMUL(NAME, FMT, TILE)                                                                     \
    static void NAME(const void *w, long cols, long r0, long r1, const void *const *acts, long n_tok, \
                     float *y, long y_stride) {                                                         \
        const size_t bytes = mer_row_bytes(FMT, cols);                                                  \
        const mer_ahead run = ahead_begin((const char *)w + (size_t)r0 * bytes, ROWS * bytes);          \
        for (long r = r0; r < r1; r += ROWS) {                                                          \
            const char *row[ROWS];                                                                      \
            for (long i = 0; i < ROWS; i++)                                                             \
                row[i] = (const char *)w + (size_t)(r + i < r1 ? r + i : r1 - 1) * bytes;               \
            const __mmask16 lanes = (__mmask16)(r1 - r < ROWS ? (1u << (r1 - r)) - 1 : 0xffff);         \
            for (long t = 0; t < n_tok; t += TOKENS) {                                                  \
                const int n = (int)(n_tok - t < TOKENS ? n_tok - t : TOKENS);                           \
                const mer_ahead *const ahead = t == 0 ? &run : NULL;                                    \
                __m512 acc[TOKENS];                                                                     \
                switch (n) {                                                                            \
                case 1: TILE(row, ahead, acts + t, 1, cols, acc); break;                                \
                case 2: TILE(row, ahead, acts + t, 2, cols, acc); break;                                \
                case 3: TILE(row, ahead, acts + t, 3, cols, acc); break;                                \
                default: TILE(row, ahead, acts + t, 4, cols, acc);                                      \
                }                                                                                       \
                for (int i = 0; i < n; i++) _mm512_mask_storeu_ps(y + (t + i) * y_stride + r, lanes, acc[i]); \
            }                                                                                           \
        }                                                                                               \
    }

INT_MATMUL(matmul_q4_0, MER_Q4_0, tile_q4_0)
INT_MATMUL(matmul_q8_0, MER_Q8_0, tile_q8_0)
INT_MATMUL(matmul_q4_k, MER_Q4_K, tile_q4_k)

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
    static void NAME(const void *w, long cols, long r0, long r1, const void *const *acts, long n_tok, \
                     float *y, long y_stride) {                                                         \
        const size_t bytes = mer_row_bytes(FMT, cols);                                                  \
        const mer_ahead run = ahead_begin((const char *)w + (size_t)r0 * bytes, 4 * bytes);             \
        for (long r = r0; r < r1; r += 4) {                                                             \
            const int n = (int)(r1 - r < 4 ? r1 - r : 4);                                               \
            const char *const row = (const char *)w + (size_t)r * bytes;                                \
            for (long t = 0; t < n_tok; t += TOKENS) {                                                  \
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
        float *const d = (float *)a.d + b, *const dsum = (float *)a.dsum + b;
        int32_t *const sum = (int32_t *)a.sum + b;
        const __m512 v0 = _mm512_loadu_ps(x), v1 = _mm512_loadu_ps(x + 16);
        const __m512i m0 = _mm512_and_si512(_mm512_castps_si512(v0), magnitude);
        const __m512i m1 = _mm512_and_si512(_mm512_castps_si512(v1), magnitude);
        const uint32_t bits = _mm512_reduce_max_epu32(_mm512_max_epu32(m0, m1));
        const float amax = mer_bits_f32(bits);
        if (bits >= 0x7f800000u || amax < MER_ACT_TINY) {
            mer_quantise_block(x, q, d, sum, dsum);
            continue;
        }
        const __m512 scale = _mm512_set1_ps(127.0f / amax);
        const __m512i n0 = _mm512_cvtps_epi32(_mm512_mul_ps(v0, scale));
        const __m512i n1 = _mm512_cvtps_epi32(_mm512_mul_ps(v1, scale));
        _mm_storeu_si128((__m128i *)q, _mm512_cvtepi32_epi8(n0));
        _mm_storeu_si128((__m128i *)(q + 16), _mm512_cvtepi32_epi8(n1));
        *d = amax / 127.0f;
        *sum = _mm512_reduce_add_epi32(_mm512_add_epi32(n0, n1));
        *dsum = *d * (float)*sum;
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

const mer_isa mer_isa_avx512 = {
    .name = "avx512",
    .quantise = quantise,
    .swiglu = swiglu,
    .matmul =
        {
            [MER_F32] = matmul_f32,
            [MER_F16] = matmul_f16,
            [MER_BF16] = matmul_bf16,
            [MER_Q4_0] = matmul_q4_0,
            [MER_Q8_0] = matmul_q8_0,
            [MER_Q4_K] = matmul_q4_k,
        },
};
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
