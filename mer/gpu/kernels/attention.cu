/* Attention over paged keys and values. The sums are those of csrc/decoder/attention.c: by blocks of 16 positions, in
 * ascending order, what was summed shrinking whenever a block's highest score is a new maximum.
 *
 * Three launches: all scores; of each query the maxima, which are a prefix, so that every weight is known; and each
 * element of the results along the positions. Queries [first, end) of the step at a time, as there is room for scores:
 * f32 [queries, n_heads, stride], from the block on where the query's window begins. */
#include "decoder.cuh"
#include "kv.cuh"
#include "vec.cuh"

#define QUERIES MER_GPU_QUERIES /* of a tile */
#define WARPS (MER_GPU_THREADS / 32)

INLINE int first_seen(const mer_gpu_attention &a, int position) {
    return a.window && position >= a.window ? position - a.window + 1 : 0;
}

INLINE const uint8_t *part_of(const mer_gpu_attention &a, const int32_t *table, int b, int part) {
    return (const uint8_t *)a.blocks + (long)table[b] * a.block_bytes + part * kv_part_bytes(a.kv, a.dim);
}

INLINE const int32_t *table_of(const mer_gpu_attention &a, int sequence) {
    return (const int32_t *)a.tables + (long)sequence * a.table_stride;
}

/* A thread's key times the tile's queries: four chains each, as score_by_element adds them up. */
template <int KV, int N> INLINE void score(const uint8_t *part, int at, const float *q, int dim, float scores[QUERIES]) {
    float a[N], b[N], c[N], e[N];
#pragma unroll
    for (int r = 0; r < N; r++) a[r] = b[r] = c[r] = e[r] = 0;
    int d = 0;
#pragma unroll 4
    for (; d + 4 <= dim; d += 4) {
        const float k0 = load_key<KV>(part, d, at, dim), k1 = load_key<KV>(part, d + 1, at, dim);
        const float k2 = load_key<KV>(part, d + 2, at, dim), k3 = load_key<KV>(part, d + 3, at, dim);
#pragma unroll
        for (int r = 0; r < N; r++) {
            const float *const x = q + r * dim + d;
            a[r] += x[0] * k0;
            b[r] += x[1] * k1;
            c[r] += x[2] * k2;
            e[r] += x[3] * k3;
        }
    }
    for (; d < dim; d++) {
        const float k0 = load_key<KV>(part, d, at, dim);
#pragma unroll
        for (int r = 0; r < N; r++) a[r] += q[r * dim + d] * k0;
    }
#pragma unroll
    for (int r = 0; r < N; r++) scores[r] = (a[r] + b[r]) + (c[r] + e[r]);
}

template <int KV> INLINE void score_rows(const uint8_t *part, int at, const float *q, int dim, int n, float *scores) {
    if (n <= 1) score<KV, 1>(part, at, q, dim, scores);
    else if (n <= 2) score<KV, 2>(part, at, q, dim, scores);
    else if (n <= 4) score<KV, 4>(part, at, q, dim, scores);
    else score<KV, 8>(part, at, q, dim, scores);
}

/* What a block of threads scores: n queries of one sequence by blocks [b0, b0 + 8) of positions, up to `newest`. */
struct score_tile {
    int sequence, t0, r0, n, b0, newest;
};

/* This block's tile, its queries in q; false: it has none. */
INLINE bool take_tile(const mer_gpu_attention &a, score_tile &tile, float *q) {
    const int32_t *const span = (const int32_t *)a.spans + blockIdx.z / a.tiles * 3;
    const int32_t *const positions = (const int32_t *)a.positions;
    const int group = a.n_heads / a.n_kv, dim = a.dim;
    const int t0 = span[1] > a.first ? span[1] : a.first, t1 = span[2] < a.end ? span[2] : a.end;
    const int r0 = blockIdx.z % a.tiles * QUERIES;
    if (t0 >= t1 || r0 >= (t1 - t0) * group) return false;
    const int n = (t1 - t0) * group - r0 < QUERIES ? (t1 - t0) * group - r0 : QUERIES;
    /* The tile's own tokens, and the blocks that some of them see. */
    const int oldest = first_seen(a, positions[t0 + r0 / group]) / KV_BLOCK;
    const int newest = positions[t0 + (r0 + n - 1) / group] / KV_BLOCK;
    const int b0 = oldest + blockIdx.x * (MER_GPU_THREADS / KV_BLOCK);
    if (b0 > newest) return false;
    for (int i = threadIdx.x; i < QUERIES * dim; i += MER_GPU_THREADS) {
        const int r = i / dim < n ? r0 + i / dim : r0;
        const int head = blockIdx.y * group + r % group;
        q[i] = ((const float *)a.q)[((long)(t0 + r / group) * a.n_heads + head) * dim + i % dim];
    }
    __syncthreads();
    tile = {span[0], t0, r0, n, b0, newest};
    return true;
}

