/* Products with every format of blocks, one row of weights a lane. The including file has made `vec` a register of
 * ROWS lanes of 32 bits, `vecf` the same of floats, V(name) the intrinsic of that width, TILE(MOST) how many tokens have
 * their sums in registers at once, and TOKENS the most that it gives.
 *
 * Weights are unpacked into bytes, for many tokens four columns of each row a register, so that what follows never
 * crosses lanes; a unit of some 256 columns is unpacked once for all of them. Few tokens are multiplied as soon as
 * registers are unpacked, sixteen columns of some rows each, and the sums are turned in place of the weights: a sum for
 * every 32 columns costs less than that; where it is one for 16 it does not. A format is described by functions that
 * unpack its scales and its weights, in either order (lane_formats.h), and by a line of the table at the end.
 *
 * In what order a row's product is summed up is written in lanes_scalar.c. */
#ifndef MER_LANES_H
#define MER_LANES_H

#define FEW 3    /* tokens that are multiplied at once */
#define STRIP 32 /* tokens that one unpacking of a unit serves */
#define SUBS 8   /* blocks of 32 columns of a unit, at the most */

typedef struct {
    vecf scale[2 * SUBS], min[2 * SUBS]; /* of each block of 32, or of each half of it */
    vecf d, dmin;                        /* what they are multiplied by, in blocks of 256 */
} scales;

typedef struct {
    scales s;
    vec w[SUBS][8]; /* [block][four columns] */
} unit;

INLINE vec splat(const int byte) { return V(set1_epi8)((char)byte); }
INLINE vec splat32(const int x) { return V(set1_epi32)(x); }

/* The bits of each byte from bit `shift` on. */
INLINE vec bits(vec x, const int shift, const int mask) {
    return (shift ? V(srli_epi16)(x, shift) : x) & splat(mask);
}

/* As many bits of each byte as `mask` has, from bit `from` on, moved to bit `to`. */
INLINE vec moved(vec x, const int from, const int to, const int mask) {
    return (from < to ? V(slli_epi16)(x, to - from) : V(srli_epi16)(x, from - to)) & splat(mask << to);
}

INLINE vecf low_halves(vec x) { return halves_to_floats(x & splat32(0xffff)); }
INLINE vecf high_halves(vec x) { return halves_to_floats(V(srli_epi32)(x, 16)); }

/* Four bytes of each lane as four floats. */
INLINE void bytes_to_floats(vec x, vecf out[4]) {
    out[0] = V(cvtepi32_ps)(x & splat32(0xff));
    out[1] = V(cvtepi32_ps)(V(srli_epi32)(x, 8) & splat32(0xff));
    out[2] = V(cvtepi32_ps)(V(srli_epi32)(x, 16) & splat32(0xff));
    out[3] = V(cvtepi32_ps)(V(srli_epi32)(x, 24));
}

INLINE void signed_bytes_to_floats(vec x, vecf out[4]) {
    out[0] = V(cvtepi32_ps)(V(srai_epi32)(V(slli_epi32)(x, 24), 24));
    out[1] = V(cvtepi32_ps)(V(srai_epi32)(V(slli_epi32)(x, 16), 24));
    out[2] = V(cvtepi32_ps)(V(srai_epi32)(V(slli_epi32)(x, 8), 24));
    out[3] = V(cvtepi32_ps)(V(srai_epi32)(x, 24));
}

/* 16 bytes of each row: turned, lane r of w[k] holds bytes 4 k to 4 k + 3 of row r; else rows are beside each other
 * in a register, as load_beside() has them. Turning pays when the weights serve several products. */
INLINE void load(const rows *row, size_t at, const int turned, vec w[4]) {
    load_beside(row, at, w);
    if (turned) turn(w);
}

#include "lane_formats.h"

/* What follows takes constants from the table: `group`, the columns that share a scale; `most`, see dots(); `shift`, 1 <<
 * shift having been added to each weight; `minima`, whether there are any. n: the sums of a block's products, the added
 * taken off again. */

INLINE vec without_offset(vec n, const int32_t *sum, const int shift) {
    return shift ? V(sub_epi32)(n, V(slli_epi32)(splat32(*sum), shift)) : n;
}

/* The products of a block of 32, whose activations have the scale d, onto a row's sum. */
INLINE vecf add_block(vecf acc, vec n, vecf scale, vecf min, const float d, const float *dsum, const int minima) {
    acc = V(add_ps)(acc, V(mul_ps)(V(mul_ps)(scale, V(set1_ps)(d)), V(cvtepi32_ps)(n)));
    return minima ? V(sub_ps)(acc, V(mul_ps)(min, V(set1_ps)(*dsum))) : acc;
}

