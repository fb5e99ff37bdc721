/* The formats of blocks: how 32 columns of a unit are unpacked; mer/_ext/csrc/kernels/lanes_scalar.c defines them.
 *
 * A unit (a block of 32 columns, or of 256) lies at byte `at` of shared memory, any alignment. weights() gives columns
 * 32 j .. 32 j + 31 as bytes, four to a word, without the format's offset: for that OFFSET times the sum of the
 * activations is taken from the product, an exact integer either way. */
#ifndef MER_FORMATS_CUH
#define MER_FORMATS_CUH

#include "mer_gpu.cuh"

/* Shared memory, by byte. */
struct bytes {
    const uint32_t *words;
    __device__ __forceinline__ uint32_t u8(int at) const { return ((const uint8_t *)words)[at]; }
    __device__ __forceinline__ uint32_t u16(int at) const { return u8(at) | u8(at + 1) << 8; }
    __device__ __forceinline__ float f16(int at) const { return f16_to_f32((uint16_t)u16(at)); }
    /* N words from any address; the word behind them is read too. */
    template <int N> __device__ __forceinline__ void load(int at, uint32_t *w) const {
        const uint32_t *const p = words + (at >> 2), shift = 8 * (at & 3);
        uint32_t low = p[0];
#pragma unroll
        for (int i = 0; i < N; i++) {
            const uint32_t high = p[i + 1];
            w[i] = __funnelshift_r(low, high, shift);
            low = high;
        }
    }
};

/* The scales and minima of 32 columns in a block of 256; for groups of 16 two each. */
struct scales {
    int s0, s1, m0, m1;
};

/* 16 bytes: the low halves are the first 16 elements, the high ones the others. */
INLINE void nibbles(const bytes &p, int at, uint32_t *w) {
    p.load<4>(at, w);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        w[4 + i] = w[i] >> 4 & 0x0f0f0f0fu;
        w[i] &= 0x0f0f0f0fu;
    }
}

/* Four codes, the nibbles of the low half of `codes`, into the bytes they choose of a table of 16. */
INLINE uint32_t choose4(uint4 table, uint32_t codes) {
    const uint32_t low = __byte_perm(table.x, table.y, codes & 0x7777u);
    const uint32_t high = __byte_perm(table.z, table.w, codes & 0x7777u);
    return __byte_perm(low, high, 0x3210u | (codes & 0x8888u) >> 1);
}

INLINE void chosen_nibbles(const bytes &p, int at, uint4 table, uint32_t *w) {
    p.load<4>(at, w);
#pragma unroll
    for (int i = 0; i < 4; i++) { /* the nibbles of a word are elements 4 i, 16 + 4 i, 4 i + 1, ... */
        const uint32_t first = choose4(table, w[i]), second = choose4(table, w[i] >> 16);
        w[i] = __byte_perm(first, second, 0x6420);
        w[4 + i] = __byte_perm(first, second, 0x7531);
    }
}

INLINE uint4 iq4_table() { return make_uint4(0xbfad9881u, 0xf6eaddcfu, 0x26190d01u, 0x71594535u); }
INLINE uint4 e2m1_table() { return make_uint4(0x03020100u, 0x0c080604u, 0xfdfeff00u, 0xf4f8fafcu); }

/* `mask` of 32 bytes from bit `shift` on. */
INLINE void take_bits(const bytes &p, int at, int shift, uint32_t mask, uint32_t *w) {
    p.load<8>(at, w);
#pragma unroll
    for (int i = 0; i < 8; i++) w[i] = w[i] >> shift & mask;
}

/* The same above what w has, from bit `to` on. */
INLINE void add_bits(const bytes &p, int at, int shift, uint32_t mask, int to, uint32_t *w) {
    uint32_t more[8];
    take_bits(p, at, shift, mask, more);
#pragma unroll
    for (int i = 0; i < 8; i++) w[i] |= more[i] << to;
}

INLINE void add_fifth(const bytes &p, int at, uint32_t *w) {
    uint32_t fifth;
    p.load<1>(at, &fifth);
#pragma unroll
    for (int i = 0; i < 8; i++) w[i] |= ((fifth >> 4 * i & 15u) * 0x02040810u) & 0x10101010u;
}

/* Blocks of 32: d, and where MINIMA the minimum m. */
template <int BYTES_, int OFFSET_, bool MINIMA_> struct block32 {
    static constexpr int COLS = 32, GROUP = 32, BYTES = BYTES_, OFFSET = OFFSET_;
    static constexpr bool MINIMA = MINIMA_;
    INLINE float d(const bytes &p, int at) { return p.f16(at); }
    INLINE float m(const bytes &p, int at) { return MINIMA ? -p.f16(at + 2) : 0.0f; }
};

struct fmt_q4_0 : block32<18, 8, false> {
    INLINE void weights(const bytes &p, int at, int, uint32_t *w) { nibbles(p, at + 2, w); }
};

struct fmt_q4_1 : block32<20, 0, true> {
    INLINE void weights(const bytes &p, int at, int, uint32_t *w) { nibbles(p, at + 4, w); }
};

struct fmt_q5_0 : block32<22, 16, false> {
    INLINE void weights(const bytes &p, int at, int, uint32_t *w) {
        nibbles(p, at + 6, w);
        add_fifth(p, at + 2, w);
    }
};

