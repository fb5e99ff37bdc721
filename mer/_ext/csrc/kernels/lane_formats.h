/* How each format of blocks is unpacked into lanes: included by lanes.h, whose vectors and loads these are. */
#ifndef MER_LANE_FORMATS_H
#define MER_LANE_FORMATS_H

/* 16 bytes are 32 columns: the low nibbles are the first half of them. */
INLINE void load_nibbles(const rows *row, size_t at, const int half, const int turned, vec w[4]) {
    load(row, at, turned, w);
    for (int k = 0; k < 4; k++) w[k] = bits(w[k], 4 * half, 15);
}

/* Bit i of the four bytes from byte `first` of the block on as bit 4 of column i: on top of the nibbles. */
INLINE void add_fifth_bits(const rows *row, size_t at, const int first, const int half, const int turned, vec w[4]) {
    static const int8_t lane[16] = {0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12};
    static const int8_t byte[16] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
    static const int8_t bit[16] = {1, 2, 4, 8, 16, 32, 64, -128, 1, 2, 4, 8, 16, 32, 64, -128};
    const int at_half = first + 2 * half;
    vec x[4];
    load(row, at, turned, x);
    for (int k = 0; k < 4; k++)
        if (turned) {
            const vec from = V(add_epi8)(table16(lane), splat(at_half % 4 + k / 2));
            const vec spread = V(shuffle_epi8)(x[at_half / 4], from);
            w[k] |= where_bits(spread, splat32(k % 2 ? (int)0x80402010u : 0x08040201), 16);
        } else
            w[k] |= where_bits(V(shuffle_epi8)(x[k], V(add_epi8)(table16(byte), splat(at_half))), table16(bit), 16);
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
    load(row, at, 1, head);
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
    load(row, at, 1, head);
    const vec e = head[0] & splat32(0xff);
    const vec normal = V(slli_epi32)(V(sub_epi32)(e, splat32(1)), 23);
    const vec tiny = V(sllv_epi32)(splat32(0x00200000), V(min_epi32)(e, splat32(1)));
    *scale = *min = AS_FLOATS(V(max_epi32)(normal, tiny));
}

INLINE void weights_q4_0(const rows *row, size_t at, const int half, const int turned, vec w[4]) {
    load_nibbles(row, at + 2, half, turned, w);
}

INLINE void weights_q4_1(const rows *row, size_t at, const int half, const int turned, vec w[4]) {
    load_nibbles(row, at + 4, half, turned, w);
}

INLINE void weights_q5_0(const rows *row, size_t at, const int half, const int turned, vec w[4]) {
    load_nibbles(row, at + 6, half, turned, w);
    add_fifth_bits(row, at, 2, half, turned, w);
}

INLINE void weights_q5_1(const rows *row, size_t at, const int half, const int turned, vec w[4]) {
    load_nibbles(row, at + 8, half, turned, w);
    add_fifth_bits(row, at, 4, half, turned, w);
}

INLINE void weights_q8_0(const rows *row, size_t at, const int half, const int turned, vec w[4]) {
    load(row, at + 2 + (size_t)half * 16, turned, w);
    keep_sign(w);
}

INLINE void weights_iq4_nl(const rows *row, size_t at, const int half, const int turned, vec w[4]) {
    load_nibbles(row, at + 2, half, turned, w);
    look_up(table16(mer_iq4), w);
    keep_sign(w);
}

INLINE void weights_mxfp4(const rows *row, size_t at, const int half, const int turned, vec w[4]) {
    load_nibbles(row, at + 1, half, turned, w);
    look_up(V(add_epi8)(table16(mer_e2m1), splat(16)), w);
}

/* Blocks of 256 columns: the scales of the one at `at`, and the weights of half of each block of 32 that has its bits in
 * the same bytes: of j, j + 1 (Q4_K, Q5_K), j + 2 and j + 3 (Q2_K, Q3_K, Q6_K). */

INLINE void scales_q4_k(const rows *row, size_t at, scales *s) {
    vec h[4];
    load(row, at, 1, h);
    s->d = low_halves(h[0]);
    s->dmin = high_halves(h[0]);
    bytes_to_floats(h[1] & splat(63), s->scale);
    bytes_to_floats((h[3] & splat(15)) | moved(h[1], 6, 4, 3), s->scale + 4);
    bytes_to_floats(h[2] & splat(63), s->min);
    bytes_to_floats(bits(h[3], 4, 15) | moved(h[2], 6, 4, 3), s->min + 4);
}
#define scales_q5_k scales_q4_k

INLINE void weights_q4_k(const rows *row, size_t at, int j, const int half, const int turned, vec w[4][4]) {
    vec raw[4];
    load(row, at + 16 + (size_t)(j + half) * 16, turned, raw);
    for (int k = 0; k < 4; k++) {
        w[0][k] = bits(raw[k], 0, 15);
        w[1][k] = bits(raw[k], 4, 15);
    }
}

