/* Products of few tokens with the formats of blocks: MER_GPU_ROWS rows to a block of threads.
 *
 * The bytes of the rows are copied to shared memory as they lie, which costs the same at any alignment. Then a thread
 * takes the same 32 columns of some rows: exact integers, scaled. What is left is to be added up in the defined order,
 * by few threads: for blocks of 256 within each first, then, and for blocks of 32 at once, along the row. */
#include "formats.cuh"

namespace block_rows {

constexpr int TOKENS = 4;   /* at a time */
constexpr int SPAN = 64;    /* blocks of 32 columns at a time */
constexpr int TOGETHER = 2; /* rows of a thread */
constexpr int SUMS = TOKENS * MER_GPU_ROWS;

static_assert(SUMS <= MER_GPU_THREADS, "a thread for each sum");
static_assert(MER_GPU_ROWS % TOGETHER == 0, "whole groups of rows");

/* 32 activations as words. */
struct act_words {
    uint32_t q[8];
};

INLINE act_words load_act(const int8_t *q) {
    const uint4 a = ((const uint4 *)q)[0], b = ((const uint4 *)q)[1];
    return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}

template <int N> INLINE int dot(const uint32_t *w, const uint32_t *q) {
    int n = 0;
#pragma unroll
    for (int i = 0; i < N; i++) n = __dp4a((int)w[i], (int)q[i], n);
    return n;
}

template <class F> INLINE void product(const mer_gpu_product *products, const uint8_t *acts, long act_stride, int rows,
                                       int cols, long y_stride) {
    constexpr int SUBS = F::COLS / 32, UNITS = SPAN / SUBS;
    constexpr int SLOT = (UNITS * F::BYTES + 15 + 4 + 15) / 16 * 16; /* of a row: any alignment, a word behind */
    constexpr bool K = SUBS > 1;
    __shared__ uint4 stage[MER_GPU_ROWS * SLOT / 16];
    __shared__ float term[SUMS][SPAN + 1], least[F::MINIMA ? SUMS : 1][SPAN + 1];
    __shared__ long act_at[TOKENS];
    __shared__ float unit_term[K ? SUMS : 1][UNITS + 1], unit_least[K && F::MINIMA ? SUMS : 1][UNITS + 1];

    const mer_gpu_product task = products[blockIdx.y];
    const int row0 = blockIdx.x * MER_GPU_ROWS;
    const int n_rows = rows - row0 < MER_GPU_ROWS ? rows - row0 : MER_GPU_ROWS;
    const int thread = threadIdx.x, blocks = cols / 32;
    const long row_bytes = (long)(cols / F::COLS) * F::BYTES;
    const uint64_t first_row = task.weights + row0 * row_bytes;
    const bytes p = {(const uint32_t *)stage};

    for (int t0 = 0; t0 < task.count; t0 += TOKENS) {
        const int n_tok = task.count - t0 < TOKENS ? task.count - t0 : TOKENS;
        float acc = 0;
        if (thread < n_tok) act_at[thread] = act_row(task, t0 + thread) * act_stride;
        for (int b0 = 0; b0 < blocks; b0 += SPAN) {
            const int n = blocks - b0 < SPAN ? blocks - b0 : SPAN, n_units = n / SUBS;
            const uint64_t span = first_row + (uint64_t)(b0 / SUBS) * F::BYTES;
            for (int r = thread / 32; r < n_rows; r += MER_GPU_THREADS / 32) {
                const uint64_t start = span + r * row_bytes, from = start & ~15ull, end = start + n_units * F::BYTES;
                const int pieces = (int)((end - from + 15) / 16);
                for (int i = thread % 32; i < pieces; i += 32)
                    copy16(stage + r * (SLOT / 16) + i, (const uint4 *)from + i);
            }
            copies_done();
            __syncthreads();

            const int log_n = 32 - __clz(n - 1); /* of a power of two: some threads may idle, but none divides */
            for (int i = thread; i < MER_GPU_ROWS / TOGETHER << log_n; i += MER_GPU_THREADS) {
                const int r0 = (i >> log_n) * TOGETHER, b = i & ((1 << log_n) - 1), j = b % SUBS;
                if (b >= n) continue;
                uint32_t w[TOGETHER][8];
                float d[TOGETHER], m[TOGETHER];
                scales s[TOGETHER];
#pragma unroll
                for (int k = 0; k < TOGETHER; k++) {
                    const uint64_t start = span + (r0 + k) * row_bytes;
                    const int at = (r0 + k) * SLOT + (int)(start & 15) + b / SUBS * F::BYTES;
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const two_words both = F::words(p, at, j, i);
                        w[k][i] = both.low;
                        w[k][4 + i] = both.high;
                    }
                    if constexpr (K) {
                        s[k] = F::scale(p, at, j);
                    } else {
                        d[k] = F::d(p, at);
                        m[k] = F::m(p, at);
                    }
                }
                for (int t = 0; t < n_tok; t++) {
                    const act_q8 a = act_view(acts + act_at[t], cols);
                    const act_words q = load_act(a.q + (b0 + b) * 32);
                    const float ad = a.d[b0 + b];
                    const float dsum = F::MINIMA && F::GROUP == 32 ? a.dsum[b0 + b] : 0;
                    const int sum = F::OFFSET && F::GROUP == 32 ? F::OFFSET * a.sum[b0 + b] : 0;
                    int2 half = {0, 0};
                    if (F::GROUP == 16) half = ((const int2 *)a.half)[b0 + b];
#pragma unroll
                    for (int k = 0; k < TOGETHER; k++) {
                        const int at = t * MER_GPU_ROWS + r0 + k;
                        if constexpr (!K) {
                            term[at][b] = d[k] * ad * (float)(dot<8>(w[k], q.q) - sum);
                            if (F::MINIMA) least[at][b] = m[k] * dsum;
                        } else if (F::GROUP == 32) {
                            term[at][b] = (float)(s[k].s0 * dot<8>(w[k], q.q)) * ad;
                            if (F::MINIMA) least[at][b] = (float)s[k].m0 * dsum;
                        } else {
                            const int first = dot<4>(w[k], q.q) - F::OFFSET * half.x;
                            const int second = dot<4>(w[k] + 4, q.q + 4) - F::OFFSET * half.y;
                            term[at][b] = (float)(s[k].s0 * first + s[k].s1 * second) * ad;
                            if (F::MINIMA) least[at][b] = (float)(s[k].m0 * half.x + s[k].m1 * half.y) * ad;
                        }
                    }
                }
            }
            __syncthreads();

            if constexpr (K) {
                for (int i = thread; i < n_tok * MER_GPU_ROWS * UNITS; i += MER_GPU_THREADS) {
                    const int at = i / UNITS, u = i % UNITS, r = at % MER_GPU_ROWS;
                    if (u >= n_units) break;
                    const uint64_t start = span + r * row_bytes;
                    const int unit = r * SLOT + (int)(start & 15) + u * F::BYTES;
                    float sum = 0, min = 0;
#pragma unroll
                    for (int j = 0; j < SUBS; j++) {
                        sum += term[at][u * SUBS + j];
                        if (F::MINIMA) min += least[at][u * SUBS + j];
                    }
                    unit_term[at][u] = F::d(p, unit) * sum;
                    if (F::MINIMA) unit_least[at][u] = F::m(p, unit) * min;
                }
                __syncthreads();
            }
            if (thread < n_tok * MER_GPU_ROWS) {
                const float *const plus = K ? unit_term[thread] : term[thread];
                const float *const minus = K ? unit_least[F::MINIMA ? thread : 0] : least[F::MINIMA ? thread : 0];
#pragma unroll 8
                for (int u = 0; u < n_units; u++) {
                    acc += plus[u];
                    if (F::MINIMA) acc -= minus[u];
                }
            }
        }
        const int r = thread % MER_GPU_ROWS, t = thread / MER_GPU_ROWS;
        if (t < n_tok && r < n_rows) store_y(task, (t0 + t) * y_stride + row0 + r, acc, row_bias(task, row0 + r));
    }
}

} // namespace block_rows

#define BLOCK_ROWS(FMT)                                                                                        \
    MER_KERNEL(mer_rows_##FMT, const mer_gpu_product *products, int n_products, const uint8_t *acts,           \
               long act_stride, int rows, int cols, long y_stride) {                                           \
        if ((int)blockIdx.y < n_products)                                                                      \
            block_rows::product<fmt_##FMT>(products, acts, act_stride, rows, cols, y_stride);                  \
    }

BLOCK_ROWS(q4_0)
BLOCK_ROWS(q4_1)
BLOCK_ROWS(q5_0)
BLOCK_ROWS(q5_1)
BLOCK_ROWS(q8_0)
BLOCK_ROWS(q2_k)
BLOCK_ROWS(q3_k)
BLOCK_ROWS(q4_k)
BLOCK_ROWS(q5_k)
BLOCK_ROWS(q6_k)
BLOCK_ROWS(iq4_nl)
BLOCK_ROWS(iq4_xs)
BLOCK_ROWS(mxfp4)

#undef BLOCK_ROWS
