/* Weight formats as GGUF lays them out, bit for bit, and the layout of prepared activations. */
#ifndef MER_FORMATS_H
#define MER_FORMATS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* The numbers are ggml's type ids. */
enum {
    MER_F32 = 0,
    MER_F16 = 1,
    MER_Q4_0 = 2,
    MER_Q4_1 = 3,
    MER_Q5_0 = 6,
    MER_Q5_1 = 7,
    MER_Q8_0 = 8,
    MER_Q2_K = 10,
    MER_Q3_K = 11,
    MER_Q4_K = 12,
    MER_Q5_K = 13,
    MER_Q6_K = 14,
    MER_IQ4_NL = 20,
    MER_IQ4_XS = 23,
    MER_BF16 = 30,
    MER_MXFP4 = 39,
    MER_FORMAT_IDS = 40, /* size of a table indexed by id */
};

/* Elements that share one activation scale. */
#define MER_ACT_BLOCK 32

#pragma pack(push, 1)
typedef struct {
    uint16_t d;     /* scale, F16 */
    uint8_t qs[16]; /* element i in the low nibble of byte i, i + 16 in the high one; value - 8 */
} mer_block_q4_0;

typedef struct {
    uint16_t d; /* scale, F16 */
    int8_t qs[32];
} mer_block_q8_0;

typedef struct {
    uint16_t d;         /* scale of the eight sub-block scales, F16 */
    uint16_t dmin;      /* scale of the eight sub-block minima, F16 */
    uint8_t scales[12]; /* eight 6-bit scales and eight 6-bit minima, see mer_q4_k_unpack */
    uint8_t qs[128];    /* 32 bytes per pair of sub-blocks: low nibbles the even one, high the odd one */
} mer_block_q4_k;

typedef struct {
    uint8_t e;      /* scale, a power of two: see mer_e8m0_half */
    uint8_t qs[16]; /* as Q4_0's, each a code of mer_e2m1 */
} mer_block_mxfp4;
#pragma pack(pop)

_Static_assert(sizeof(mer_block_q4_0) == 18, "Q4_0 block");
_Static_assert(sizeof(mer_block_q8_0) == 34, "Q8_0 block");
_Static_assert(sizeof(mer_block_q4_k) == 144, "Q4_K block");
_Static_assert(sizeof(mer_block_mxfp4) == 17, "MXFP4 block");

/* Block length in elements, 0 for an id that is not known. */
static inline long mer_block_len(int fmt) {
    switch (fmt) {
    case MER_F32:
    case MER_F16:
    case MER_BF16: return 1;
    case MER_Q4_0:
    case MER_Q4_1:
    case MER_Q5_0:
    case MER_Q5_1:
    case MER_IQ4_NL:
    case MER_MXFP4:
    case MER_Q8_0: return 32;
    case MER_Q2_K:
    case MER_Q3_K:
    case MER_Q4_K:
    case MER_Q5_K:
    case MER_Q6_K:
    case MER_IQ4_XS: return 256;
    default: return 0;
    }
}

/* Bytes of one encoded row; cols is a multiple of the block length. */
static inline size_t mer_row_bytes(int fmt, long cols) {
    switch (fmt) {
    case MER_F32: return 4 * (size_t)cols;
    case MER_F16:
    case MER_BF16: return 2 * (size_t)cols;
    case MER_Q4_0: return (size_t)(cols / 32) * sizeof(mer_block_q4_0);
    case MER_Q8_0: return (size_t)(cols / 32) * sizeof(mer_block_q8_0);
    case MER_Q4_K: return (size_t)(cols / 256) * sizeof(mer_block_q4_k);
    case MER_MXFP4: return (size_t)(cols / 32) * sizeof(mer_block_mxfp4);
    /* Their blocks are described where they are unpacked: kernels/lanes_scalar.c. */
    case MER_Q4_1: return (size_t)(cols / 32) * 20;
    case MER_Q5_0: return (size_t)(cols / 32) * 22;
    case MER_Q5_1: return (size_t)(cols / 32) * 24;
    case MER_IQ4_NL: return (size_t)(cols / 32) * 18;
    case MER_Q2_K: return (size_t)(cols / 256) * 84;
    case MER_Q3_K: return (size_t)(cols / 256) * 110;
    case MER_Q5_K: return (size_t)(cols / 256) * 176;
    case MER_Q6_K: return (size_t)(cols / 256) * 210;
    case MER_IQ4_XS: return (size_t)(cols / 256) * 136;
    default: return 0;
    }
}