INLINE void weights_q5_k(const rows *row, size_t at, int j, const int half, const int turned, vec w[4][4]) {
    vec fifth[4];
    load(row, at + 16 + (size_t)half * 16, turned, fifth);
    weights_q4_k(row, at + 32, j, half, turned, w);
    for (int k = 0; k < 4; k++) {
        w[0][k] |= where_bits(fifth[k], splat(1 << j), 16);
        w[1][k] |= where_bits(fifth[k], splat(2 << j), 16);
    }
}

INLINE void scales_q6_k(const rows *row, size_t at, scales *s) {
    vec x[4];
    load(row, at + 192, 1, x);
    for (int i = 0; i < 4; i++) signed_bytes_to_floats(x[i], s->scale + 4 * i);
    load(row, at + 194, 1, x);
    s->d = high_halves(x[3]);
}

INLINE void weights_q6_k(const rows *row, size_t at, int j, const int half, const int turned, vec w[4][4]) {
    const size_t part = (size_t)half * 16;
    vec a[4], b[4], top[4];
    load(row, at + (size_t)j * 16 + part, turned, a);
    load(row, at + (size_t)j * 16 + 32 + part, turned, b);
    load(row, at + 128 + (size_t)j * 8 + part, turned, top);
    for (int k = 0; k < 4; k++) {
        w[0][k] = bits(a[k], 0, 15) | moved(top[k], 0, 4, 3);
        w[1][k] = bits(b[k], 0, 15) | moved(top[k], 2, 4, 3);
        w[2][k] = bits(a[k], 4, 15) | moved(top[k], 4, 4, 3);
        w[3][k] = bits(b[k], 4, 15) | moved(top[k], 6, 4, 3);
    }
}

INLINE void scales_q2_k(const rows *row, size_t at, scales *s) {
    vec x[4];
    load(row, at, 1, x);
    for (int i = 0; i < 4; i++) {
        bytes_to_floats(bits(x[i], 0, 15), s->scale + 4 * i);
        bytes_to_floats(bits(x[i], 4, 15), s->min + 4 * i);
    }
    load(row, at + 68, 1, x);
    s->d = low_halves(x[3]);
    s->dmin = high_halves(x[3]);
}

INLINE void weights_q2_k(const rows *row, size_t at, int j, const int half, const int turned, vec w[4][4]) {
    vec raw[4];
    load(row, at + 16 + (size_t)j * 8 + (size_t)half * 16, turned, raw);
    for (int k = 0; k < 4; k++) {
        w[0][k] = bits(raw[k], 0, 3);
        w[1][k] = bits(raw[k], 2, 3);
        w[2][k] = bits(raw[k], 4, 3);
        w[3][k] = bits(raw[k], 6, 3);
    }
}

INLINE void scales_q3_k(const rows *row, size_t at, scales *s) {
    vec x[4];
    load(row, at + 92, 1, x);
    UNROLL for (int i = 0; i < 4; i++) {
        const vec six = bits(x[1 + i % 2], 4 * (i / 2), 15) | moved(x[3], 2 * i, 4, 3);
        signed_bytes_to_floats(V(sub_epi8)(six, splat(32)), s->scale + 4 * i);
    }
    load(row, at + 94, 1, x);
    s->d = high_halves(x[3]);
}

INLINE void weights_q3_k(const rows *row, size_t at, int j, const int half, const int turned, vec w[4][4]) {
    vec third[4];
    weights_q2_k(row, at + 16, j, half, turned, w);
    load(row, at + (size_t)half * 16, turned, third);
    for (int k = 0; k < 4; k++)
        for (int i = 0; i < 4; i++) w[i][k] |= where_bits(third[k], splat(1 << (j + i)), 4);
}

INLINE void scales_iq4_xs(const rows *row, size_t at, scales *s) {
    vec head[4];
    load(row, at, 1, head);
    s->d = low_halves(head[0]);
    UNROLL for (int j = 0; j < 8; j++) {
        const vec four = V(srli_epi32)(head[1], 4 * j) & splat32(15);
        const vec two = V(srli_epi32)(head[0], 16 + 2 * j) & splat32(3);
        s->scale[j] = V(cvtepi32_ps)(V(sub_epi32)(four | V(slli_epi32)(two, 4), splat32(32)));
    }
}

INLINE void weights_iq4_xs(const rows *row, size_t at, int j, const int half, const int turned, vec w[4][4]) {
    load_nibbles(row, at + 8 + (size_t)j * 16, half, turned, w[0]);
    look_up(table16(mer_iq4), w[0]);
    keep_sign(w[0]);
}

#endif
