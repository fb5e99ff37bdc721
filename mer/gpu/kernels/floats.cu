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

/* ROWS rows of a thread, MER_GPU_ROWS apart from `row` on, by TOKENS tokens from t0 on; what is beyond the last row or
 * token is computed and left. */
template <class F, int ROWS, int TOKENS>
INLINE void tile(const mer_gpu_product &product, const uint8_t *acts, long act_stride, int rows, int cols,
                 long y_stride, int row, int t0) {
    const int lane = threadIdx.x % LANES;
    const bool aligned = product.weights % F::BYTES == 0;
    const uint8_t *w[ROWS];
    const float *x[TOKENS];
    float acc[ROWS][TOKENS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const int at = row + r * MER_GPU_ROWS < rows ? row + r * MER_GPU_ROWS : rows - 1;
        w[r] = (const uint8_t *)product.weights + (long)at * cols * F::BYTES;
    }
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        const int token = t0 + t < product.count ? t0 + t : product.count - 1;
        x[t] = (const float *)(acts + act_row(product, token) * act_stride);
#pragma unroll
        for (int r = 0; r < ROWS; r++) acc[r][t] = 0;
    }
    int k = lane;
#pragma unroll(ROWS == 1 ? 8 : 1)
    for (; k < cols / LANES * LANES; k += LANES) {
        float v[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) v[r] = F::load(w[r] + (long)k * F::BYTES, aligned);
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            const float each = x[t][k];
#pragma unroll
            for (int r = 0; r < ROWS; r++) acc[r][t] = __fmaf_rn(v[r], each, acc[r][t]);
        }
    }
    if (cols % LANES)
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float v = k < cols ? F::load(w[r] + (long)k * F::BYTES, aligned) : 0;
#pragma unroll
            for (int t = 0; t < TOKENS; t++) acc[r][t] = __fmaf_rn(v, k < cols ? x[t][k] : 0, acc[r][t]);
        }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const int at = row + r * MER_GPU_ROWS;
        const float bias = row_bias(product, at < rows ? at : rows - 1);
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            float sum = acc[r][t];
#pragma unroll
            for (int by = LANES / 2; by; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
            if (lane == 0 && at < rows && t0 + t < product.count) store_y(product, (t0 + t) * y_stride + at, sum, bias);
        }
    }
}

} // namespace float_rows

/* Their grids are those of the formats of blocks. */
#define FLOAT_ROWS(FMT)                                                                                        \
    MER_KERNEL(mer_rows_##FMT, const mer_gpu_product *products, int n_products, const uint8_t *acts,           \
               long act_stride, int rows, int cols, long y_stride) {                                           \
        if ((int)blockIdx.y >= n_products) return;                                                             \
        const mer_gpu_product product = products[blockIdx.y];                                                  \
        const int row = blockIdx.x * MER_GPU_ROWS + threadIdx.x / float_rows::LANES;                           \
        using namespace float_rows;                                                                            \
        if (product.count == 1)                                                                                \
            tile<FMT, 1, 1>(product, acts, act_stride, rows, cols, y_stride, row, 0);                          \
        else                                                                                                   \
            for (int t = 0; t < product.count; t += 4)                                                         \
                tile<FMT, 1, 4>(product, acts, act_stride, rows, cols, y_stride, row, t);                      \
    }                                                                                                          \
    MER_KERNEL(mer_many_##FMT, const mer_gpu_product *products, int n_products, const uint8_t *acts,           \
               long act_stride, int rows, int cols, long y_stride) {                                           \
        if ((int)blockIdx.y >= n_products) return;                                                             \
        const mer_gpu_product product = products[blockIdx.y];                                                  \
        const int row0 = blockIdx.x * MER_GPU_MANY_ROWS, t0 = blockIdx.z * MER_GPU_MANY_TOKENS;                \
        using namespace float_rows;                                                                            \
        for (int r = row0; r < row0 + MER_GPU_MANY_ROWS && r < rows; r += 4 * MER_GPU_ROWS)                    \
            for (int t = t0; t < t0 + MER_GPU_MANY_TOKENS && t < product.count; t += 8)                        \
                tile<FMT, 4, 8>(product, acts, act_stride, rows, cols, y_stride, r + threadIdx.x / LANES, t);  \
    }

FLOAT_ROWS(f32)
FLOAT_ROWS(f16)
FLOAT_ROWS(bf16)

#undef FLOAT_ROWS
