/* Products with every format of blocks, one row of weights a lane. The including file has made `vec` a register of
 * ROWS lanes of 32 bits, `vecf` the same of floats, and V(name) the intrinsic of that width.
 *
 * Weights are unpacked into bytes, four columns of each row a register, so that what follows never crosses lanes and
 * serves any number of tokens. A format is described by the functions that unpack its scales and its weights and by a
 * line of the table at the end. Few tokens are multiplied as soon as registers are unpacked; for many, a unit of some
 * 256 columns is unpacked once for all of them.
 *
 * In what order a row's product is summed up is written in lanes_scalar.c. */
#ifndef MER_LANES_H
#define MER_LANES_H

#ifndef TOKENS
#define TOKENS 8 /* tokens of a unit whose sums are in registers, or half as many; with less this compiles faster */
#endif
#define FEW 2    /* tokens that are multiplied at once */
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

/* Loops that have to be unrolled: their counter becomes a constant, their arrays registers. */
#define UNROLL _Pragma("GCC unroll 8")

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


/* 16 bytes are 32 columns: the low nibbles are the first half of them. */
INLINE void load_nibbles(const rows *row, size_t at, const int half, vec w[4]) {
    load_lanes(row, at, w);
    for (int k = 0; k < 4; k++) w[k] = bits(w[k], 4 * half, 15);
}

/* Bits 0 to 15 of the lane, or 16 to 31, as bit 4 of 16 bytes: on top of the nibbles. */
INLINE void add_fifth_bits(vec fifth, const int half, vec w[4]) {
    static const int8_t lane[16] = {0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12};
    const vec first = table16(lane);
    for (int k = 0; k < 4; k++) {
        const vec spread = V(shuffle_epi8)(fifth, V(add_epi8)(first, splat(2 * half + k / 2)));
        w[k] |= where_bits(spread, splat32(k % 2 ? (int)0x80402010u : 0x08040201), 16);
    }
}

INLINE void look_up(vec values, vec w[4]) {
    for (int k = 0; k < 4; k++) w[k] = V(shuffle_epi8)(values, w[k]);
}

INLINE void keep_sign(vec w[4]) {
    for (int k = 0; k < 4; k++) w[k] = with_sign(w[k]);
}

/* Blocks of 32 columns: the scale and the minimum of the one at `at`, and the weights of half of it. */

INLINE void scale_q4_0(const rows *row, size_t at, vecf *scale, vecf *min) {
    vec head[4];
    load_lanes(row, at, head);
    *scale = low_halves(head[0]);
    *min = high_halves(head[0] ^ splat32(INT32_MIN)); /* it is stored as what is added */
}
#define scale_q4_1 scale_q4_0
#define scale_q5_0 scale_q4_0
#define scale_q5_1 scale_q4_0
#define scale_q8_0 scale_q4_0
#define scale_iq4_nl scale_q4_0

/* The scales of MXFP4 are powers of two, halved: see mer_e8m0_half. */
INLINE void scale_mxfp4(const rows *row, size_t at, vecf *scale, vecf *min) {
    vec head[4];
    load_lanes(row, at, head);
    const vec e = head[0] & splat32(0xff);
    const vec normal = V(slli_epi32)(V(sub_epi32)(e, splat32(1)), 23);
    const vec tiny = V(sllv_epi32)(splat32(0x00200000), V(min_epi32)(e, splat32(1)));
    *scale = *min = AS_FLOATS(V(max_epi32)(normal, tiny));
}

INLINE void weights_q4_0(const rows *row, size_t at, const int half, vec w[4]) { load_nibbles(row, at + 2, half, w); }

INLINE void weights_q4_1(const rows *row, size_t at, const int half, vec w[4]) { load_nibbles(row, at + 4, half, w); }

INLINE void weights_q5_0(const rows *row, size_t at, const int half, vec w[4]) {
    vec head[4];
    load_lanes(row, at, head);
    load_nibbles(row, at + 6, half, w);
    add_fifth_bits(V(srli_epi32)(head[0], 16) | V(slli_epi32)(head[1], 16), half, w);
}

