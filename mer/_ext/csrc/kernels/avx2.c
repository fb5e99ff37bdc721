/* AVX2 + FMA + F16C.
 *
 * Integer formats: eight rows at a time, one row a lane. Row p stands in the lower half of a register
 * and row p + 4 in the upper one, so a block's 8 x 32 products sum up to eight exact integers without
 * crossing halves; one multiplication by the scales and one addition then serve eight rows.
 * Unpacked weights serve up to sixteen tokens.
 */
#if defined(__x86_64__)
#include <immintrin.h> /* before the pragma: its functions carry their own targets */
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include "ahead.h"
#include "elementwise.h"
#include "rows256.h"
#include "units.h"

#define TOKENS 16

/* Within each half: sums of a's 64-bit parts, then of b's. Here and below shuffles and an addition, not
 * the horizontal add, which many CPUs take two cycles over. */
#define FOLD_64(ADD, a, b) ADD(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b))

INLINE __m256i pick_32(__m256i a, __m256i b, const int odd) {
    const __m256 x = _mm256_castsi256_ps(a), y = _mm256_castsi256_ps(b);
    return _mm256_castps_si256(odd ? _mm256_shuffle_ps(x, y, 0xdd) : _mm256_shuffle_ps(x, y, 0x88));
}

/* Within each half: sums of a's neighbouring 32-bit parts, then of b's. */
#define FOLD_32(ADD, a, b) ADD(pick_32(a, b, 0), pick_32(a, b, 1))

/* Sums of 32 products of nibbles [0, 15] and int8 per row. No 16-bit sum exceeds 16 * 15 * 127 < 2^15. */
INLINE __m256i dot_nibbles(const __m256i first[4], const __m256i second[4], const int8_t *q) {
    const __m256i q0 = both_halves(q), q1 = both_halves(q + 16);
    __m256i s[4];
    for (int p = 0; p < 4; p++)
        s[p] = _mm256_add_epi16(_mm256_maddubs_epi16(first[p], q0), _mm256_maddubs_epi16(second[p], q1));
    const __m256i s01 = FOLD_64(_mm256_add_epi16, s[0], s[1]), s23 = FOLD_64(_mm256_add_epi16, s[2], s[3]);
    return _mm256_madd_epi16(FOLD_32(_mm256_add_epi16, s01, s23), _mm256_set1_epi16(1));
}

INLINE void tile_q4_0(const char *const row[ROWS], const mer_ahead *ahead, const void *const *acts, int n_tok,
                      long cols, __m256 *acc) {
    const __m256i mask = _mm256_set1_epi8(15);
    mer_act_q8 a[TOKENS];
    for (int t = 0; t < n_tok; t++) {
        a[t] = mer_act_view(acts[t], cols);
        acc[t] = _mm256_setzero_ps();
    }
    const long blocks = cols / 32;
    __m256 next = _mm256_setzero_ps();
    for (long b = 0; b < blocks; b++) {
        const size_t at = (size_t)b * sizeof(mer_block_q4_0);
        if (ahead) ahead_step(*ahead, row[0] + ROWS * at, ROWS * sizeof(mer_block_q4_0));
        __m256 d = next;
        if (b % 2 == 0 && b + 1 < blocks) {
            const __m256i two = load_two_scales(row, at);
            d = _mm256_cvtph_ps(_mm256_castsi256_si128(two));
            next = _mm256_cvtph_ps(_mm256_extracti128_si256(two, 1));
        } else if (b % 2 == 0)
            d = load_scales(row, at);
        __m256i lo[4], hi[4];
        for (int p = 0; p < 4; p++) {
            const __m256i raw = load_pair(row[p] + at + 2, row[p + 4] + at + 2);
            lo[p] = _mm256_and_si256(raw, mask);
            hi[p] = _mm256_and_si256(_mm256_srli_epi16(raw, 4), mask);
        }
        for (int t = 0; t < n_tok; t++) {
            __m256i n = dot_nibbles(lo, hi, a[t].q + b * 32);
            n = _mm256_sub_epi32(n, _mm256_slli_epi32(_mm256_set1_epi32(a[t].sum[b]), 3));
            const __m256 scale = _mm256_mul_ps(d, _mm256_set1_ps(a[t].d[b]));
            acc[t] = _mm256_add_ps(acc[t], _mm256_mul_ps(scale, _mm256_cvtepi32_ps(n)));
        }
    }
}

/* Four sums per row of int8 products; |w| <= 128 and |q| <= 127, so two of them fit 16 bits. */
INLINE __m256i dot_bytes(__m256i w, __m256i q) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(q, w));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

/* As dot_nibbles, for weights with sign: no 16-bit sum exceeds 16 * 12 * 127 < 2^15. */
INLINE __m256i dot_small(const __m256i first[4], const __m256i second[4], const int8_t *q) {
    const __m256i q0 = both_halves(q), q1 = both_halves(q + 16);
    __m256i s[4];
    for (int p = 0; p < 4; p++)
        s[p] = _mm256_add_epi16(
            _mm256_maddubs_epi16(_mm256_abs_epi8(first[p]), _mm256_sign_epi8(q0, first[p])),
            _mm256_maddubs_epi16(_mm256_abs_epi8(second[p]), _mm256_sign_epi8(q1, second[p])));
    const __m256i s01 = FOLD_64(_mm256_add_epi16, s[0], s[1]), s23 = FOLD_64(_mm256_add_epi16, s[2], s[3]);
    return _mm256_madd_epi16(FOLD_32(_mm256_add_epi16, s01, s23), _mm256_set1_epi16(1));
}

