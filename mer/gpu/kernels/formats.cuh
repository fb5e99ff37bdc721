/* The formats of blocks: how 32 columns of a unit are unpacked; mer/_ext/csrc/kernels/lanes_scalar.c defines them.
 *
 * A unit (a block of 32 columns, or of 256) lies at byte `at` of shared memory, any alignment. words() gives, of its
 * columns 32 j .. 32 j + 31 as bytes, four to a word, words i and 4 + i, without the format's offset: that is taken
 * from the bytes, or OFFSET times the sum of the activations from the product, exact integers either way. */
#ifndef MER_FORMATS_CUH
#define MER_FORMATS_CUH

#include "mer_gpu.cuh"

/* Shared memory, by byte. */
struct bytes {
    const uint32_t *words;
    __device__ __forceinline__ uint32_t u8(int at) const { return ((const uint8_t *)words)[at]; }
    __device__ __forceinline__ uint32_t u16(int at) const { return u8(at) | u8(at + 1) << 8; }
    __device__ __forceinline__ float f16(int at) const { return f16_to_f32((uint16_t)u16(at)); }
    /* Word i of those that begin at a byte; the one behind it is read too. */
    __device__ __forceinline__ uint32_t word(int at, int i) const {
        const uint32_t *const p = words + (at >> 2) + i;
        return __funnelshift_r(p[0], p[1], 8 * (at & 3));
    }
};

/* Words i and 4 + i. */
struct two_words {
    uint32_t low, high;
};

/* The scales and minima of 32 columns in a block of 256; for groups of 16 two each. */
struct scales {
    int s0, s1, m0, m1;
};

/* 16 bytes: the low halves are the first 16 elements, the high ones the others. */
INLINE two_words nibbles(const bytes &p, int at, int i) {
    const uint32_t w = p.word(at, i);
    return {w & 0x0f0f0f0fu, w >> 4 & 0x0f0f0f0fu};
}

/* Four codes, the nibbles of the low half of `codes`, into the bytes they choose of a table of 16. */
INLINE uint32_t choose4(uint4 table, uint32_t codes) {
    const uint32_t low = __byte_perm(table.x, table.y, codes & 0x7777u);
    const uint32_t high = __byte_perm(table.z, table.w, codes & 0x7777u);
    return __byte_perm(low, high, 0x3210u | (codes & 0x8888u) >> 1);
}

INLINE two_words chosen_nibbles(const bytes &p, int at, int i, uint4 table) {
    const uint32_t w = p.word(at, i); /* its nibbles are elements 4 i, 16 + 4 i, 4 i + 1, ... */
    const uint32_t first = choose4(table, w), second = choose4(table, w >> 16);
    return {__byte_perm(first, second, 0x6420), __byte_perm(first, second, 0x7531)};
}

INLINE uint4 iq4_table() { return make_uint4(0xbfad9881u, 0xf6eaddcfu, 0x26190d01u, 0x71594535u); }
INLINE uint4 e2m1_table() { return make_uint4(0x03020100u, 0x0c080604u, 0xfdfeff00u, 0xf4f8fafcu); }

/* `mask` of 32 bytes from bit `shift` on. */
INLINE two_words take_bits(const bytes &p, int at, int i, int shift, uint32_t mask) {
    return {p.word(at, i) >> shift & mask, p.word(at, 4 + i) >> shift & mask};
}

/* The same above what w has, from bit `to` on. */
INLINE two_words add_bits(const bytes &p, int at, int i, int shift, uint32_t mask, int to, two_words w) {
    const two_words more = take_bits(p, at, i, shift, mask);
    return {w.low | more.low << to, w.high | more.high << to};
}

/* 32 bits, one for each element, as its fifth. */
INLINE two_words add_fifth(const bytes &p, int at, int i, two_words w) {
    const uint32_t fifth = p.word(at, 0) >> 4 * i; /* a bit of four to each byte: times 2^4 + 2^11 + 2^18 + 2^25 */
    return {w.low | ((fifth & 15u) * 0x02040810u & 0x10101010u), w.high | ((fifth >> 16 & 15u) * 0x02040810u & 0x10101010u)};
}

/* Blocks of 32: d, and where MINIMA the minimum m. */
template <int BYTES_, int OFFSET_, bool MINIMA_> struct block32 {
    static constexpr int COLS = 32, GROUP = 32, BYTES = BYTES_, OFFSET = OFFSET_;
    static constexpr bool MINIMA = MINIMA_;
    INLINE float d(const bytes &p, int at) { return p.f16(at); }
    INLINE float m(const bytes &p, int at) { return MINIMA ? -p.f16(at + 2) : 0.0f; }
};

