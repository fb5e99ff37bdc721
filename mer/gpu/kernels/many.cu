/* Products of many tokens with the formats of blocks: MER_GPU_MANY_ROWS rows by MER_GPU_MANY_TOKENS tokens to a block of
 * threads, a warp 16 of the rows.
 *
 * Tensor cores multiply int8: of 16 rows by 8 tokens they give the sums over 32 columns, or over groups of 16, exact
 * integers. The rest is done by each thread for its four sums, in the defined order: they have the bytes of mer_rows_*. */
#include "formats.cuh"

namespace block_many {

constexpr int ROWS = MER_GPU_MANY_ROWS, TOKENS = MER_GPU_MANY_TOKENS;
constexpr int SPAN = 8; /* blocks of 32 columns at a time */
constexpr int TILES = TOKENS / 8;
constexpr int STRIDE = SPAN * 8 + 4; /* words of a token in shared memory: lanes of a warp hit different banks */

static_assert(ROWS == MER_GPU_THREADS / 32 * 16, "16 rows to a warp");

/* 12582912 and integers below 2^22 are added by adding to the bits: what a sum begins with, so that it is a float. */
constexpr int MAGIC = 0x4b400000;
INLINE float magic_float(int n) { return __uint_as_float((uint32_t)n) - 12582912.0f; }

/* c = MAGIC + A B of 16 rows, 8 tokens and 16 K columns, K = 1 or 2. Lane 4 g + q has of A, for each 16 columns, columns
 * 4 q .. 4 q + 3 of rows g and g + 8, of B the same of token g, and of c tokens 2 q and 2 q + 1 of either row. */
template <int K> INLINE void multiply(const uint32_t *a, const uint32_t *b, int *c) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    if (K == 2)
        asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%10, %10, %10, %10};"
            : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(MAGIC));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %7, %7, %7};"
            : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(b[0]), "r"(MAGIC));
#else
    const int lane = threadIdx.x % 32, g = lane / 4 * 4, q = lane % 4 * 8;
    for (int i = 0; i < 4; i++) c[i] = MAGIC;
    for (int k = 0; k < K; k++)
        for (int i = 0; i < 4; i++) {
            const uint32_t upper = __shfl_sync(~0u, a[2 * k], g + i), lower = __shfl_sync(~0u, a[2 * k + 1], g + i);
            const uint32_t even = __shfl_sync(~0u, b[k], q + i), odd = __shfl_sync(~0u, b[k], q + 4 + i);
            c[0] = __dp4a((int)upper, (int)even, c[0]);
            c[1] = __dp4a((int)upper, (int)odd, c[1]);
            c[2] = __dp4a((int)lower, (int)even, c[2]);
            c[3] = __dp4a((int)lower, (int)odd, c[3]);
        }
#endif
}

template <class F> INLINE uint32_t signed_bytes(uint32_t w) {
    return F::OFFSET ? ((w | 0x80808080u) - F::OFFSET * 0x01010101u) ^ 0x80808080u : w;
}