INLINE void tile_mxfp4(const char *const row[ROWS], const mer_ahead *ahead, const void *const *acts, int n_tok,
                       long cols, __m256 *acc) {
    const __m256i mask = _mm256_set1_epi8(15), values = both_halves(mer_e2m1);
    mer_act_q8 a[TOKENS];
    for (int t = 0; t < n_tok; t++) {
        a[t] = mer_act_view(acts[t], cols);
        acc[t] = _mm256_setzero_ps();
    }
    for (long b = 0; b < cols / 32; b++) {
        const size_t at = (size_t)b * sizeof(mer_block_mxfp4);
        if (ahead) ahead_step(*ahead, row[0] + ROWS * at, ROWS * sizeof(mer_block_mxfp4));
        const __m256 d = load_powers(row, at);
        __m256i lo[4], hi[4];
        for (int p = 0; p < 4; p++) {
            const __m256i raw = load_pair(row[p] + at + 1, row[p + 4] + at + 1);
            lo[p] = _mm256_shuffle_epi8(values, _mm256_and_si256(raw, mask));
            hi[p] = _mm256_shuffle_epi8(values, _mm256_and_si256(_mm256_srli_epi16(raw, 4), mask));
        }
        for (int t = 0; t < n_tok; t++) {
            const __m256i n = dot_small(lo, hi, a[t].q + b * 32);
            const __m256 scale = _mm256_mul_ps(d, _mm256_set1_ps(a[t].d[b]));
            acc[t] = _mm256_add_ps(acc[t], _mm256_mul_ps(scale, _mm256_cvtepi32_ps(n)));
        }
    }
}

INLINE void tile_q8_0(const char *const row[ROWS], const mer_ahead *ahead, const void *const *acts, int n_tok,
                      long cols, __m256 *acc) {
    mer_act_q8 a[TOKENS];
    for (int t = 0; t < n_tok; t++) {
        a[t] = mer_act_view(acts[t], cols);
        acc[t] = _mm256_setzero_ps();
    }
    for (long b = 0; b < cols / 32; b++) {
        const size_t at = (size_t)b * sizeof(mer_block_q8_0);
        if (ahead) ahead_step(*ahead, row[0] + ROWS * at, ROWS * sizeof(mer_block_q8_0));
        const __m256 d = load_scales(row, at);
        __m256i first[4], second[4];
        for (int p = 0; p < 4; p++) {
            first[p] = load_pair(row[p] + at + 2, row[p + 4] + at + 2);
            second[p] = load_pair(row[p] + at + 18, row[p + 4] + at + 18);
        }
        for (int t = 0; t < n_tok; t++) {
            const __m256i q0 = both_halves(a[t].q + b * 32), q1 = both_halves(a[t].q + b * 32 + 16);
            __m256i s[4];
            for (int p = 0; p < 4; p++)
                s[p] = _mm256_add_epi32(dot_bytes(first[p], q0), dot_bytes(second[p], q1));
            const __m256i s01 = FOLD_64(_mm256_add_epi32, s[0], s[1]), s23 = FOLD_64(_mm256_add_epi32, s[2], s[3]);
            const __m256i n = FOLD_32(_mm256_add_epi32, s01, s23);
            const __m256 scale = _mm256_mul_ps(d, _mm256_set1_ps(a[t].d[b]));
            acc[t] = _mm256_add_ps(acc[t], _mm256_mul_ps(scale, _mm256_cvtepi32_ps(n)));
        }
    }
}