/* The tile's query i by place `at` of block b. */
INLINE void store_score(const mer_gpu_attention &a, const score_tile &tile, int i, int b, int at, float score) {
    const int group = a.n_heads / a.n_kv;
    const int t = tile.t0 + (tile.r0 + i) / group, head = blockIdx.y * group + (tile.r0 + i) % group;
    const int position = ((const int32_t *)a.positions)[t], base = first_seen(a, position) / KV_BLOCK;
    if (b < base || b > position / KV_BLOCK) return;
    float *const row = (float *)a.scores + ((long)(t - a.first) * a.n_heads + head) * a.stride;
    row[(b - base) * KV_BLOCK + at] = score * a.scale;
}

/* grid = (ceil(blocks of the longest / 8), n_kv, spans * tiles); a thread takes a position. Dynamic shared memory:
 * QUERIES * dim floats. */
MER_KERNEL(mer_attend_scores, mer_gpu_attention a) {
    MER_DYNAMIC_SHARED(q);
    score_tile tile;
    if (!take_tile(a, tile, q)) return;
    const int b = tile.b0 + threadIdx.x / KV_BLOCK, at = threadIdx.x % KV_BLOCK;
    if (b > tile.newest) return;
    const uint8_t *const part = part_of(a, table_of(a, tile.sequence), b, blockIdx.y);
    float scores[QUERIES];
    if (a.kv == KV_F32) score_rows<KV_F32>(part, at, q, a.dim, tile.n, scores);
    else if (a.kv == KV_F16) score_rows<KV_F16>(part, at, q, a.dim, tile.n, scores);
    else score_rows<KV_Q8_0>(part, at, q, a.dim, tile.n, scores);
#pragma unroll
    for (int i = 0; i < QUERIES; i++) {
        if (i >= tile.n) break;
        store_score(a, tile, i, b, at, scores[i]);
    }
}

#define LANES 16 /* of threads that share a sum */

/* Places `at` and `at` + 8 of a block of latents by the tile's queries: lane l has elements l, l + 16, ..., the lanes are
 * added pairwise, what is left of the row comes last, as score_by_position adds them up. The lane 2 i + j stores query i's
 * score of the place `at` + 8 j. */
template <int KV, int N>
INLINE void score_latents(const mer_gpu_attention &a, const score_tile &tile, const uint8_t *part, int b, const float *q) {
    const int lane = threadIdx.x % LANES, at = threadIdx.x / LANES, dim = a.dim, whole = dim / LANES * LANES;
    float sums[2][N];
#pragma unroll
    for (int r = 0; r < N; r++) sums[0][r] = sums[1][r] = 0;
#pragma unroll 4
    for (int d = lane; d < whole; d += LANES) {
        const float k0 = load_value<KV>(part, d, at, dim), k1 = load_value<KV>(part, d, at + KV_BLOCK / 2, dim);
#pragma unroll
        for (int r = 0; r < N; r++) {
            sums[0][r] += q[r * dim + d] * k0;
            sums[1][r] += q[r * dim + d] * k1;
        }
    }
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
        for (int r = 0; r < N; r++) {
            float sum = sum_of_lanes(sums[j][r], LANES);
            for (int d = whole; d < dim; d++) sum += q[r * dim + d] * load_value<KV>(part, d, at + j * (KV_BLOCK / 2), dim);
            if (lane == 2 * r + j && r < tile.n) store_score(a, tile, r, b, at + j * (KV_BLOCK / 2), sum);
        }
}

template <int KV> INLINE void score_latent_rows(const mer_gpu_attention &a, const score_tile &tile, const float *q) {
    const int32_t *const table = table_of(a, tile.sequence);
    for (int b = tile.b0; b < tile.b0 + MER_GPU_THREADS / KV_BLOCK && b <= tile.newest; b++) {
        const uint8_t *const part = part_of(a, table, b, 0);
        if (tile.n <= 1) score_latents<KV, 1>(a, tile, part, b, q);
        else if (tile.n <= 2) score_latents<KV, 2>(a, tile, part, b, q);
        else if (tile.n <= 4) score_latents<KV, 4>(a, tile, part, b, q);
        else score_latents<KV, 8>(a, tile, part, b, q);
    }
}