/* Those of the 32 columns j of a block of 256, before they are multiplied by d. n: of each half, if that is a group.
 * Of two groups scale * n is exact, so that nothing hangs on the fused operation. */
INLINE vecf add_columns(vecf sum, const vec n[2], const scales *s, const int j, const float d, const int group) {
    vecf x;
    if (group == 32)
        x = V(mul_ps)(V(cvtepi32_ps)(n[0]), s->scale[j]);
    else {
        x = V(mul_ps)(V(cvtepi32_ps)(n[0]), s->scale[2 * j]);
        x = V(fmadd_ps)(V(cvtepi32_ps)(n[1]), s->scale[2 * j + 1], x);
    }
    return V(add_ps)(sum, V(mul_ps)(x, V(set1_ps)(d)));
}

/* half: the sums of the activations of each half, if that is a group. */
INLINE vecf add_minima(vecf min, const scales *s, const int j, const float d, const float *dsum, const int32_t *half,
                       const int group) {
    if (group == 32) return V(add_ps)(min, V(mul_ps)(s->min[j], V(set1_ps)(*dsum)));
    vecf m = V(mul_ps)(s->min[2 * j], V(cvtepi32_ps)(splat32(half[0])));
    m = V(fmadd_ps)(s->min[2 * j + 1], V(cvtepi32_ps)(splat32(half[1])), m);
    return V(add_ps)(min, V(mul_ps)(m, V(set1_ps)(d)));
}

INLINE vecf add_k_block(vecf acc, vecf sum, vecf min, const scales *s, const int minima) {
    acc = V(add_ps)(acc, V(mul_ps)(s->d, sum));
    return minima ? V(sub_ps)(acc, V(mul_ps)(s->dmin, min)) : acc;
}

/* A unit's activations of some tokens, but for their bytes: copied, since there are not registers enough for as many
 * pointers. `start` is what sums of products begin with: less what `shift` adds to them, of each half if that is a group. */
typedef struct {
    const int8_t *q[TOKENS];
    float d[TOKENS][SUBS], dsum[TOKENS][SUBS];
    int32_t half[TOKENS][2 * SUBS], start[TOKENS][2 * SUBS];
} tokens;

/* Without sign, since what is behind a row's last block may be any number. */
INLINE int32_t less_offset(int32_t sum, const int shift) { return (int32_t)(0u - ((uint32_t)sum << shift)); }

/* Rows are padded, so that a whole unit can be read where there is less of it. */
INLINE void take_tokens(const int n_tok, tokens *x, const mer_act_q8 *a, long b, const int group, const int shift,
                        const int minima) {
    UNROLL for (int t = 0; t < n_tok; t++) {
        x->q[t] = a[t].q + b * 32;
        memcpy(x->d[t], a[t].d + b, sizeof x->d[t]);
        if (minima && group != 16) memcpy(x->dsum[t], a[t].dsum + b, sizeof x->dsum[t]);
        if (minima && group == 16) memcpy(x->half[t], a[t].half + 2 * b, sizeof x->half[t]);
        if (shift && group != 16)
            for (int j = 0; j < SUBS; j++) x->start[t][j] = less_offset(a[t].sum[b + j], shift);
        if (shift && group == 16)
            for (int j = 0; j < 2 * SUBS; j++) x->start[t][j] = less_offset(a[t].half[2 * b + j], shift);
    }
}

/* n_tok tokens more, a constant so that the loops unroll: onto their sums, the blocks of a unit from column 32 b on. */
INLINE void add_unit(const int n_tok, const unit *u, const mer_act_q8 *a, long b, const int n_blocks, const int group,
                     const int most, const int shift, const int minima, vecf *acc) {
    const int parts = group == 16 ? 2 : 1, quads = 8 / parts;
    vecf sum[TOKENS], min[TOKENS];
    tokens x;
    take_tokens(n_tok, &x, a, b, group, shift, minima);
    UNROLL for (int t = 0; t < n_tok; t++) sum[t] = group ? V(setzero_ps)() : acc[t];
    UNROLL for (int t = 0; t < n_tok; t++) min[t] = V(setzero_ps)();
    for (int j = 0; j < n_blocks; j++) {
        vec n[2][TOKENS];
        UNROLL for (int p = 0; p < parts; p++) {
            UNROLL for (int t = 0; t < n_tok; t++)
                n[p][t] = shift ? splat32(x.start[t][parts * j + p]) : zeros();
            dots(n_tok, u->w[j] + quads * p, x.q, 32 * j + 16 * p, quads, most, n[p]);
        }
        UNROLL for (int t = 0; t < n_tok; t++) {
            const vec both[2] = {n[0][t], n[parts - 1][t]};
            if (group == 0)
                sum[t] = add_block(sum[t], n[0][t], u->s.scale[j], u->s.min[j], x.d[t][j], &x.dsum[t][j], minima);
            else {
                sum[t] = add_columns(sum[t], both, &u->s, j, x.d[t][j], group);
                if (minima)
                    min[t] = add_minima(min[t], &u->s, j, x.d[t][j], &x.dsum[t][j], x.half[t] + 2 * j, group);
            }
        }
    }
    UNROLL for (int t = 0; t < n_tok; t++) acc[t] = group ? add_k_block(acc[t], sum[t], min[t], &u->s, minima) : sum[t];
}

