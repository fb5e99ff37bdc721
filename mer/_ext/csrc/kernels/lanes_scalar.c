/* Products with blocks in plain C, which is also the definition of what the other instruction sets compute.
 *
 * A unit is a block of 32 columns or of 256, and within it there are groups of 32 or 16 columns with a scale and, where
 * the format has them, a minimum. The sum of products n over a group is an exact integer.
 *
 * Blocks of 32: one float, to which in ascending order d * a.d * n is added and from which m * a.dsum is taken.
 * Blocks of 256, whose scales and minima are integers: over each 32 columns scale * n (exact, in 24 bits; of two groups
 * of 16 the sum) times a.d, and min * a.dsum (of groups of 16: min * the sum of a.q, exact, times a.d) are added up in
 * two floats, which then, times d and dmin, are added to and taken from that of the row. */
#include "products.h"

typedef struct {
    int8_t q[256];
    int32_t scale[16], min[16]; /* in blocks of 256 */
    float d, m;
} unit;

static uint16_t load_u16(const uint8_t *p) {
    uint16_t v;
    memcpy(&v, p, 2);
    return v;
}

static uint32_t load_u32(const uint8_t *p) {
    uint32_t v;
    memcpy(&v, p, 4);
    return v;
}

static float load_f16(const uint8_t *p) { return mer_f16_to_f32(load_u16(p)); }

/* 16 bytes: the low halves are the first 16 elements, the high ones the others. */
static void nibbles(const uint8_t *p, int8_t *q) {
    for (int i = 0; i < 16; i++) {
        q[i] = p[i] & 15;
        q[16 + i] = (int8_t)(p[i] >> 4);
    }
}

static void look_up(const int8_t table[16], int8_t *q, int n) {
    for (int i = 0; i < n; i++) q[i] = table[q[i]];
}

/* `bits` of 32 bytes, from bit `shift` on, above those that q has below `at`. */
static void add_bits(const uint8_t *p, int shift, int bits, int at, int8_t *q) {
    for (int i = 0; i < 32; i++) q[i] = (int8_t)(q[i] | (((p[i] >> shift) & ((1 << bits) - 1)) << at));
}

static void add_fifth(uint32_t fifth, int8_t *q) {
    for (int i = 0; i < 32; i++) q[i] = (int8_t)(q[i] | ((fifth >> i) & 1) << 4);
}

static void subtract(int8_t *q, int n, int offset) {
    for (int i = 0; i < n; i++) q[i] = (int8_t)(q[i] - offset);
}

/* d; 16 bytes. */
static void unpack_q4_0(const uint8_t *p, unit *u) {
    u->d = load_f16(p);
    nibbles(p + 2, u->q);
    subtract(u->q, 32, 8);
}

/* d, m; 16 bytes. */
static void unpack_q4_1(const uint8_t *p, unit *u) {
    u->d = load_f16(p);
    u->m = -load_f16(p + 2);
    nibbles(p + 4, u->q);
}

/* d, 32 fifth bits, 16 bytes. */
static void unpack_q5_0(const uint8_t *p, unit *u) {
    u->d = load_f16(p);
    nibbles(p + 6, u->q);
    add_fifth(load_u32(p + 2), u->q);
    subtract(u->q, 32, 16);
}

static void unpack_q5_1(const uint8_t *p, unit *u) {
    u->d = load_f16(p);
    u->m = -load_f16(p + 2);
    nibbles(p + 8, u->q);
    add_fifth(load_u32(p + 4), u->q);
}

static void unpack_q8_0(const uint8_t *p, unit *u) {
    u->d = load_f16(p);
    memcpy(u->q, p + 2, 32);
}

/* d, 16 bytes of codes that choose a value. */
static void unpack_iq4_nl(const uint8_t *p, unit *u) {
    u->d = load_f16(p);
    nibbles(p + 2, u->q);
    look_up(mer_iq4, u->q, 32);
}