INLINE void weights_q5_1(const rows *row, size_t at, const int half, vec w[4]) {
    vec head[4];
    load_lanes(row, at, head);
    load_nibbles(row, at + 8, half, w);
    add_fifth_bits(head[1], half, w);
}

INLINE void weights_q8_0(const rows *row, size_t at, const int half, vec w[4]) {
    load_lanes(row, at + 2 + (size_t)half * 16, w);
    keep_sign(w);
}

INLINE void weights_iq4_nl(const rows *row, size_t at, const int half, vec w[4]) {
    load_nibbles(row, at + 2, half, w);
    look_up(table16(mer_iq4), w);
    keep_sign(w);
}

INLINE void weights_mxfp4(const rows *row, size_t at, const int half, vec w[4]) {
    load_nibbles(row, at + 1, half, w);
    look_up(V(add_epi8)(table16(mer_e2m1), splat(16)), w);
}

/* Blocks of 256 columns: the scales of the one at `at`, and the weights of half of each block of 32 that has its bits in
 * the same bytes: of j, j + 1 (Q4_K, Q5_K), j + 2 and j + 3 (Q2_K, Q3_K, Q6_K). */

INLINE void scales_q4_k(const rows *row, size_t at, scales *s) {
    vec h[4];
    load_lanes(row, at, h);
    s->d = low_halves(h[0]);
    s->dmin = high_halves(h[0]);
    bytes_to_floats(h[1] & splat(63), s->scale);
    bytes_to_floats((h[3] & splat(15)) | moved(h[1], 6, 4, 3), s->scale + 4);
    bytes_to_floats(h[2] & splat(63), s->min);
    bytes_to_floats(bits(h[3], 4, 15) | moved(h[2], 6, 4, 3), s->min + 4);
}
#define scales_q5_k scales_q4_k

INLINE void weights_q4_k(const rows *row, size_t at, int j, const int half, vec w[4][4]) {
    vec raw[4];
    load_lanes(row, at + 16 + (size_t)(j + half) * 16, raw);
    for (int k = 0; k < 4; k++) {
        w[0][k] = bits(raw[k], 0, 15);
        w[1][k] = bits(raw[k], 4, 15);
    }
}

INLINE void weights_q5_k(const rows *row, size_t at, int j, const int half, vec w[4][4]) {
    vec fifth[4];
    load_lanes(row, at + 16 + (size_t)half * 16, fifth);
    weights_q4_k(row, at + 32, j, half, w);
    for (int k = 0; k < 4; k++) {
        w[0][k] |= where_bits(fifth[k], splat(1 << j), 16);
        w[1][k] |= where_bits(fifth[k], splat(2 << j), 16);
    }
}

INLINE void scales_q6_k(const rows *row, size_t at, scales *s) {
    vec x[4];
    load_lanes(row, at + 192, x);
    for (int i = 0; i < 4; i++) signed_bytes_to_floats(x[i], s->scale + 4 * i);
    load_lanes(row, at + 194, x);
    s->d = high_halves(x[3]);
}

INLINE void weights_q6_k(const rows *row, size_t at, int j, const int half, vec w[4][4]) {
    const size_t part = (size_t)half * 16;
    vec a[4], b[4], top[4];
    load_lanes(row, at + (size_t)j * 16 + part, a);
    load_lanes(row, at + (size_t)j * 16 + 32 + part, b);
    load_lanes(row, at + 128 + (size_t)j * 8 + part, top);
    for (int k = 0; k < 4; k++) {
        w[0][k] = bits(a[k], 0, 15) | moved(top[k], 0, 4, 3);
        w[1][k] = bits(b[k], 0, 15) | moved(top[k], 2, 4, 3);
        w[2][k] = bits(a[k], 4, 15) | moved(top[k], 4, 4, 3);
        w[3][k] = bits(b[k], 4, 15) | moved(top[k], 6, 4, 3);
    }
}

