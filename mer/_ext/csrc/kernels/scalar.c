/* Plain C: the reference of the other instruction sets, and what runs where none of them can. */
#include "elementwise.h"
#include "units.h"

static void quantise(const float *x, void *act, long cols) {
    const mer_act_q8 a = mer_act_view(act, cols);
    for (long b = 0; b < cols / MER_ACT_BLOCK; b++)
        mer_quantise_block(x + b * MER_ACT_BLOCK, (int8_t *)a.q + b * MER_ACT_BLOCK, (float *)a.d + b,
                           (int32_t *)a.sum + b, (float *)a.dsum + b);
}

static void swiglu(const float *gate, const float *up, float *h, long n) {
    for (long i = 0; i < n; i++) h[i] = mer_swiglu1(gate[i], up[i]);
}

static void geglu(const float *gate, const float *up, float *h, long n) {
    for (long i = 0; i < n; i++) h[i] = mer_geglu1(gate[i], up[i]);
}

static void clamped_swiglu(const float *gate, const float *up, float *h, long n, float alpha, float limit) {
    for (long i = 0; i < n; i++) h[i] = mer_clamped_swiglu1(gate[i], up[i], alpha, limit);
}

static float dot_q4_0(const char *row, const void *act, long cols) {
    const mer_act_q8 a = mer_act_view(act, cols);
    const mer_block_q4_0 *w = (const mer_block_q4_0 *)row;
    float acc = 0;
    for (long b = 0; b < cols / 32; b++) {
        const int8_t *q = a.q + b * 32;
        int32_t n = 0;
        for (int i = 0; i < 16; i++) n += (w[b].qs[i] & 15) * q[i] + (w[b].qs[i] >> 4) * q[i + 16];
        acc += mer_f16_to_f32(w[b].d) * a.d[b] * (float)(n - 8 * a.sum[b]);
    }
    return acc;
}

static float dot_q8_0(const char *row, const void *act, long cols) {
    const mer_act_q8 a = mer_act_view(act, cols);
    const mer_block_q8_0 *w = (const mer_block_q8_0 *)row;
    float acc = 0;
    for (long b = 0; b < cols / 32; b++) {
        int32_t n = 0;
        for (int i = 0; i < 32; i++) n += w[b].qs[i] * a.q[b * 32 + i];
        acc += mer_f16_to_f32(w[b].d) * a.d[b] * (float)n;
    }
    return acc;
}

static float dot_mxfp4(const char *row, const void *act, long cols) {
    const mer_act_q8 a = mer_act_view(act, cols);
    const mer_block_mxfp4 *w = (const mer_block_mxfp4 *)row;
    float acc = 0;
    for (long b = 0; b < cols / 32; b++) {
        const int8_t *q = a.q + b * 32;
        int32_t n = 0;
        for (int i = 0; i < 16; i++) n += mer_e2m1[w[b].qs[i] & 15] * q[i] + mer_e2m1[w[b].qs[i] >> 4] * q[i + 16];
        acc += mer_e8m0_half(w[b].e) * a.d[b] * (float)n;
    }
    return acc;
}

static float dot_q4_k(const char *row, const void *act, long cols) {
    const mer_act_q8 a = mer_act_view(act, cols);
    const mer_block_q4_k *w = (const mer_block_q4_k *)row;
    float acc = 0;
    for (long b = 0; b < cols / 256; b++) {
        uint8_t sc[16];
        mer_q4_k_unpack(w[b].scales, sc);
        float s = 0, m = 0;
        for (int j = 0; j < 8; j++) {
            const int8_t *q = a.q + b * 256 + j * 32;
            const uint8_t *qs = w[b].qs + j / 2 * 32;
            int32_t n = 0;
            for (int i = 0; i < 32; i++) n += (j % 2 ? qs[i] >> 4 : qs[i] & 15) * q[i];
            s += (float)n * (float)sc[j] * a.d[b * 8 + j]; /* the first product is exact */
            m += (float)sc[8 + j] * a.dsum[b * 8 + j];
        }
        acc += mer_f16_to_f32(w[b].d) * s;
        acc -= mer_f16_to_f32(w[b].dmin) * m;
    }
    return acc;
}

