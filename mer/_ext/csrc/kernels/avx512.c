/* AVX-512 (F, BW, DQ, VL) with VNNI.
 *
 * Integer formats: sixteen rows at a time, one row a lane. Four bytes of each row make a register, which one
 * instruction multiplies with four activations: a block's sums never cross lanes, and what was done to the
 * weights serves every token. A byte product needs one factor without sign: nibbles have none, int8 weights
 * get 128 added and the activations' sum, which is known, takes it off again. Float formats use the sixteen
 * lanes that avx2.c makes of two registers, so every result has the bytes that AVX2 gives. (The BF16 dot
 * products of some CPUs would round the activations to BF16: not used.)
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
#include "units.h"
#include "rows512.h"

#define TOKENS 16

/* n + sums of 16 products per row: unsigned bytes as load_lanes gives them, and activations. */
INLINE __m512i dot_lanes(__m512i n, const __m512i w[4], const int8_t *q) {
    for (int k = 0; k < 4; k++) {
        int four;
        memcpy(&four, q + 4 * k, 4);
        n = _mm512_dpbusd_epi32(n, w[k], _mm512_set1_epi32(four));
    }
    return n;
}

/* The same sums of 32 products from registers as load_rows gives them. */
INLINE __m512i dot_rows(const __m512i first[4], const __m512i second[4], const int8_t *q) {
    const __m512i q0 = _mm512_broadcast_i32x4(load128((const char *)q));
    const __m512i q1 = _mm512_broadcast_i32x4(load128((const char *)q + 16));
    __m512i s[4];
    for (int p = 0; p < 4; p++)
        s[p] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), first[p], q0), second[p], q1);
    transpose(s);
    return _mm512_add_epi32(_mm512_add_epi32(s[0], s[1]), _mm512_add_epi32(s[2], s[3]));
}