INLINE void scales_q2_k(const rows *row, size_t at, scales *s) {
    vec x[4];
    load_lanes(row, at, x);
    for (int i = 0; i < 4; i++) {
        bytes_to_floats(bits(x[i], 0, 15), s->scale + 4 * i);
        bytes_to_floats(bits(x[i], 4, 15), s->min + 4 * i);
    }
    load_lanes(row, at + 68, x);
    s->d = low_halves(x[3]);
    s->dmin = high_halves(x[3]);
}

INLINE void weights_q2_k(const rows *row, size_t at, int j, const int half, vec w[4][4]) {
    vec raw[4];
    load_lanes(row, at + 16 + (size_t)j * 8 + (size_t)half * 16, raw);
    for (int k = 0; k < 4; k++) {
        w[0][k] = bits(raw[k], 0, 3);
        w[1][k] = bits(raw[k], 2, 3);
        w[2][k] = bits(raw[k], 4, 3);
        w[3][k] = bits(raw[k], 6, 3);
    }
}

INLINE void scales_q3_k(const rows *row, size_t at, scales *s) {
    vec x[4];
    load_lanes(row, at + 92, x);
    UNROLL for (int i = 0; i < 4; i++) {
        const vec six = bits(x[1 + i % 2], 4 * (i / 2), 15) | moved(x[3], 2 * i, 4, 3);
        signed_bytes_to_floats(V(sub_epi8)(six, splat(32)), s->scale + 4 * i);
    }
    load_lanes(row, at + 94, x);
    s->d = high_halves(x[3]);
}

INLINE void weights_q3_k(const rows *row, size_t at, int j, const int half, vec w[4][4]) {
    vec third[4];
    weights_q2_k(row, at + 16, j, half, w);
    load_lanes(row, at + (size_t)half * 16, third);
    for (int k = 0; k < 4; k++)
        for (int i = 0; i < 4; i++) w[i][k] |= where_bits(third[k], splat(1 << (j + i)), 4);
}

INLINE void scales_iq4_xs(const rows *row, size_t at, scales *s) {
    vec head[4];
    load_lanes(row, at, head);
    s->d = low_halves(head[0]);
    UNROLL for (int j = 0; j < 8; j++) {
        const vec four = V(srli_epi32)(head[1], 4 * j) & splat32(15);
        const vec two = V(srli_epi32)(head[0], 16 + 2 * j) & splat32(3);
        s->scale[j] = V(cvtepi32_ps)(V(sub_epi32)(four | V(slli_epi32)(two, 4), splat32(32)));
    }
}

INLINE void weights_iq4_xs(const rows *row, size_t at, int j, const int half, vec w[4][4]) {
    load_nibbles(row, at + 8 + (size_t)j * 16, half, w[0]);
    look_up(table16(mer_iq4), w[0]);
    keep_sign(w[0]);
}

/* sum - (a number << shift) where `shift` is what was added to each weight. */
INLINE vec without_offset(vec n, const int32_t *sum, const int shift) {
    return shift ? V(sub_epi32)(n, V(slli_epi32)(splat32(*sum), shift)) : n;
}

/* What follows takes constants from the table: `group`, the columns that share a scale; `most`, see dot(); `shift`, 1 <<
 * shift having been added to each weight; `minima`, whether there are any. n: the sums of a block's products. */

/* The products of block b of 32, onto a row's sum. */
INLINE vecf add_block(vecf acc, vec n, vecf scale, vecf min, const mer_act_q8 *a, long b, const int shift,
                      const int minima) {
    const vecf d = V(mul_ps)(scale, V(set1_ps)(a->d[b]));
    acc = V(add_ps)(acc, V(mul_ps)(d, V(cvtepi32_ps)(without_offset(n, a->sum + b, shift))));
    return minima ? V(sub_ps)(acc, V(mul_ps)(min, V(set1_ps)(a->dsum[b]))) : acc;
}

/* Those of the 32 columns j of a block of 256, before they are multiplied by d. n: of each half, if that is a group.
 * Of two groups scale * n is exact, so that nothing hangs on the fused operation. */