/* All of a unit's tokens, `tile` at a time. There is room for more tokens than there are. */
#define ADD_UNIT(tile, ...)                                                                                   \
    for (long t = 0; t < n_tok; t += tile)                                                                    \
        if (n_tok - t > tile * 3 / 4)                                                                         \
            add_unit(tile, &u, a + t, __VA_ARGS__, acc + t);                                                  \
        else if (n_tok - t > tile / 2)                                                                        \
            add_unit(tile * 3 / 4, &u, a + t, __VA_ARGS__, acc + t);                                          \
        else                                                                                                  \
            add_unit(tile / 2, &u, a + t, __VA_ARGS__, acc + t);

/* Multiplies one group of rows with n_tok tokens. */
typedef void (*rows_fn)(const rows *row, const mer_ahead *ahead, const mer_act_q8 *a, long n_tok, long cols, vecf *acc);

INLINE void product(rows_fn rows_product, int id, const void *w, long cols, long r0, long r1, const void *const *acts,
                    long n_tok, float *y, long y_stride) {
    const size_t bytes = mer_row_bytes(id, cols);
    const mer_ahead run = ahead_begin((const char *)w + (size_t)r0 * bytes, ROWS * bytes);
    for (long t0 = 0; t0 < n_tok; t0 += STRIP) {
        const long n = n_tok - t0 < STRIP ? n_tok - t0 : STRIP, room = n > FEW ? n + TOKENS : n;
        mer_act_q8 a[STRIP + TOKENS];
        for (long t = 0; t < room; t++) a[t] = mer_act_view(acts[t0 + (t < n ? t : n - 1)], cols);
        for (long r = r0, taken; r < r1; r += taken) {
            taken = group_rows(r1 - r);
            const rows row = open_rows((const char *)w + (size_t)r * bytes, bytes, taken);
            vecf acc[STRIP + TOKENS];
            for (long t = 0; t < room; t++) acc[t] = V(setzero_ps)();
            rows_product(&row, &run, a, n, cols, acc);
            for (long t = 0; t < n; t++) store_rows(y + (t0 + t) * y_stride + r, acc[t], taken);
        }
    }
}