/* The low nibbles of 16 bytes per row, and the high ones times 16. */
INLINE void split_nibbles(const __m512i raw[4], __m512i low[4], __m512i high[4]) {
    const __m512i mask = _mm512_set1_epi8(15);
    for (int k = 0; k < 4; k++) {
        low[k] = _mm512_and_si512(raw[k], mask);
        high[k] = _mm512_andnot_si512(mask, raw[k]);
    }
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

/* The scales of two neighbouring blocks of eight rows from row i on, one block in each half. */
INLINE __m256i load_two_halves(const rows16 *row, int i, size_t at) {
    __m256i r[8];
    for (int k = 0; k < 8; k++) r[k] = _mm256_loadu_si256((const __m256i *)(row_at(row, i + k) + at));
    const __m256i r03 = _mm256_unpacklo_epi32(_mm256_unpacklo_epi16(r[0], r[1]), _mm256_unpacklo_epi16(r[2], r[3]));
    const __m256i r47 = _mm256_unpacklo_epi32(_mm256_unpacklo_epi16(r[4], r[5]), _mm256_unpacklo_epi16(r[6], r[7]));
    return _mm256_blend_epi32(_mm256_unpacklo_epi64(r03, r47), _mm256_unpackhi_epi64(r03, r47), 0xf0);
}

INLINE void tile_q4_0(const rows16 *row, const mer_ahead *ahead, const void *const *acts, int n_tok, long cols,
                      __m512 *acc) {
    mer_act_q8 a[TOKENS];
    open_acts(acts, n_tok, cols, a, acc);
    const long nb = cols / 32;
    __m512 next = _mm512_setzero_ps();
    for (long b = 0; b < nb; b++) {
        const size_t at = (size_t)b * sizeof(mer_block_q4_0);
        if (ahead) ahead_step(*ahead, row->run[0] + ROWS * at, ROWS * sizeof(mer_block_q4_0));
        __m512 d = next;
        if (b % 2 == 0 && b + 1 < nb) {
            const __m256i low = load_two_halves(row, 0, at), high = load_two_halves(row, 8, at);
            d = _mm512_cvtph_ps(_mm256_permute2x128_si256(low, high, 0x20));
            next = _mm512_cvtph_ps(_mm256_permute2x128_si256(low, high, 0x31));
        } else if (b % 2 == 0)
            d = load_scales(row, at);
        __m512i raw[4], low[4], high[4];
        load_lanes(row, at + 2, raw);
        split_nibbles(raw, low, high);
        for (int t = 0; t < n_tok; t++) {
            const int8_t *const q = a[t].q + b * 32;
            const __m512i n16 = dot_lanes(_mm512_setzero_si512(), high, q + 16);
            const __m512i n0 = dot_lanes(_mm512_setzero_si512(), low, q);
            const __m512i n = _mm512_add_epi32(n0, _mm512_srai_epi32(n16, 4));
            acc[t] = add_block(acc[t], d, n, &a[t], b, 3);
        }
    }
}

/* A byte product needs weights without sign: 16 is added to each. */
INLINE void tile_mxfp4(const rows16 *row, const mer_ahead *ahead, const void *const *acts, int n_tok, long cols,
                       __m512 *acc) {
    const __m512i mask = _mm512_set1_epi8(15);
    const __m512i values = _mm512_add_epi8(_mm512_broadcast_i32x4(load128((const char *)mer_e2m1)), _mm512_set1_epi8(16));
    mer_act_q8 a[TOKENS];
    open_acts(acts, n_tok, cols, a, acc);
    for (long b = 0; b < cols / 32; b++) {
        const size_t at = (size_t)b * sizeof(mer_block_mxfp4);
        if (ahead) ahead_step(*ahead, row->run[0] + ROWS * at, ROWS * sizeof(mer_block_mxfp4));
        const __m512 d = load_powers(row, at);
        __m512i raw[4], low[4], high[4];
        load_lanes(row, at + 1, raw);
        for (int k = 0; k < 4; k++) {
            low[k] = _mm512_shuffle_epi8(values, _mm512_and_si512(raw[k], mask));
            high[k] = _mm512_shuffle_epi8(values, _mm512_and_si512(_mm512_srli_epi16(raw[k], 4), mask));
        }
        for (int t = 0; t < n_tok; t++) {
            const int8_t *const q = a[t].q + b * 32;
            const __m512i n = dot_lanes(dot_lanes(_mm512_setzero_si512(), low, q), high, q + 16);
            acc[t] = add_block(acc[t], d, n, &a[t], b, 4);
        }
    }
}

INLINE void tile_q8_0(const rows16 *row, const mer_ahead *ahead, const void *const *acts, int n_tok, long cols,
                      __m512 *acc) {
    const __m512i bias = _mm512_set1_epi8(-128);
    mer_act_q8 a[TOKENS];
    open_acts(acts, n_tok, cols, a, acc);
    for (long b = 0; b < cols / 32; b++) {
        const size_t at = (size_t)b * sizeof(mer_block_q8_0);
        if (ahead) ahead_step(*ahead, row->run[0] + ROWS * at, ROWS * sizeof(mer_block_q8_0));
        const __m512 d = load_scales(row, at);
        __m512i first[4], second[4];
        for (int p = 0; p < 4; p++) {
            first[p] = _mm512_xor_si512(load_rows(row, p, at + 2), bias);
            second[p] = _mm512_xor_si512(load_rows(row, p, at + 18), bias);
        }
        if (n_tok == 1) { /* to transpose the weights would cost more than to add across their lanes */
            acc[0] = add_block(acc[0], d, dot_rows(first, second, a->q + b * 32), a, b, 7);
            continue;
        }
        transpose(first);
        transpose(second);
        for (int t = 0; t < n_tok; t++) {
            const int8_t *const q = a[t].q + b * 32;
            const __m512i n = dot_lanes(dot_lanes(_mm512_setzero_si512(), first, q), second, q + 16);
            acc[t] = add_block(acc[t], d, n, &a[t], b, 7);
        }
    }
}

INLINE void tile_q4_k(const rows16 *row, const mer_ahead *ahead, const void *const *acts, int n_tok,
                      long cols, __m512 *acc) {
    mer_act_q8 a[TOKENS];
    open_acts(acts, n_tok, cols, a, acc);
    for (long b = 0; b < cols / 256; b++) {
        const size_t at = (size_t)b * sizeof(mer_block_q4_k);
        struct q4_k_head h;
        load_q4_k_head(row, at, &h);
        __m512 sum[TOKENS], min[TOKENS];
        for (int t = 0; t < n_tok; t++) sum[t] = min[t] = _mm512_setzero_ps();
        for (int j = 0; j < 8; j += 2) {
            const size_t qs = at + 16 + (size_t)j * 16, share = 4 * sizeof(mer_block_q4_k);
            if (ahead) ahead_step(*ahead, row->run[0] + ROWS * at + (size_t)j / 2 * share, share);
            __m512i raw[4], w[2][2][4]; /* sub-block, half of it */
            for (int half = 0; half < 2; half++) {
                load_lanes(row, qs + (size_t)half * 16, raw);
                split_nibbles(raw, w[0][half], w[1][half]);
            }
            for (int t = 0; t < n_tok; t++)
                for (int i = 0; i < 2; i++) {
                    const long sub = b * 8 + j + i;
                    const int8_t *const q = a[t].q + sub * 32;
                    const __m512i n0 = dot_lanes(_mm512_setzero_si512(), w[i][0], q);
                    __m512i n = _mm512_add_epi32(n0, dot_lanes(_mm512_setzero_si512(), w[i][1], q + 16));
                    if (i) n = _mm512_srai_epi32(n, 4);
                    const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(n), h.scale[j + i]);
                    sum[t] = _mm512_add_ps(sum[t], _mm512_mul_ps(scaled, _mm512_set1_ps(a[t].d[sub])));
                    min[t] = _mm512_add_ps(min[t], _mm512_mul_ps(h.min[j + i], _mm512_set1_ps(a[t].dsum[sub])));
                }
        }
        for (int t = 0; t < n_tok; t++) {
            acc[t] = _mm512_add_ps(acc[t], _mm512_mul_ps(h.d, sum[t]));
            acc[t] = _mm512_sub_ps(acc[t], _mm512_mul_ps(h.dmin, min[t]));
        }
    }
}