INLINE vecf add_columns(vecf sum, const vec n[2], const scales *s, const int j, const mer_act_q8 *a, long b,
                        const int group, const int shift) {
    vecf x;
    if (group == 32)
        x = V(mul_ps)(V(cvtepi32_ps)(without_offset(n[0], a->sum + b, shift)), s->scale[j]);
    else {
        x = V(mul_ps)(V(cvtepi32_ps)(without_offset(n[0], a->half + 2 * b, shift)), s->scale[2 * j]);
        x = V(fmadd_ps)(V(cvtepi32_ps)(without_offset(n[1], a->half + 2 * b + 1, shift)), s->scale[2 * j + 1], x);
    }
    return V(add_ps)(sum, V(mul_ps)(x, V(set1_ps)(a->d[b])));
}

INLINE vecf add_minima(vecf min, const scales *s, const int j, const mer_act_q8 *a, long b, const int group) {
    if (group == 32) return V(add_ps)(min, V(mul_ps)(s->min[j], V(set1_ps)(a->dsum[b])));
    vecf m = V(mul_ps)(s->min[2 * j], V(cvtepi32_ps)(splat32(a->half[2 * b])));
    m = V(fmadd_ps)(s->min[2 * j + 1], V(cvtepi32_ps)(splat32(a->half[2 * b + 1])), m);
    return V(add_ps)(min, V(mul_ps)(m, V(set1_ps)(a->d[b])));
}

INLINE vecf add_k_block(vecf acc, vecf sum, vecf min, const scales *s, const int minima) {
    acc = V(add_ps)(acc, V(mul_ps)(s->d, sum));
    return minima ? V(sub_ps)(acc, V(mul_ps)(s->dmin, min)) : acc;
}

/* n_tok tokens more, a constant so that the loops unroll: onto their sums, the blocks of a unit from column 32 b on. */
INLINE void add_unit(const int n_tok, const unit *u, const mer_act_q8 *a, long b, const int n_blocks, const int group,
                     const int most, const int shift, const int minima, vecf *acc) {
    vecf sum[TOKENS], min[TOKENS];
    UNROLL for (int t = 0; t < n_tok; t++) sum[t] = group ? V(setzero_ps)() : acc[t];
    UNROLL for (int t = 0; t < n_tok; t++) min[t] = V(setzero_ps)();
    for (int j = 0; j < n_blocks; j++)
        UNROLL for (int t = 0; t < n_tok; t++) {
            const int8_t *const q = a[t].q + (b + j) * 32;
            vec n[2];
            n[0] = dot(u->w[j], q, group == 16 ? 4 : 8, most);
            if (group == 16) n[1] = dot(u->w[j] + 4, q + 16, 4, most);
            if (group == 0)
                sum[t] = add_block(sum[t], n[0], u->s.scale[j], u->s.min[j], a + t, b + j, shift, minima);
            else {
                sum[t] = add_columns(sum[t], n, &u->s, j, a + t, b + j, group, shift);
                if (minima) min[t] = add_minima(min[t], &u->s, j, a + t, b + j, group);
            }
        }
    UNROLL for (int t = 0; t < n_tok; t++) acc[t] = group ? add_k_block(acc[t], sum[t], min[t], &u->s, minima) : sum[t];
}

/* All of a unit's tokens. There is room for more tokens than there are. */
#define ADD_UNIT(...)                                                                              \
    for (long t = 0; t < n_tok; t += TOKENS)                                                       \
        if (n_tok - t > TOKENS / 2)                                                                \
            add_unit(TOKENS, &u, a + t, __VA_ARGS__, acc + t);                                     \
        else                                                                                       \
            add_unit(TOKENS / 2, &u, a + t, __VA_ARGS__, acc + t);

/* Multiplies one group of rows with n_tok tokens. */
typedef void (*rows_fn)(const rows *row, const mer_ahead *ahead, const mer_act_q8 *a, long n_tok, long cols, vecf *acc);