template <class F> INLINE void product(const mer_gpu_product *products, const uint8_t *acts, long act_stride, int rows,
                                       int cols, long y_stride) {
    constexpr bool K = F::COLS == 256, HALVES = F::GROUP == 16;
    constexpr int SLOT = (SPAN * 32 / F::COLS * F::BYTES + 15 + 4 + 15) / 16 * 16;
    __shared__ uint4 stage[ROWS * SLOT / 16], q[TOKENS * STRIDE / 4];
    /* Of activations: d, and d times the sum, or the sums of both halves. */
    __shared__ float2 act_d[SPAN][TOKENS / 2], act_sum[F::MINIMA ? 1 + HALVES : 1][SPAN][TOKENS / 2];
    /* Of weights: d or the scale, the minimum; of groups of 16 two each. */
    __shared__ float scale[1 + HALVES][SPAN][ROWS], least[F::MINIMA ? 1 + HALVES : 1][SPAN][ROWS];

    __shared__ long act_at[TOKENS];

    const mer_gpu_product task = products[blockIdx.y];
    const int row0 = blockIdx.x * ROWS, t0 = blockIdx.z * TOKENS;
    if (t0 >= task.count) return;
    const int n_rows = rows - row0 < ROWS ? rows - row0 : ROWS;
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, group = lane / 4, quarter = lane % 4;
    const int blocks = cols / 32;
    const long row_bytes = (long)(cols / F::COLS) * F::BYTES;
    const uint64_t first_row = task.weights + row0 * row_bytes;
    const bytes p = {(const uint32_t *)stage};

    for (int t = thread; t < TOKENS; t += MER_GPU_THREADS) /* what is beyond the last token is computed and left */
        act_at[t] = act_row(task, t0 + t < task.count ? t0 + t : task.count - 1) * act_stride;
    __syncthreads();

    float acc[TILES][4], sum[K ? TILES : 1][4], min[K && F::MINIMA ? TILES : 1][4];
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) acc[i][e] = 0;

    for (int b0 = 0; b0 < blocks; b0 += SPAN) {
        const int n = blocks - b0 < SPAN ? blocks - b0 : SPAN;
        const uint64_t span = first_row + (uint64_t)(b0 / (F::COLS / 32)) * F::BYTES;
        for (int i = thread; i < n_rows * (SLOT / 16); i += MER_GPU_THREADS) {
            const int r = i / (SLOT / 16), piece = i % (SLOT / 16);
            const uint64_t start = span + r * row_bytes, from = start & ~15ull;
            if (from + 16 * piece < start + n * 32 / F::COLS * F::BYTES) copy16(stage + i, (const uint4 *)from + piece);
        }
        for (int i = thread; i < TOKENS * SPAN * 2; i += MER_GPU_THREADS) {
            const int t = i / (SPAN * 2), piece = i % (SPAN * 2);
            if (piece < 2 * n) copy16(q + t * (STRIDE / 4) + piece, (const uint4 *)(acts + act_at[t] + b0 * 32) + piece);
        }
        for (int i = thread; i < TOKENS * SPAN; i += MER_GPU_THREADS) {
            const int t = i / SPAN, b = i % SPAN < n ? i % SPAN : n - 1;
            const act_q8 a = act_view(acts + act_at[t], cols);
            ((float *)act_d[b])[t] = a.d[b0 + b];
            if (F::MINIMA && !HALVES) ((float *)act_sum[0][b])[t] = a.dsum[b0 + b];
            if (F::MINIMA && HALVES) {
                ((float *)act_sum[0][b])[t] = (float)a.half[2 * (b0 + b)];
                ((float *)act_sum[F::MINIMA && HALVES][b])[t] = (float)a.half[2 * (b0 + b) + 1];
            }
        }
        copies_done();
        __syncthreads();
        for (int i = thread; i < ROWS * SPAN; i += MER_GPU_THREADS) {
            const int r = i % ROWS, b = i / ROWS < n ? i / ROWS : n - 1;
            const int at = r * SLOT + (int)((span + r * row_bytes) & 15) + b * 32 / F::COLS * F::BYTES;
            if constexpr (K) {
                const scales s = F::scale(p, at, b);
                scale[0][b][r] = (float)s.s0;
                if (HALVES) scale[HALVES][b][r] = (float)s.s1;
                if (F::MINIMA) least[0][b][r] = (float)s.m0;
                if (F::MINIMA && HALVES) least[F::MINIMA && HALVES][b][r] = (float)s.m1;
            } else {
                scale[0][b][r] = F::d(p, at);
                if (F::MINIMA) least[0][b][r] = F::m(p, at);
            }
        }
        __syncthreads();

        const int r0 = 16 * warp + group, r1 = r0 + 8;
        const int at0 = r0 * SLOT + (int)((span + r0 * row_bytes) & 15), at1 = r1 * SLOT + (int)((span + r1 * row_bytes) & 15);
        if constexpr (K)
#pragma unroll
            for (int i = 0; i < TILES; i++)
#pragma unroll
                for (int e = 0; e < 4; e++) sum[i][e] = min[F::MINIMA ? i : 0][e] = 0;
#pragma unroll 1
        for (int b = 0; b < n; b++) {
            const int unit = K ? 0 : b * F::BYTES;
            const two_words upper = F::words(p, at0 + unit, b, quarter), lower = F::words(p, at1 + unit, b, quarter);
            const uint32_t a[4] = {signed_bytes<F>(upper.low), signed_bytes<F>(lower.low), signed_bytes<F>(upper.high),
                                   signed_bytes<F>(lower.high)};
            float s[2][2], m[2][2]; /* row, half */
#pragma unroll
            for (int h = 0; h <= HALVES; h++) {
                s[0][h] = scale[h][b][r0];
                s[1][h] = scale[h][b][r1];
                m[0][h] = F::MINIMA ? least[F::MINIMA ? h : 0][b][r0] : 0;
                m[1][h] = F::MINIMA ? least[F::MINIMA ? h : 0][b][r1] : 0;
            }
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                const uint32_t *const token = (const uint32_t *)q + (8 * i + group) * STRIDE + 8 * b + quarter;
                const uint32_t x[2] = {token[0], token[4]};
                const float2 d2 = act_d[b][4 * i + quarter], first2 = act_sum[0][b][4 * i + quarter];
                const float2 second2 = act_sum[F::MINIMA && HALVES][b][4 * i + quarter];
                const float d[2] = {d2.x, d2.y}, first[2] = {first2.x, first2.y}, second[2] = {second2.x, second2.y};
                int c[1 + HALVES][4];
                if constexpr (HALVES) {
                    multiply<1>(a, x, c[0]);
                    multiply<1>(a + 2, x + 1, c[HALVES]);
                } else {
                    multiply<2>(a, x, c[0]);
                }
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int r = e / 2, t = e % 2;
                    const float product = magic_float(c[0][e]);
                    if constexpr (!K) {
                        acc[i][e] += s[r][0] * d[t] * product;
                        if (F::MINIMA) acc[i][e] -= m[r][0] * first[t];
                    } else if constexpr (!HALVES) {
                        sum[i][e] += s[r][0] * product * d[t];
                        if (F::MINIMA) min[F::MINIMA ? i : 0][e] += m[r][0] * first[t];
                    } else { /* sums of integers, exact */
                        sum[i][e] += (s[r][0] * product + s[r][1] * magic_float(c[HALVES][e])) * d[t];
                        if (F::MINIMA) min[F::MINIMA ? i : 0][e] += (m[r][0] * first[t] + m[r][1] * second[t]) * d[t];
                    }
                }
            }
        }
        if constexpr (K) {
            const float d[2] = {F::d(p, at0), F::d(p, at1)}, m[2] = {F::m(p, at0), F::m(p, at1)};
#pragma unroll
            for (int i = 0; i < TILES; i++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    acc[i][e] += d[e / 2] * sum[i][e];
                    if (F::MINIMA) acc[i][e] -= m[e / 2] * min[F::MINIMA ? i : 0][e];
                }
        }
        __syncthreads();
    }
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const int r = 16 * warp + group + e / 2 * 8;
        const float bias = row_bias(task, row0 + (r < n_rows ? r : 0));
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            const int t = t0 + 8 * i + 2 * quarter + e % 2;
            if (r < n_rows && t < task.count) store_y(task, t * y_stride + row0 + r, acc[i][e], bias);
        }
    }
}

} // namespace block_many

/* grid = (ceil(rows / MER_GPU_MANY_ROWS), n_products, ceil(most tokens of a product / MER_GPU_MANY_TOKENS)) */
#define BLOCK_MANY(FMT)                                                                                        \
    MER_KERNEL(mer_many_##FMT, const mer_gpu_product *products, int n_products, const uint8_t *acts,           \
               long act_stride, int rows, int cols, long y_stride) {                                           \
        if ((int)blockIdx.y < n_products)                                                                      \
            block_many::product<fmt_##FMT>(products, acts, act_stride, rows, cols, y_stride);                  \
    }

BLOCK_MANY(q4_0)
BLOCK_MANY(q4_1)
BLOCK_MANY(q5_0)
BLOCK_MANY(q5_1)
BLOCK_MANY(q8_0)
BLOCK_MANY(q2_k)
BLOCK_MANY(q3_k)
BLOCK_MANY(q4_k)
BLOCK_MANY(q5_k)
BLOCK_MANY(q6_k)
BLOCK_MANY(iq4_nl)
BLOCK_MANY(iq4_xs)
BLOCK_MANY(mxfp4)

#undef BLOCK_MANY