/* How many of the tokens left make the next tile: there are tiles of one to four, of eight and of sixteen. */
INLINE long tile_tokens(long left) { return left >= TOKENS ? TOKENS : left >= 8 ? 8 : left < 4 ? left : 4; }

/* Rows in sixteens, tokens in sixteens. The switch makes the number of tokens a constant, so that each tile
 * unrolls. */
#define INT_MATMUL(NAME, FMT, TILE)                                                                     \
    static void NAME(const void *w, long cols, long r0, long r1, const void *const *acts, long n_tok,   \
                     float *y, long y_stride) {                                                         \
        const size_t bytes = mer_row_bytes(FMT, cols);                                                  \
        const mer_ahead run = ahead_begin((const char *)w + (size_t)r0 * bytes, ROWS * bytes);          \
        for (long r = r0; r < r1; r += ROWS) {                                                          \
            const rows16 rows = open_rows((const char *)w + (size_t)r * bytes, bytes, r1 - r);          \
            const rows16 *const row = &rows;                                                            \
            for (long t = 0, n; t < n_tok; t += n) {                                                    \
                n = tile_tokens(n_tok - t);                                                             \
                const mer_ahead *const ahead = t == 0 ? &run : NULL;                                    \
                __m512 acc[TOKENS];                                                                     \
                switch (n) {                                                                            \
                case 1: TILE(row, ahead, acts + t, 1, cols, acc); break;                                \
                case 2: TILE(row, ahead, acts + t, 2, cols, acc); break;                                \
                case 3: TILE(row, ahead, acts + t, 3, cols, acc); break;                                \
                case 4: TILE(row, ahead, acts + t, 4, cols, acc); break;                                \
                case 8: TILE(row, ahead, acts + t, 8, cols, acc); break;                                \
                default: TILE(row, ahead, acts + t, TOKENS, cols, acc);                                 \
                }                                                                                       \
                for (long i = 0; i < n; i++) store_rows(y + (t + i) * y_stride + r, acc[i], r1 - r);    \
            }                                                                                           \
        }                                                                                               \
    }

INT_MATMUL(matmul_q4_0, MER_Q4_0, tile_q4_0)
INT_MATMUL(matmul_q8_0, MER_Q8_0, tile_q8_0)
INT_MATMUL(matmul_q4_k, MER_Q4_K, tile_q4_k)
INT_MATMUL(matmul_mxfp4, MER_MXFP4, tile_mxfp4)

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

static void clamped_swiglu(const float *gate, const float *up, float *h, long n, float alpha, float limit) {
    const __m512 one = _mm512_set1_ps(1.0f), high = _mm512_set1_ps(limit), low = _mm512_set1_ps(-limit);
    for (long i = 0; i < n; i += LANES) {
        const __mmask16 lanes = (__mmask16)(n - i < LANES ? (1u << (n - i)) - 1 : 0xffff);
        const __m512 g = _mm512_min_ps(high, _mm512_maskz_loadu_ps(lanes, gate + i));
        const __m512 u = _mm512_max_ps(low, _mm512_min_ps(high, _mm512_maskz_loadu_ps(lanes, up + i)));
        const __m512 turned = _mm512_xor_ps(_mm512_mul_ps(_mm512_set1_ps(alpha), g), _mm512_set1_ps(-0.0f));
        const __m512 part = _mm512_div_ps(g, _mm512_add_ps(one, exp16(turned)));
        _mm512_mask_storeu_ps(h + i, lanes, _mm512_mul_ps(part, _mm512_add_ps(u, one)));
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
            [MER_Q4_0] = matmul_q4_0,
            [MER_Q8_0] = matmul_q8_0,
            [MER_Q4_K] = matmul_q4_k,
            [MER_MXFP4] = matmul_mxfp4,
            MER_UNIT_FORMATS(MER_UNITS_AVX2)
        },
};
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