struct fmt_q4_0 : block32<18, 8, false> {
    INLINE two_words words(const bytes &p, int at, int, int i) { return nibbles(p, at + 2, i); }
};

struct fmt_q4_1 : block32<20, 0, true> {
    INLINE two_words words(const bytes &p, int at, int, int i) { return nibbles(p, at + 4, i); }
};

struct fmt_q5_0 : block32<22, 16, false> {
    INLINE two_words words(const bytes &p, int at, int, int i) {
        return add_fifth(p, at + 2, i, nibbles(p, at + 6, i));
    }
};

struct fmt_q5_1 : block32<24, 0, true> {
    INLINE two_words words(const bytes &p, int at, int, int i) {
        return add_fifth(p, at + 4, i, nibbles(p, at + 8, i));
    }
};

struct fmt_q8_0 : block32<34, 0, false> {
    INLINE two_words words(const bytes &p, int at, int, int i) {
        return {p.word(at + 2, i), p.word(at + 2, 4 + i)};
    }
};

struct fmt_iq4_nl : block32<18, 0, false> {
    INLINE two_words words(const bytes &p, int at, int, int i) {
        return chosen_nibbles(p, at + 2, i, iq4_table());
    }
};

struct fmt_mxfp4 : block32<17, 0, false> {
    INLINE float d(const bytes &p, int at) {
        const uint32_t e = p.u8(at);
        return __uint_as_float(e < 2 ? 0x00200000u << e : (e - 1) << 23);
    }
    INLINE two_words words(const bytes &p, int at, int, int i) {
        return chosen_nibbles(p, at + 1, i, e2m1_table());
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
    INLINE two_words words(const bytes &p, int at, int j, int i) {
        return take_bits(p, at + 16 + j / 4 * 32, i, 2 * (j % 4), 0x03030303u);
    }
    INLINE scales scale(const bytes &p, int at, int j) {
        const int a = (int)p.u8(at + 2 * j), b = (int)p.u8(at + 2 * j + 1);
        return {a & 15, b & 15, a >> 4, b >> 4};
    }
};

struct fmt_q3_k : block256<110, 16, 4, 108, false> {
    INLINE two_words words(const bytes &p, int at, int j, int i) {
        return add_bits(p, at, i, j, 0x01010101u, 2, take_bits(p, at + 32 + j / 4 * 32, i, 2 * (j % 4), 0x03030303u));
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
    const int scale = j < 4 ? low & 63 : (high & 15) | low >> 6 << 4;
    return {scale, 0, j < 4 ? mid & 63 : high >> 4 | mid >> 6 << 4, 0};
}

struct fmt_q4_k : block256<144, 32, 0, 0, true> {
    INLINE two_words words(const bytes &p, int at, int j, int i) {
        return take_bits(p, at + 16 + j / 2 * 32, i, 4 * (j % 2), 0x0f0f0f0fu);
    }
    INLINE scales scale(const bytes &p, int at, int j) { return six_bits(p, at + 4, j); }
};

struct fmt_q5_k : block256<176, 32, 0, 0, true> {
    INLINE two_words words(const bytes &p, int at, int j, int i) {
        return add_bits(p, at + 16, i, j, 0x01010101u, 4, take_bits(p, at + 48 + j / 2 * 32, i, 4 * (j % 2), 0x0f0f0f0fu));
    }
    INLINE scales scale(const bytes &p, int at, int j) { return six_bits(p, at + 4, j); }
};

struct fmt_q6_k : block256<210, 16, 32, 208, false> {
    INLINE two_words words(const bytes &p, int at, int j, int i) {
        return add_bits(p, at + 128 + j / 4 * 32, i, 2 * (j % 4), 0x03030303u, 4, take_bits(p, at + j / 4 * 64 + j % 2 * 32, i, j % 4 / 2 * 4, 0x0f0f0f0fu));
    }
    INLINE scales scale(const bytes &p, int at, int j) {
        return {(int8_t)p.u8(at + 192 + 2 * j), (int8_t)p.u8(at + 193 + 2 * j), 0, 0};
    }
};

struct fmt_iq4_xs : block256<136, 32, 0, 0, false> {
    INLINE two_words words(const bytes &p, int at, int j, int i) {
        return chosen_nibbles(p, at + 8 + 16 * j, i, iq4_table());
    }
    INLINE scales scale(const bytes &p, int at, int j) {
        const uint32_t low = p.u8(at + 4 + j / 2) >> 4 * (j % 2) & 15, high = p.u16(at + 2) >> 2 * j & 3;
        return {(int)(low | high << 4) - 32, 0, 0, 0};
    }
};

#endif