/* The eight 6-bit scales and minima of a Q4_K block, one byte each: out[0..7] and out[8..15]. */
static inline void mer_q4_k_unpack(const uint8_t scales[12], uint8_t out[16]) {
    uint32_t a, b, c;
    memcpy(&a, scales, 4);
    memcpy(&b, scales + 4, 4);
    memcpy(&c, scales + 8, 4);
    const uint32_t sc_lo = a & 0x3f3f3f3fu;
    const uint32_t sc_hi = (c & 0x0f0f0f0fu) | ((a >> 2) & 0x30303030u);
    const uint32_t mn_lo = b & 0x3f3f3f3fu;
    const uint32_t mn_hi = ((c >> 4) & 0x0f0f0f0fu) | ((b >> 2) & 0x30303030u);
    memcpy(out, &sc_lo, 4);
    memcpy(out + 4, &sc_hi, 4);
    memcpy(out + 8, &mn_lo, 4);
    memcpy(out + 12, &mn_hi, 4);
}

static inline float mer_bits_f32(uint32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline uint32_t mer_f32_bits(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return bits;
}

/* Twice the values of the sixteen codes of a 4-bit float (sign, 2 bits of exponent, 1 of mantissa): integers. */
static const int8_t mer_e2m1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

/* 2^(e - 128): half of the scale that e stands for, since mer_e2m1 is doubled. */
static inline float mer_e8m0_half(uint8_t e) {
    return mer_bits_f32(e < 2 ? 0x00200000u << e : (uint32_t)(e - 1) << 23);
}

/* The values of the sixteen codes of IQ4_NL and IQ4_XS. */
static const int8_t mer_iq4[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

static inline float mer_bf16_to_f32(uint16_t h) { return mer_bits_f32((uint32_t)h << 16); }

static inline float mer_f16_to_f32(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    const uint32_t mag = h & 0x7fffu;
    if (mag >= 0x7c00u) /* infinity; a NaN comes out quiet, as from the F16C instruction */
        return mer_bits_f32(sign | 0x7f800000u | (mag << 13) | (mag > 0x7c00u ? 0x400000u : 0));
    if (mag >= 0x0400u) return mer_bits_f32(sign | ((mag << 13) + (112u << 23)));
    /* subnormal: mag * 2^-24, exact */
    const float f = (float)mag * 0x1p-24f;
    return sign ? -f : f;
}

/* A prepared activation row is plain f32 (for BF16, in parts, where an instruction set wants that), or int8 in
 * blocks of 32:
 *   q[cols]      int8      round-to-nearest-even of x * (127 / amax)
 *   d[nb]        float     amax / 127; NaN where the block holds a NaN or an infinity
 *   sum[nb]      int32     sum of q over the block
 *   dsum[nb]     float     d * sum
 *   half[2 nb]   int32     sum of q over each half of the block
 * every array padded to 64 bytes. A block whose largest magnitude is below 2^-100 counts as zero. */
typedef struct {
    const int8_t *q;
    const float *d;
    const int32_t *sum;
    const float *dsum;
    const int32_t *half;
} mer_act_q8;

#define MER_ACT_TINY 0x1p-100f

/* Every format of blocks. */
static inline int mer_act_is_q8(int fmt) { return mer_block_len(fmt) > 1; }

static inline size_t mer_pad64(size_t n) { return (n + 63) & ~(size_t)63; }

static inline size_t mer_act_bytes(int fmt, long cols) {
    if (fmt == MER_BF16) return 3 * mer_pad64(2 * (size_t)cols); /* room for three BF16 parts, see amx.c */
    if (!mer_act_is_q8(fmt)) return mer_pad64(4 * (size_t)cols);
    const size_t blocks = (size_t)(cols / MER_ACT_BLOCK);
    return mer_pad64((size_t)cols) + 3 * mer_pad64(4 * blocks) + mer_pad64(8 * blocks);
}

static inline mer_act_q8 mer_act_view(const void *act, long cols) {
    const char *p = act;
    const size_t q = mer_pad64((size_t)cols), n = mer_pad64(4 * (size_t)(cols / MER_ACT_BLOCK));
    mer_act_q8 a = {
        .q = (const int8_t *)p,
        .d = (const float *)(p + q),
        .sum = (const int32_t *)(p + q + n),
        .dsum = (const float *)(p + q + 2 * n),
        .half = (const int32_t *)(p + q + 3 * n),
    };
    return a;
}

#endif