/* The same of latents, which are stored by position; the grid and the shared memory, too. n_kv is 1. */
MER_KERNEL(mer_attend_latents, mer_gpu_attention a) {
    MER_DYNAMIC_SHARED(q);
    static_assert(MER_GPU_THREADS / LANES * 2 == KV_BLOCK && 2 * QUERIES == LANES, "two places, a lane for each score");
    score_tile tile;
    if (!take_tile(a, tile, q)) return;
    if (a.kv == KV_F32) score_latent_rows<KV_F32>(a, tile, q);
    else if (a.kv == KV_F16) score_latent_rows<KV_F16>(a, tile, q);
    else score_latent_rows<KV_Q8_0>(a, tile, q);
}

#undef LANES

/* The largest of the warp's values up to each lane's own. */
INLINE float running_max(float x) {
    const int lane = threadIdx.x % 32;
    for (int by = 1; by < 32; by *= 2) {
        const float before = __shfl_up_sync(~0u, x, by);
        if (lane >= by && before > x) x = before;
    }
    return x;
}

/* Scores become weights: grid = (n_heads, queries); a thread takes a block of positions. */
MER_KERNEL(mer_attend_weights, mer_gpu_attention a) {
    __shared__ float parts[MER_GPU_THREADS], shrinks[MER_GPU_THREADS], tops[WARPS];
    const float nothing = __uint_as_float(0xff800000u);
    const int head = blockIdx.x, position = ((const int32_t *)a.positions)[a.first + blockIdx.y];
    const int seen = first_seen(a, position), base = seen / KV_BLOCK, n = position / KV_BLOCK + 1 - base;
    const long row = (long)blockIdx.y * a.n_heads + head;
    float *const scores = (float *)a.scores + row * a.stride;
    float max = a.sinks ? ((const float *)a.sinks)[head] : nothing, sum = a.sinks ? 1.0f : 0.0f;
    for (int first = 0; first < n; first += MER_GPU_THREADS) {
        const int b = first + threadIdx.x, warp = threadIdx.x / 32;
        const int j0 = b == 0 ? seen % KV_BLOCK : 0, j1 = b == n - 1 ? position % KV_BLOCK + 1 : KV_BLOCK;
        float p[KV_BLOCK], top = nothing;
        if (b < n) {
#pragma unroll
            for (int j = 0; j < KV_BLOCK; j += 4) {
                const float4 four = *(const float4 *)(scores + b * KV_BLOCK + j);
                p[j] = four.x;
                p[j + 1] = four.y;
                p[j + 2] = four.z;
                p[j + 3] = four.w;
            }
#pragma unroll
            for (int j = 0; j < KV_BLOCK; j++)
                if (j >= j0 && j < j1 && p[j] > top) top = p[j];
        }
        float highest = running_max(top);
        if (threadIdx.x % 32 == 31) tops[warp] = highest;
        __syncthreads();
        float before = max; /* all that is left of the warp */
        for (int w = 0; w < WARPS; w++) {
            if (w < warp && tops[w] > before) before = tops[w];
            if (tops[w] > max) max = tops[w];
        }
        float previous = __shfl_up_sync(~0u, highest, 1);
        if (threadIdx.x % 32 == 0 || !(previous > before)) previous = before;
        const float shrink = top > previous ? exp_below(previous - top) : 1.0f, level = top > previous ? top : previous;
        if (b < n) {
#pragma unroll
            for (int j = 0; j < KV_BLOCK; j++) p[j] = j >= j0 && j < j1 ? exp_below(p[j] - level) : 0.0f;
#pragma unroll
            for (int j = 0; j < KV_BLOCK; j += 4)
                *(float4 *)(scores + b * KV_BLOCK + j) = make_float4(p[j], p[j + 1], p[j + 2], p[j + 3]);
            ((float *)a.shrinks)[row * (a.stride / KV_BLOCK) + b] = shrink;
#pragma unroll
            for (int by = KV_BLOCK / 2; by; by /= 2)
#pragma unroll
                for (int j = 0; j < by; j++) p[j] += p[j + by];
            parts[threadIdx.x] = p[0];
            shrinks[threadIdx.x] = shrink;
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            const int count = n - first < MER_GPU_THREADS ? n - first : MER_GPU_THREADS;
#pragma unroll 8
            for (int i = 0; i < count; i++) sum = sum * shrinks[i] + parts[i];
        }
    }
    if (threadIdx.x == 0) ((float *)a.sums)[row] = sum;
}

#define STAGED 64 /* positions times slices of 32 elements that a block of threads has in shared memory */
#define LOADS (STAGED * 32 / MER_GPU_THREADS)