#define PRODUCT(NAME, ID)                                                                                     \
    static void rows_##NAME(const rows *row, const mer_ahead *ahead, const mer_act_q8 *a, long n_tok,         \
                            long cols, vecf *acc) {                                                           \
        switch (n_tok) {                                                                                      \
        case 1: few_##NAME(1, *row, *ahead, a, cols, acc); break;                                             \
        case 2: few_##NAME(2, *row, *ahead, a, cols, acc); break;                                             \
        case 3: few_##NAME(3, *row, *ahead, a, cols, acc); break;                                             \
        default: many_##NAME(row, ahead, a, n_tok, cols, acc);                                                \
        }                                                                                                     \
    }                                                                                                         \
    void FUNCTION(NAME)(const void *w, long cols, long r0, long r1, const void *const *acts, long n_tok,      \
                        float *y, long y_stride) {                                                            \
        product(rows_##NAME, ID, w, cols, r0, r1, acts, n_tok, y, y_stride);                                  \
    }

/* Few tokens: what the loops use is copied, since the compiler can't know that it does not change. */
#define OPEN_FEW                                                                                              \
    mer_act_q8 a[FEW];                                                                                        \
    vecf acc[FEW];                                                                                            \
    UNROLL for (int t = 0; t < n_tok; t++) {                                                                  \
        a[t] = acts[t];                                                                                       \
        acc[t] = V(setzero_ps)();                                                                             \
    }

#define CLOSE_FEW UNROLL for (int t = 0; t < n_tok; t++) out[t] = acc[t];

#define BLOCKS(NAME, ID, MOST, SHIFT, MINIMA)                                                                 \
    INLINE void few_##NAME(const int n_tok, const rows row, const mer_ahead ahead, const mer_act_q8 *acts,    \
                           long cols, vecf *out) {                                                            \
        const size_t bytes = mer_row_bytes(ID, 32);                                                           \
        OPEN_FEW                                                                                              \
        vecf scale, min, next = V(setzero_ps)();                                                              \
        for (long b = 0; b < cols / 32; b++) {                                                                \
            const size_t at = (size_t)b * bytes;                                                              \
            vec w[2][4];                                                                                      \
            ahead_step(ahead, row.run[0] + ROWS * at, ROWS * bytes);                                          \
            if (bytes == 18 && b % 2)                                                                         \
                scale = next;                                                                                 \
            else if (bytes == 18 && b + 1 < cols / 32)                                                        \
                two_scales(&row, at, &scale, &next);                                                          \
            else                                                                                              \
                scale_##NAME(&row, at, &scale, &min);                                                         \
            weights_##NAME(&row, at, 0, 0, w[0]);                                                             \
            weights_##NAME(&row, at, 1, 0, w[1]);                                                             \
            UNROLL for (int t = 0; t < n_tok; t++) {                                                          \
                sums n = {0};                                                                                 \
                multiply(&n, w[0], a[t].q + b * 32, MOST);                                                    \
                multiply(&n, w[1], a[t].q + b * 32 + 16, MOST);                                               \
                acc[t] = add_block(acc[t], without_offset(fold(&n, MOST), a[t].sum + b, SHIFT), scale, min,   \
                                   a[t].d[b], a[t].dsum + b, MINIMA);                                         \
            }                                                                                                 \
        }                                                                                                     \
        CLOSE_FEW                                                                                             \
    }                                                                                                         \
    static void many_##NAME(const rows *row, const mer_ahead *ahead, const mer_act_q8 *a, long n_tok,         \
                            long cols, vecf *acc) {                                                           \
        const size_t bytes = mer_row_bytes(ID, 32);                                                           \
        for (long b = 0, n; b < cols / 32; b += n) {                                                          \
            n = cols / 32 - b < SUBS ? cols / 32 - b : SUBS;                                                  \
            unit u;                                                                                           \
            for (long j = 0; j < n; j++) {                                                                    \
                const size_t at = (size_t)(b + j) * bytes;                                                    \
                ahead_step(*ahead, row->run[0] + ROWS * at, ROWS * bytes);                                    \
                vecf min;                                                                                     \
                scale_##NAME(row, at, u.s.scale + j, &min);                                                   \
                if (MINIMA) u.s.min[j] = min;                                                                 \
                UNROLL for (int half = 0; half < 2; half++) {                                                 \
                    vec w[4];                                                                                 \
                    weights_##NAME(row, at, half, 1, w);                                                      \
                    for (int k = 0; k < 4; k++) u.w[j][4 * half + k] = w[k];                                  \
                }                                                                                             \
            }                                                                                                 \
            ADD_UNIT(TILE(MOST), b, (int)n, 0, MOST, SHIFT, MINIMA)                                           \
        }                                                                                                     \
    }                                                                                                         \
    PRODUCT(NAME, ID)