#define UNIT_DOT(NAME, ID, UNIT, GROUP, MINIMA)                                                                \
    static float dot_##NAME(const char *row, const void *act, long cols) {                                     \
        const mer_act_q8 a = mer_act_view(act, cols);                                                          \
        const size_t unit_bytes = mer_row_bytes(ID, UNIT);                                                     \
        float acc = 0;                                                                                         \
        for (long b = 0; b < cols / UNIT; b++) {                                                               \
            mer_unit u;                                                                                        \
            mer_unit_##NAME((const uint8_t *)row + (size_t)b * unit_bytes, &u);                                \
            for (int g = 0; g < UNIT / GROUP; g++) {                                                           \
                const long at = b * UNIT + g * GROUP;                                                          \
                int32_t n = 0, sum = 0;                                                                        \
                for (int i = 0; i < GROUP; i++) {                                                              \
                    n += u.q[g * GROUP + i] * a.q[at + i];                                                     \
                    sum += a.q[at + i];                                                                        \
                }                                                                                              \
                acc += u.d[g] * a.d[at / 32] * (float)n;                                                       \
                if (MINIMA) acc -= u.m[g] * (GROUP == 32 ? a.dsum[at / 32] : a.d[at / 32] * (float)sum);       \
            }                                                                                                  \
        }                                                                                                      \
        return acc;                                                                                            \
    }

MER_UNIT_FORMATS(UNIT_DOT)

/* Four partial sums: a quarter of the rounding error of one, and they need not wait for each other. */
#define FLOAT_DOT(NAME, TYPE, TO_F32)                                                    \
    static float NAME(const char *row, const void *act, long cols) {                     \
        const float *x = act;                                                            \
        float acc[4] = {0, 0, 0, 0};                                                     \
        for (long k = 0; k < cols; k++) {                                                \
            TYPE w;                                                                      \
            memcpy(&w, row + k * (long)sizeof w, sizeof w);                              \
            acc[k & 3] += TO_F32(w) * x[k];                                              \
        }                                                                                \
        return (acc[0] + acc[1]) + (acc[2] + acc[3]);                                    \
    }

FLOAT_DOT(dot_f32, float, )
FLOAT_DOT(dot_f16, uint16_t, mer_f16_to_f32)
FLOAT_DOT(dot_bf16, uint16_t, mer_bf16_to_f32)

#define MATMUL(NAME, FMT, DOT)                                                                          \
    static void NAME(const void *w, long cols, long r0, long r1, const void *const *acts, long n_tok, \
                     float *y, long y_stride) {                                                         \
        const size_t bytes = mer_row_bytes(FMT, cols);                                                  \
        for (long r = r0; r < r1; r++)                                                                  \
            for (long t = 0; t < n_tok; t++)                                                            \
                y[t * y_stride + r] = DOT((const char *)w + (size_t)r * bytes, acts[t], cols);          \
    }

MATMUL(matmul_f32, MER_F32, dot_f32)
MATMUL(matmul_f16, MER_F16, dot_f16)
MATMUL(matmul_bf16, MER_BF16, dot_bf16)
MATMUL(matmul_q4_0, MER_Q4_0, dot_q4_0)
MATMUL(matmul_q8_0, MER_Q8_0, dot_q8_0)
MATMUL(matmul_q4_k, MER_Q4_K, dot_q4_k)
MATMUL(matmul_mxfp4, MER_MXFP4, dot_mxfp4)
#define UNIT_MATMUL(NAME, ID, UNIT, GROUP, MINIMA) MATMUL(matmul_##NAME, ID, dot_##NAME)
MER_UNIT_FORMATS(UNIT_MATMUL)
#define UNIT_ENTRY(NAME, ID, UNIT, GROUP, MINIMA) [ID] = matmul_##NAME,

const mer_isa mer_isa_scalar = {
    .name = "scalar",
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
            MER_UNIT_FORMATS(UNIT_ENTRY)
        },
};