static void product(rows_fn multiply, int id, const void *w, long cols, long r0, long r1, const void *const *acts,
                    long n_tok, float *y, long y_stride) {
    const size_t bytes = mer_row_bytes(id, cols);
    const mer_ahead run = ahead_begin((const char *)w + (size_t)r0 * bytes, ROWS * bytes);
    for (long t0 = 0; t0 < n_tok; t0 += STRIP) {
        const long n = n_tok - t0 < STRIP ? n_tok - t0 : STRIP;
        mer_act_q8 a[STRIP + TOKENS];
        for (long t = 0; t < n + TOKENS; t++) a[t] = mer_act_view(acts[t0 + (t < n ? t : n - 1)], cols);
        for (long r = r0; r < r1; r += ROWS) {
            const rows row = open_rows((const char *)w + (size_t)r * bytes, bytes, r1 - r);
            vecf acc[STRIP + TOKENS];
            for (long t = 0; t < n + TOKENS; t++) acc[t] = V(setzero_ps)();
            multiply(&row, &run, a, n, cols, acc);
            for (long t = 0; t < n; t++) store_rows(y + (t0 + t) * y_stride + r, acc[t], r1 - r);
        }
    }
}

#define PRODUCT(NAME, ID)                                                                                    \
    static void rows_##NAME(const rows *row, const mer_ahead *ahead, const mer_act_q8 *a, long n_tok,         \
                            long cols, vecf *acc) {                                                           \
        if (n_tok > FEW)                                                                                      \
            many_##NAME(row, ahead, a, n_tok, cols, acc);                                                     \
        else if (n_tok == FEW)                                                                                \
            few_##NAME(FEW, row, ahead, a, cols, acc);                                                        \
        else                                                                                                  \
            few_##NAME(1, row, ahead, a, cols, acc);                                                          \
    }                                                                                                         \
    void FUNCTION(NAME)(const void *w, long cols, long r0, long r1, const void *const *acts, long n_tok,      \
                        float *y, long y_stride) {                                                            \
        product(rows_##NAME, ID, w, cols, r0, r1, acts, n_tok, y, y_stride);                                  \
    }

#define BLOCKS(NAME, ID, MOST, SHIFT, MINIMA)                                                                \
    INLINE void few_##NAME(const int n_tok, const rows *row, const mer_ahead *ahead, const mer_act_q8 *a,     \
                           long cols, vecf *acc) {                                                            \
        const size_t bytes = mer_row_bytes(ID, 32);                                                           \
        for (long b = 0; b < cols / 32; b++) {                                                                \
            const size_t at = (size_t)b * bytes;                                                              \
            vecf scale, min;                                                                                  \
            vec w[8];                                                                                         \
            ahead_step(*ahead, first_row(row) + ROWS * at, ROWS * bytes);                                     \
            scale_##NAME(row, at, &scale, &min);                                                              \
            weights_##NAME(row, at, 0, w);                                                                    \
            weights_##NAME(row, at, 1, w + 4);                                                                \
            UNROLL for (int t = 0; t < n_tok; t++) {                                                          \
                const vec n = dot(w, a[t].q + b * 32, 8, MOST);                                               \
                acc[t] = add_block(acc[t], n, scale, min, a + t, b, SHIFT, MINIMA);                           \
            }                                                                                                 \
        }                                                                                                     \
    }                                                                                                         \
    static void many_##NAME(const rows *row, const mer_ahead *ahead, const mer_act_q8 *a, long n_tok,         \
                            long cols, vecf *acc) {                                                           \
        const size_t bytes = mer_row_bytes(ID, 32);                                                           \
        for (long b = 0, n; b < cols / 32; b += n) {                                                          \
            n = cols / 32 - b < SUBS ? cols / 32 - b : SUBS;                                                  \
            unit u;                                                                                           \
            for (long j = 0; j < n; j++) {                                                                    \
                const size_t at = (size_t)(b + j) * bytes;                                                    \
                ahead_step(*ahead, first_row(row) + ROWS * at, ROWS * bytes);                                 \
                scale_##NAME(row, at, u.s.scale + j, u.s.min + j);                                            \
                weights_##NAME(row, at, 0, u.w[j]);                                                           \
                weights_##NAME(row, at, 1, u.w[j] + 4);                                                       \
            }                                                                                                 \
            ADD_UNIT(b, (int)n, 0, MOST, SHIFT, MINIMA)                                                       \
        }                                                                                                     \
    }                                                                                                         \
    PRODUCT(NAME, ID)