/* An exponent, 16 bytes of codes that choose a value. */
static void unpack_mxfp4(const uint8_t *p, unit *u) {
    u->d = mer_e8m0_half(p[0]);
    nibbles(p + 1, u->q);
    look_up(mer_e2m1, u->q, 32);
}

/* 16 scales and minima of four bits, 64 bytes of four elements each, d, dmin. */
static void unpack_q2_k(const uint8_t *p, unit *u) {
    u->d = load_f16(p + 80);
    u->m = load_f16(p + 82);
    for (int g = 0; g < 16; g++) {
        u->scale[g] = p[g] & 15;
        u->min[g] = p[g] >> 4;
    }
    memset(u->q, 0, 256);
    for (int n = 0; n < 8; n++) add_bits(p + 16 + n / 4 * 32, 2 * (n % 4), 2, 0, u->q + n * 32);
}

/* 32 bytes of third bits, 64 of four elements each, 16 scales of six bits, d. */
static void unpack_q3_k(const uint8_t *p, unit *u) {
    const uint8_t *const packed = p + 96;
    u->d = load_f16(p + 108);
    memset(u->q, 0, 256);
    for (int g = 0; g < 16; g++) {
        const int four = g < 8 ? packed[g] & 15 : packed[g - 8] >> 4;
        const int two = (packed[8 + g % 4] >> (2 * (g / 4))) & 3;
        u->scale[g] = (four | two << 4) - 32;
    }
    for (int n = 0; n < 8; n++) {
        add_bits(p + 32 + n / 4 * 32, 2 * (n % 4), 2, 0, u->q + n * 32);
        add_bits(p, n, 1, 2, u->q + n * 32);
    }
    subtract(u->q, 256, 4);
}

/* d, dmin, eight scales and minima of six bits. */
static void unpack_k_head(const uint8_t *p, unit *u) {
    uint8_t sc[16];
    u->d = load_f16(p);
    u->m = load_f16(p + 2);
    mer_q4_k_unpack(p + 4, sc);
    for (int g = 0; g < 8; g++) {
        u->scale[g] = sc[g];
        u->min[g] = sc[8 + g];
    }
}

/* The head; for each two groups 32 bytes. */
static void unpack_q4_k(const uint8_t *p, unit *u) {
    unpack_k_head(p, u);
    memset(u->q, 0, 256);
    for (int n = 0; n < 8; n++) add_bits(p + 16 + n / 2 * 32, 4 * (n % 2), 4, 0, u->q + n * 32);
}

/* The head, 32 bytes of fifth bits, 128 as Q4_K's. */
static void unpack_q5_k(const uint8_t *p, unit *u) {
    unpack_k_head(p, u);
    memset(u->q, 0, 256);
    for (int n = 0; n < 8; n++) {
        add_bits(p + 48 + n / 2 * 32, 4 * (n % 2), 4, 0, u->q + n * 32);
        add_bits(p + 16, n, 1, 4, u->q + n * 32);
    }
}

/* 128 bytes of low halves, 64 of upper quarters, 16 scales (int8), d. */
static void unpack_q6_k(const uint8_t *p, unit *u) {
    u->d = load_f16(p + 208);
    for (int g = 0; g < 16; g++) u->scale[g] = (int8_t)p[192 + g];
    memset(u->q, 0, 256);
    for (int n = 0; n < 8; n++) {
        add_bits(p + n / 4 * 64 + n % 2 * 32, n % 4 / 2 * 4, 4, 0, u->q + n * 32);
        add_bits(p + 128 + n / 4 * 32, 2 * (n % 4), 2, 4, u->q + n * 32);
    }
    subtract(u->q, 256, 32);
}

/* d, eight scales of six bits (upper quarters first), 128 bytes as IQ4_NL's. */
static void unpack_iq4_xs(const uint8_t *p, unit *u) {
    const unsigned high = load_u16(p + 2);
    u->d = load_f16(p);
    for (int g = 0; g < 8; g++) {
        const int scale = ((p[4 + g / 2] >> (4 * (g % 2))) & 15) | (int)((high >> (2 * g)) & 3) << 4;
        u->scale[g] = scale - 32;
        nibbles(p + 8 + g * 16, u->q + g * 32);
    }
    look_up(mer_iq4, u->q, 256);
}