INLINE void tile_q4_k(const char *const row[ROWS], const mer_ahead *ahead, const void *const *acts, int n_tok,
                      long cols, __m256 *acc) {
    const __m256i mask = _mm256_set1_epi8(15);
    mer_act_q8 a[TOKENS];
    for (int t = 0; t < n_tok; t++) {
        a[t] = mer_act_view(acts[t], cols);
        acc[t] = _mm256_setzero_ps();
    }
    for (long b = 0; b < cols / 256; b++) {
        const size_t at = (size_t)b * sizeof(mer_block_q4_k);
        struct q4_k_head h;
        load_q4_k_head(row, at, &h);
        __m256 sum[TOKENS], min[TOKENS];
        for (int t = 0; t < n_tok; t++) sum[t] = min[t] = _mm256_setzero_ps();
        for (int j = 0; j < 8; j += 2) {
            const size_t qs = at + 16 + (size_t)j * 16, share = 2 * sizeof(mer_block_q4_k);
            if (ahead) ahead_step(*ahead, row[0] + ROWS * at + (size_t)j / 2 * share, share);
            __m256i raw[2][4]; /* half a sub-block each */
            for (int p = 0; p < 4; p++) {
                raw[0][p] = load_pair(row[p] + qs, row[p + 4] + qs);
                raw[1][p] = load_pair(row[p] + qs + 16, row[p + 4] + qs + 16);
            }
            for (int i = 0; i < 2; i++) {
                __m256i first[4], second[4];
                for (int p = 0; p < 4; p++) {
                    first[p] = _mm256_and_si256(i ? _mm256_srli_epi16(raw[0][p], 4) : raw[0][p], mask);
                    second[p] = _mm256_and_si256(i ? _mm256_srli_epi16(raw[1][p], 4) : raw[1][p], mask);
                }
                for (int t = 0; t < n_tok; t++) {
                    const long sub = b * 8 + j + i;
                    const __m256i n = dot_nibbles(first, second, a[t].q + sub * 32);
                    const __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(n), h.scale[j + i]);
                    sum[t] = _mm256_add_ps(sum[t], _mm256_mul_ps(scaled, _mm256_set1_ps(a[t].d[sub])));
                    min[t] = _mm256_add_ps(min[t], _mm256_mul_ps(h.min[j + i], _mm256_set1_ps(a[t].dsum[sub])));
                }
            }
        }
        for (int t = 0; t < n_tok; t++) {
            acc[t] = _mm256_add_ps(acc[t], _mm256_mul_ps(h.d, sum[t]));
            acc[t] = _mm256_sub_ps(acc[t], _mm256_mul_ps(h.dmin, min[t]));
        }
    }
}

/* How many of the tokens left make the next tile: there are tiles of one to four, of eight and of sixteen. */
INLINE long tile_tokens(long left) { return left >= TOKENS ? TOKENS : left >= 8 ? 8 : left < 4 ? left : 4; }

/* Rows in eights, tokens in sixteens; a short group of rows repeats its last one. The switch makes the
 * number of tokens a constant, so that each tile unrolls. */
#define INT_MATMUL(NAME, FMT, TILE)                                                                     \
    static void NAME(const void *w, long cols, long r0, long r1, const void *const *acts, long n_tok,   \
                     float *y, long y_stride) {                                                         \
        const size_t bytes = mer_row_bytes(FMT, cols);                                                  \
        const mer_ahead run = ahead_begin((const char *)w + (size_t)r0 * bytes, ROWS * bytes);          \
        for (long r = r0; r < r1; r += ROWS) {                                                          \
            const char *row[ROWS];                                                                      \
            for (long i = 0; i < ROWS; i++)                                                             \
                row[i] = (const char *)w + (size_t)(r + i < r1 ? r + i : r1 - 1) * bytes;               \
            for (long t = 0, n; t < n_tok; t += n) {                                                    \
                n = tile_tokens(n_tok - t);                                                             \
                const mer_ahead *const ahead = t == 0 ? &run : NULL;                                    \
                __m256 acc[TOKENS];                                                                     \
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
        int8_t *const q = (int8_t *)a.q + b * MER_ACT_BLOCK;
        float *const d = (float *)a.d + b, *const dsum = (float *)a.dsum + b;
        int32_t *const sum = (int32_t *)a.sum + b;
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
            mer_quantise_block(x, q, d, sum, dsum);
            continue;
        }
        const __m256 scale = _mm256_set1_ps(127.0f / amax);
        __m256i n[4];
        for (int i = 0; i < 4; i++) n[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], scale));
        const __m256i s8 = _mm256_add_epi32(_mm256_add_epi32(n[0], n[1]), _mm256_add_epi32(n[2], n[3]));
        __m128i s = _mm_add_epi32(_mm256_castsi256_si128(s8), _mm256_extracti128_si256(s8, 1));
        s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
        s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
        const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(n[0], n[1]), _mm256_packs_epi32(n[2], n[3]));
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        _mm256_storeu_si256((__m256i *)q, _mm256_permutevar8x32_epi32(bytes, order));
        *d = amax / 127.0f;
        *sum = _mm_cvtsi128_si32(s);
        *dsum = *d * (float)*sum;
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

static void clamped_swiglu(const float *gate, const float *up, float *h, long n, float alpha, float limit) {
    const __m256 one = _mm256_set1_ps(1.0f), sign = _mm256_set1_ps(-0.0f), a = _mm256_set1_ps(alpha);
    const __m256 high = _mm256_set1_ps(limit), low = _mm256_set1_ps(-limit);
    long i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m256 g = _mm256_min_ps(high, _mm256_loadu_ps(gate + i));
        const __m256 u = _mm256_max_ps(low, _mm256_min_ps(high, _mm256_loadu_ps(up + i)));
        const __m256 below = _mm256_add_ps(one, exp8(_mm256_xor_ps(_mm256_mul_ps(a, g), sign)));
        _mm256_storeu_ps(h + i, _mm256_mul_ps(_mm256_div_ps(g, below), _mm256_add_ps(u, one)));
    }
    for (; i < n; i++) h[i] = mer_clamped_swiglu1(gate[i], up[i], alpha, limit);
}

const mer_isa mer_isa_avx2 = {
    .name = "avx2",
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
