/* Products with F32, F16 and BF16, in the order of AVX2 and AVX-512: element k goes to lane k mod 16, fused, a tail
 * padded with zeros; then the lanes are added pairwise. A thread is a lane, 16 threads a row. */
#include "mer_gpu.cuh"

namespace float_rows {

constexpr int LANES = 16;

static_assert(MER_GPU_THREADS == MER_GPU_ROWS * LANES, "a thread for each lane");

struct f32 {
    static constexpr int BYTES = 4;
    INLINE float load(const uint8_t *p, bool aligned) {
        if (aligned) return *(const float *)p;
        return __uint_as_float(p[0] | p[1] << 8 | p[2] << 16 | (uint32_t)p[3] << 24);
    }
};

INLINE uint16_t load_u16(const uint8_t *p, bool aligned) {
    return aligned ? *(const uint16_t *)p : (uint16_t)(p[0] | p[1] << 8);
}

struct f16 {
    static constexpr int BYTES = 2;
    INLINE float load(const uint8_t *p, bool aligned) { return f16_to_f32(load_u16(p, aligned)); }
};

struct bf16 {
    static constexpr int BYTES = 2;
    INLINE float load(const uint8_t *p, bool aligned) { return bf16_to_f32(load_u16(p, aligned)); }
};

template <class F, int TOKENS>
INLINE void tokens(const mer_gpu_product &product, const uint8_t *acts, long act_stride, int rows, int cols,
                   long y_stride, int t0) {
    const int row = blockIdx.x * MER_GPU_ROWS + threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const bool live = row < rows, aligned = product.weights % F::BYTES == 0;
    const uint8_t *const w = (const uint8_t *)product.weights + (long)(live ? row : 0) * cols * F::BYTES;
    const float *x[TOKENS];
    float acc[TOKENS];
#pragma unroll
    for (int t = 0; t < TOKENS; t++) { /* what is beyond the last token is computed and left */
        const int token = t0 + t < product.count ? t0 + t : product.count - 1;
        x[t] = (const float *)(acts + act_row(product, token) * act_stride);
        acc[t] = 0;
    }
    int k = lane;
#pragma unroll 8
    for (; k < cols / LANES * LANES; k += LANES) {
        const float v = F::load(w + (long)k * F::BYTES, aligned);
#pragma unroll
        for (int t = 0; t < TOKENS; t++) acc[t] = __fmaf_rn(v, x[t][k], acc[t]);
    }
    if (cols % LANES) {
        const float v = k < cols ? F::load(w + (long)k * F::BYTES, aligned) : 0;
#pragma unroll
        for (int t = 0; t < TOKENS; t++) acc[t] = __fmaf_rn(v, k < cols ? x[t][k] : 0, acc[t]);
    }
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
#pragma unroll
        for (int by = LANES / 2; by; by /= 2) acc[t] += __shfl_xor_sync(~0u, acc[t], by);
        if (lane == 0 && live && t0 + t < product.count) store_y(product, (t0 + t) * y_stride + row, row, acc[t]);
    }
}

} // namespace float_rows

#define FLOAT_ROWS(FMT)                                                                                        \
    MER_KERNEL(mer_rows_##FMT, const mer_gpu_product *products, int n_products, const uint8_t *acts,           \
               long act_stride, int rows, int cols, long y_stride) {                                           \
        if ((int)blockIdx.y >= n_products) return;                                                             \
        const mer_gpu_product product = products[blockIdx.y];                                                  \
        if (product.count == 1)                                                                                \
            float_rows::tokens<float_rows::FMT, 1>(product, acts, act_stride, rows, cols, y_stride, 0);        \
        else                                                                                                   \
            for (int t = 0; t < product.count; t += 4)                                                         \
                float_rows::tokens<float_rows::FMT, 4>(product, acts, act_stride, rows, cols, y_stride, t);    \
    }

FLOAT_ROWS(f32)
FLOAT_ROWS(f16)
FLOAT_ROWS(bf16)

#undef FLOAT_ROWS