/* TOGETHER: the blocks of 32 that weights_NAME() gives at once. */
#define K_BLOCKS(NAME, ID, TOGETHER, GROUP, MOST, SHIFT, MINIMA)                                              \
    INLINE void few_##NAME(const int n_tok, const rows row, const mer_ahead ahead, const mer_act_q8 *acts,    \
                           long cols, vecf *out) {                                                            \
        const size_t bytes = mer_row_bytes(ID, 256), share = ROWS * bytes / (SUBS / TOGETHER);                \
        OPEN_FEW                                                                                              \
        for (long b = 0; b < cols / 256; b++) {                                                               \
            const size_t at = (size_t)b * bytes;                                                              \
            scales s;                                                                                         \
            vecf sum[FEW], min[FEW];                                                                          \
            scales_##NAME(&row, at, &s);                                                                      \
            UNROLL for (int t = 0; t < n_tok; t++) sum[t] = min[t] = V(setzero_ps)();                         \
            _Pragma("GCC unroll 2") for (int j = 0; j < SUBS; j += TOGETHER) {                                \
                sums n[TOGETHER][FEW] = {0};                                                                  \
                vec m[TOGETHER][FEW][2];                                                                      \
                ahead_step(ahead, row.run[0] + ROWS * at + (size_t)(j / TOGETHER) * share, share);            \
                UNROLL for (int half = 0; half < 2; half++) {                                                 \
                    vec w[4][4];                                                                              \
                    weights_##NAME(&row, at, j, half, GROUP == 16, w);                                        \
                    UNROLL for (int i = 0; i < TOGETHER; i++)                                                 \
                        UNROLL for (int t = 0; t < n_tok; t++) {                                              \
                            const int8_t *const q = a[t].q + b * 256 + (j + i) * 32 + half * 16;              \
                            if (GROUP == 16) {                                                                \
                                const int32_t whole = a[t].half[2 * (b * SUBS + j + i) + half];               \
                                m[i][t][half] = SHIFT ? splat32(less_offset(whole, SHIFT)) : zeros();         \
                                dots(1, w[i], &q, 0, 4, MOST, m[i][t] + half);                                \
                            } else                                                                            \
                                multiply(&n[i][t], w[i], q, MOST);                                            \
                        }                                                                                     \
                }                                                                                             \
                UNROLL for (int i = 0; i < TOGETHER; i++)                                                     \
                    UNROLL for (int t = 0; t < n_tok; t++) {                                                  \
                        const long at_act = b * SUBS + j + i;                                                 \
                        if (GROUP == 32)                                                                      \
                            m[i][t][0] = without_offset(fold(&n[i][t], MOST), a[t].sum + at_act, SHIFT);      \
                        sum[t] = add_columns(sum[t], m[i][t], &s, j + i, a[t].d[at_act], GROUP);              \
                        if (MINIMA)                                                                           \
                            min[t] = add_minima(min[t], &s, j + i, a[t].d[at_act], a[t].dsum + at_act,        \
                                                a[t].half + 2 * at_act, GROUP);                               \
                    }                                                                                         \
            }                                                                                                 \
            UNROLL for (int t = 0; t < n_tok; t++) acc[t] = add_k_block(acc[t], sum[t], min[t], &s, MINIMA);  \
        }                                                                                                     \
        CLOSE_FEW                                                                                             \
    }                                                                                                         \
    static void many_##NAME(const rows *row, const mer_ahead *ahead, const mer_act_q8 *a, long n_tok,         \
                            long cols, vecf *acc) {                                                           \
        const size_t bytes = mer_row_bytes(ID, 256);                                                          \
        for (long b = 0; b < cols / 256; b++) {                                                               \
            const size_t at = (size_t)b * bytes;                                                              \
            unit u;                                                                                           \
            ahead_step(*ahead, row->run[0] + ROWS * at, ROWS * bytes);                                        \
            scales_##NAME(row, at, &u.s);                                                                     \
            for (int j = 0; j < SUBS; j += TOGETHER)                                                          \
                UNROLL for (int half = 0; half < 2; half++) {                                                 \
                    vec w[4][4];                                                                              \
                    weights_##NAME(row, at, j, half, 1, w);                                                   \
                    for (int i = 0; i < TOGETHER; i++)                                                        \
                        for (int k = 0; k < 4; k++) u.w[j + i][4 * half + k] = w[i][k];                       \
                }                                                                                             \
            ADD_UNIT(TILE(MOST), b * SUBS, SUBS, GROUP, MOST, SHIFT, MINIMA)                                  \
        }                                                                                                     \
    }                                                                                                         \
    PRODUCT(NAME, ID)

BLOCKS(q4_0, MER_Q4_0, 8, 3, 0)
BLOCKS(q4_1, MER_Q4_1, 8, 0, 1)
BLOCKS(q5_0, MER_Q5_0, 4, 4, 0)
BLOCKS(q5_1, MER_Q5_1, 4, 0, 1)
BLOCKS(q8_0, MER_Q8_0, 0, SIGN_SHIFT, 0)
BLOCKS(iq4_nl, MER_IQ4_NL, 0, SIGN_SHIFT, 0)
BLOCKS(mxfp4, MER_MXFP4, 4, 4, 0)
K_BLOCKS(q2_k, MER_Q2_K, 4, 16, 4, 0, 1)
K_BLOCKS(q3_k, MER_Q3_K, 4, 16, 4, 2, 0)
K_BLOCKS(q4_k, MER_Q4_K, 2, 32, 8, 0, 1)
K_BLOCKS(q5_k, MER_Q5_K, 2, 32, 4, 0, 1)
K_BLOCKS(q6_k, MER_Q6_K, 4, 16, 2, 5, 0)
K_BLOCKS(iq4_xs, MER_IQ4_XS, 1, 32, 0, SIGN_SHIFT, 0)

#endif