/* TOGETHER: the blocks of 32 that weights_NAME() gives at once. */
#define K_BLOCKS(NAME, ID, TOGETHER, GROUP, MOST, SHIFT, MINIMA)                                             \
    INLINE void few_##NAME(const int n_tok, const rows *row, const mer_ahead *ahead, const mer_act_q8 *a,     \
                           long cols, vecf *acc) {                                                            \
        const size_t bytes = mer_row_bytes(ID, 256), share = ROWS * bytes / (SUBS / TOGETHER);                \
        for (long b = 0; b < cols / 256; b++) {                                                               \
            const size_t at = (size_t)b * bytes;                                                              \
            scales s;                                                                                         \
            vecf sum[FEW], min[FEW];                                                                          \
            scales_##NAME(row, at, &s);                                                                       \
            UNROLL for (int t = 0; t < n_tok; t++) sum[t] = min[t] = V(setzero_ps)();                         \
            _Pragma("GCC unroll 2") for (int j = 0; j < SUBS; j += TOGETHER) {                                \
                vec n[TOGETHER][FEW][2];                                                                      \
                ahead_step(*ahead, first_row(row) + ROWS * at + (size_t)(j / TOGETHER) * share, share);       \
                UNROLL for (int half = 0; half < 2; half++) {                                                 \
                    vec w[4][4];                                                                              \
                    weights_##NAME(row, at, j, half, w);                                                      \
                    UNROLL for (int i = 0; i < TOGETHER; i++)                                                 \
                        UNROLL for (int t = 0; t < n_tok; t++)                                                \
                            n[i][t][half] = dot(w[i], a[t].q + b * 256 + (j + i) * 32 + half * 16, 4, MOST);  \
                }                                                                                             \
                UNROLL for (int i = 0; i < TOGETHER; i++)                                                     \
                    UNROLL for (int t = 0; t < n_tok; t++) {                                                  \
                        const long at_act = b * SUBS + j + i;                                                 \
                        if (GROUP == 32) n[i][t][0] = V(add_epi32)(n[i][t][0], n[i][t][1]);                   \
                        sum[t] = add_columns(sum[t], n[i][t], &s, j + i, a + t, at_act, GROUP, SHIFT);        \
                        if (MINIMA) min[t] = add_minima(min[t], &s, j + i, a + t, at_act, GROUP);             \
                    }                                                                                         \
            }                                                                                                 \
            UNROLL for (int t = 0; t < n_tok; t++) acc[t] = add_k_block(acc[t], sum[t], min[t], &s, MINIMA);  \
        }                                                                                                     \
    }                                                                                                         \
    static void many_##NAME(const rows *row, const mer_ahead *ahead, const mer_act_q8 *a, long n_tok,         \
                            long cols, vecf *acc) {                                                           \
        const size_t bytes = mer_row_bytes(ID, 256);                                                          \
        for (long b = 0; b < cols / 256; b++) {                                                               \
            const size_t at = (size_t)b * bytes;                                                              \
            unit u;                                                                                           \
            ahead_step(*ahead, first_row(row) + ROWS * at, ROWS * bytes);                                     \
            scales_##NAME(row, at, &u.s);                                                                     \
            for (int j = 0; j < SUBS; j += TOGETHER)                                                          \
                UNROLL for (int half = 0; half < 2; half++) {                                                 \
                    vec w[4][4];                                                                              \
                    weights_##NAME(row, at, j, half, w);                                                      \
                    for (int i = 0; i < TOGETHER; i++)                                                        \
                        for (int k = 0; k < 4; k++) u.w[j + i][4 * half + k] = w[i][k];                       \
                }                                                                                             \
            ADD_UNIT(b * SUBS, SUBS, GROUP, MOST, SHIFT, MINIMA)                                              \
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