static int32_t dot(const int8_t *w, const int8_t *q, int n) {
    int32_t sum = 0;
    for (int i = 0; i < n; i++) sum += w[i] * q[i];
    return sum;
}

static float add_block(float acc, const unit *u, const mer_act_q8 *a, long b, int minima) {
    acc += u->d * a->d[b] * (float)dot(u->q, a->q + b * 32, 32);
    if (minima) acc -= u->m * a->dsum[b];
    return acc;
}

static float add_k_block(float acc, const unit *u, const mer_act_q8 *a, long b, int group, int minima) {
    float sum = 0, min = 0;
    for (long j = 0; j < 8; j++) {
        const int8_t *const w = u->q + j * 32, *const q = a->q + (b + j) * 32;
        const int32_t *const half = a->half + (b + j) * 2, *const scale = u->scale + (group == 32 ? j : 2 * j);
        const int32_t *const m = u->min + (group == 32 ? j : 2 * j);
        const int32_t n = group == 32 ? scale[0] * dot(w, q, 32)
                                      : scale[0] * dot(w, q, 16) + scale[1] * dot(w + 16, q + 16, 16);
        sum += (float)n * a->d[b + j];
        if (minima && group == 32) min += (float)m[0] * a->dsum[b + j];
        if (minima && group == 16) min += (float)(m[0] * half[0] + m[1] * half[1]) * a->d[b + j];
    }
    acc += u->d * sum;
    if (minima) acc -= u->m * min;
    return acc;
}

#define PRODUCT(NAME, ID, COLUMNS, ADD)                                                                         \
    void mer_scalar_##NAME(const void *w, long cols, long r0, long r1, const void *const *acts, long n_tok,     \
                           float *y, long y_stride) {                                                           \
        const size_t bytes = mer_row_bytes(ID, cols), block = mer_row_bytes(ID, COLUMNS);                       \
        for (long r = r0; r < r1; r++)                                                                          \
            for (long t = 0; t < n_tok; t++) {                                                                  \
                const mer_act_q8 a = mer_act_view(acts[t], cols);                                               \
                float acc = 0;                                                                                  \
                for (long b = 0; b < cols / COLUMNS; b++) {                                                     \
                    unit u;                                                                                     \
                    unpack_##NAME((const uint8_t *)w + (size_t)r * bytes + (size_t)b * block, &u);              \
                    acc = ADD;                                                                                  \
                }                                                                                               \
                y[t * y_stride + r] = acc;                                                                      \
            }                                                                                                   \
    }
#define BLOCKS(NAME, ID, MINIMA) PRODUCT(NAME, ID, 32, add_block(acc, &u, &a, b, MINIMA))
#define K_BLOCKS(NAME, ID, GROUP, MINIMA) PRODUCT(NAME, ID, 256, add_k_block(acc, &u, &a, 8 * b, GROUP, MINIMA))

BLOCKS(q4_0, MER_Q4_0, 0)
BLOCKS(q4_1, MER_Q4_1, 1)
BLOCKS(q5_0, MER_Q5_0, 0)
BLOCKS(q5_1, MER_Q5_1, 1)
BLOCKS(q8_0, MER_Q8_0, 0)
BLOCKS(iq4_nl, MER_IQ4_NL, 0)
BLOCKS(mxfp4, MER_MXFP4, 0)
K_BLOCKS(q2_k, MER_Q2_K, 16, 1)
K_BLOCKS(q3_k, MER_Q3_K, 16, 0)
K_BLOCKS(q4_k, MER_Q4_K, 32, 1)
K_BLOCKS(q5_k, MER_Q5_K, 32, 1)
K_BLOCKS(q6_k, MER_Q6_K, 16, 0)
K_BLOCKS(iq4_xs, MER_IQ4_XS, 32, 0)