/* Warps are heads, the rest of them other slices of the elements. */
template <int KV>
INLINE void values(const mer_gpu_attention &a, float *staged, float weights[][STAGED], float shrinks[][STAGED / KV_BLOCK]) {
    const int heads = a.heads, slices = WARPS / heads, width = 32 * slices, tile = STAGED / slices;
    const int group = a.n_heads / a.n_kv, groups = (group + heads - 1) / heads, dim = a.value_dim;
    const int part = a.latent ? 0 : a.n_kv + blockIdx.y;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int local = blockIdx.x % groups * heads + warp % heads, head = blockIdx.y * group + local;
    const int d0 = blockIdx.x / groups * width, d = d0 + warp / heads * 32 + lane;
    const int t = a.first + blockIdx.z, position = ((const int32_t *)a.positions)[t];
    const int seen = first_seen(a, position), base = seen / KV_BLOCK * KV_BLOCK, n = position + 1 - base;
    const int begin = seen - base;
    const long row = (long)blockIdx.z * a.n_heads + (local < group ? head : blockIdx.y * group);
    const float *const p = (const float *)a.scores + row * a.stride;
    const float *const shrink = (const float *)a.shrinks + row * (a.stride / KV_BLOCK);
    const int32_t *const table = table_of(a, ((const int32_t *)a.sequence_of)[t]) + base / KV_BLOCK;
    float next[LOADS], next_p[STAGED / 32], next_shrink = 1.0f, out = 0.0f;

    for (int first = -tile; first < n; first += tile) {
        /* Of the tile after this one. */
        const int coming = first + tile;
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            const int at = (i * MER_GPU_THREADS + threadIdx.x) / width, e = d0 + threadIdx.x % width;
            const int place = coming + at;
            next[i] = 0.0f;
            if (place < n && e < dim)
                next[i] = load_value<KV>(part_of(a, table, place / KV_BLOCK, part), e, place % KV_BLOCK, a.dim);
        }
#pragma unroll
        for (int i = 0; i < STAGED / 32; i++) {
            const int place = coming + i * 32 + lane;
            next_p[i] = i * 32 + lane < tile && place < n ? p[place] : 0.0f;
        }
        if (lane < tile / KV_BLOCK && coming + lane * KV_BLOCK < n) next_shrink = shrink[coming / KV_BLOCK + lane];
        if (first >= 0) {
            const int count = n - first < tile ? n - first : tile;
            const float *const v = staged + warp / heads * 32 + lane;
            for (int j = 0; j < count; j += KV_BLOCK) {
                const int lo = first + j < begin ? begin - first - j : 0, hi = count - j < KV_BLOCK ? count - j : KV_BLOCK;
                out *= shrinks[warp][j / KV_BLOCK];
                if (lo == 0 && hi == KV_BLOCK) {
#pragma unroll
                    for (int k = 0; k < KV_BLOCK; k++) out += weights[warp][j + k] * v[(j + k) * width];
                } else {
                    for (int k = lo; k < hi; k++) out += weights[warp][j + k] * v[(j + k) * width];
                }
            }
        }
        __syncthreads();
        if (coming < n) {
#pragma unroll
            for (int i = 0; i < LOADS; i++) staged[i * MER_GPU_THREADS + threadIdx.x] = next[i];
#pragma unroll
            for (int i = 0; i < STAGED / 32; i++)
                if (i * 32 + lane < tile) weights[warp][i * 32 + lane] = next_p[i];
            if (lane < tile / KV_BLOCK) shrinks[warp][lane] = next_shrink;
        }
        __syncthreads();
    }
    if (local >= group || d >= dim) return;
    out /= ((const float *)a.sums)[row];
    if (a.gate) out *= sigmoid(((const float *)a.gate)[t * a.gate_stride + head * dim + d]);
    ((float *)a.out)[((long)t * a.n_heads + head) * dim + d] = out;
}

/* grid = (ceil(group / heads) * ceil(value_dim / (32 * WARPS / heads)), n_kv, queries) */
MER_KERNEL(mer_attend_values, mer_gpu_attention a) {
    __shared__ float staged[STAGED * 32], weights[WARPS][STAGED], shrinks[WARPS][STAGED / KV_BLOCK];
    if (a.kv == KV_F32) values<KV_F32>(a, staged, weights, shrinks);
    else if (a.kv == KV_F16) values<KV_F16>(a, staged, weights, shrinks);
    else values<KV_Q8_0>(a, staged, weights, shrinks);
}
