/* Plain C: the reference of the other instruction sets, and what runs where none of them can. The products with blocks
 * are in lanes_scalar.c. */
#include "elementwise.h"
#include "products.h"

static void quantise(const float *x, void *act, long cols) {
    const mer_act_q8 a = mer_act_view(act, cols);
    for (long b = 0; b < cols / MER_ACT_BLOCK; b++) mer_quantise_block(x + b * MER_ACT_BLOCK, &a, b);
}

static void swiglu(const float *gate, const float *up, float *h, long n) {
    for (long i = 0; i < n; i++) h[i] = mer_swiglu1(gate[i], up[i]);
}

static void geglu(const float *gate, const float *up, float *h, long n) {
    for (long i = 0; i < n; i++) h[i] = mer_geglu1(gate[i], up[i]);
}

static void clamped_swiglu(const float *gate, const float *up, float *h, long n, float alpha, float limit, float added) {
    for (long i = 0; i < n; i++) h[i] = mer_clamped_swiglu1(gate[i], up[i], alpha, limit, added);
}

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
#define ENTRY(NAME, ID) [ID] = mer_scalar_##NAME,

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
            MER_BLOCK_FORMATS(ENTRY)
        },
};