struct fmt_q5_1 : block32<24, 0, true> {
    INLINE void weights(const bytes &p, int at, int, uint32_t *w) {
        nibbles(p, at + 8, w);
        add_fifth(p, at + 4, w);
    }
};

struct fmt_q8_0 : block32<34, 0, false> {
    INLINE void weights(const bytes &p, int at, int, uint32_t *w) { p.load<8>(at + 2, w); }
};

struct fmt_iq4_nl : block32<18, 0, false> {
    INLINE void weights(const bytes &p, int at, int, uint32_t *w) {
        chosen_nibbles(p, at + 2, iq4_table(), w);
    }
};

struct fmt_mxfp4 : block32<17, 0, false> {
    INLINE float d(const bytes &p, int at) {
        const uint32_t e = p.u8(at);
        return __uint_as_float(e < 2 ? 0x00200000u << e : (e - 1) << 23);
    }
    INLINE void weights(const bytes &p, int at, int, uint32_t *w) {
        chosen_nibbles(p, at + 1, e2m1_table(), w);
    }
};

/* Blocks of 256: d at D, and where there are minima their scale 2 bytes behind. */
template <int BYTES_, int GROUP_, int OFFSET_, int D, bool MINIMA_> struct block256 {
    static constexpr int COLS = 256, GROUP = GROUP_, BYTES = BYTES_, OFFSET = OFFSET_;
    static constexpr bool MINIMA = MINIMA_;
    INLINE float d(const bytes &p, int at) { return p.f16(at + D); }
    INLINE float m(const bytes &p, int at) { return MINIMA ? p.f16(at + D + 2) : 0.0f; }
};

struct fmt_q2_k : block256<84, 16, 0, 80, true> {
    INLINE void weights(const bytes &p, int at, int j, uint32_t *w) {
        take_bits(p, at + 16 + j / 4 * 32, 2 * (j % 4), 0x03030303u, w);
    }
    INLINE scales scale(const bytes &p, int at, int j) {
        const int a = (int)p.u8(at + 2 * j), b = (int)p.u8(at + 2 * j + 1);
        return {a & 15, b & 15, a >> 4, b >> 4};
    }
};

struct fmt_q3_k : block256<110, 16, 4, 108, false> {
    INLINE void weights(const bytes &p, int at, int j, uint32_t *w) {
        take_bits(p, at + 32 + j / 4 * 32, 2 * (j % 4), 0x03030303u, w);
        add_bits(p, at, j, 0x01010101u, 2, w);
    }
    INLINE int one(const bytes &p, int at, int g) {
        const int four = (int)(p.u8(at + 96 + g % 8) >> g / 8 * 4 & 15), two = (int)(p.u8(at + 104 + g % 4) >> g / 4 * 2 & 3);
        return (four | two << 4) - 32;
    }
    INLINE scales scale(const bytes &p, int at, int j) {
        return {one(p, at, 2 * j), one(p, at, 2 * j + 1), 0, 0};
    }
};

/* Eight scales and minima of six bits in 12 bytes: see mer_q4_k_unpack. */
INLINE scales six_bits(const bytes &p, int at, int j) {
    const int low = (int)p.u8(at + (j & 3)), mid = (int)p.u8(at + 4 + (j & 3)), high = (int)p.u8(at + 8 + (j & 3));
    if (j < 4) return {low & 63, 0, mid & 63, 0};
    return {(high & 15) | low >> 6 << 4, 0, high >> 4 | mid >> 6 << 4, 0};
}

struct fmt_q4_k : block256<144, 32, 0, 0, true> {
    INLINE void weights(const bytes &p, int at, int j, uint32_t *w) {
        take_bits(p, at + 16 + j / 2 * 32, 4 * (j % 2), 0x0f0f0f0fu, w);
    }
    INLINE scales scale(const bytes &p, int at, int j) { return six_bits(p, at + 4, j); }
};

struct fmt_q5_k : block256<176, 32, 0, 0, true> {
    INLINE void weights(const bytes &p, int at, int j, uint32_t *w) {
        take_bits(p, at + 48 + j / 2 * 32, 4 * (j % 2), 0x0f0f0f0fu, w);
        add_bits(p, at + 16, j, 0x01010101u, 4, w);
    }
    INLINE scales scale(const bytes &p, int at, int j) { return six_bits(p, at + 4, j); }
};

struct fmt_q6_k : block256<210, 16, 32, 208, false> {
    INLINE void weights(const bytes &p, int at, int j, uint32_t *w) {
        take_bits(p, at + j / 4 * 64 + j % 2 * 32, j % 4 / 2 * 4, 0x0f0f0f0fu, w);
        add_bits(p, at + 128 + j / 4 * 32, 2 * (j % 4), 0x03030303u, 4, w);
    }
    INLINE scales scale(const bytes &p, int at, int j) {
        return {(int8_t)p.u8(at + 192 + 2 * j), (int8_t)p.u8(at + 193 + 2 * j), 0, 0};
    }
};

struct fmt_iq4_xs : block256<136, 32, 0, 0, false> {
    INLINE void weights(const bytes &p, int at, int j, uint32_t *w) {
        chosen_nibbles(p, at + 8 + 16 * j, iq4_table(), w);
    }
    INLINE scales scale(const bytes &p, int at, int j) {
        const uint32_t low = p.u8(at + 4 + j / 2) >> 4 * (j % 2) & 15, high = p.u16(at + 2) >> 2 * j & 3;
        return {(int)(low | high << 4) - 32, 0, 0, 0};
    }
};

#endif
