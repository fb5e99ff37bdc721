/* What a decoder layer does between its products, token by token: the bytes are those of csrc/decoder/token.c. */
#include "decoder.cuh"
#include "elementwise.cuh"
#include "kv.cuh"
#include "vec.cuh"

/* use(i, load(i)) for i below n. Each thread has the same elements throughout: those that are its own number modulo the
 * block's threads. Four loads at a time are under way. */
template <class Load, class Use> INLINE void each(int n, Load load, Use use) {
    for (int first = threadIdx.x; first < n; first += 4 * blockDim.x) {
        float loaded[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const int i = first + k * blockDim.x;
            loaded[k] = i < n ? load(i) : 0.0f;
        }
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const int i = first + k * blockDim.x;
            if (i < n) use(i, loaded[k]);
        }
    }
}

INLINE void load_row(float *row, const float *from, int n) {
    each(n, [=](int i) { return from[i]; }, [=](int i, float v) { row[i] = v; });
}

/* row = norm(row) by the block: RMS, w 0: all ones. */
INLINE void rms_norm_row(float *row, const float *w, int n, float eps, float *slot) {
    __syncthreads();
    if (threadIdx.x < 32) {
        const float factor = norm_factor(row, n, eps);
        if (threadIdx.x == 0) *slot = factor;
    }
    __syncthreads();
    const float factor = *slot;
    each(n, [=](int i) { return w ? w[i] : 0.0f; },
         [=](int i, float weight) { row[i] = w ? weight * (row[i] * factor) : row[i] * factor; });
}

INLINE void layer_norm_row(float *row, const float *w, int n, float eps, float *slot) {
    __syncthreads();
    if (threadIdx.x < 32) {
        const float mean = sum_of_floats(row, n) / (float)n;
        if (threadIdx.x == 0) *slot = mean;
    }
    __syncthreads();
    const float mean = *slot;
    each(n, [=](int i) { return row[i]; }, [=](int i, float v) { row[i] = v - mean; });
    __syncthreads();
    if (threadIdx.x < 32) {
        const float factor = norm_factor(row, n, eps);
        if (threadIdx.x == 0) *slot = factor;
    }
    __syncthreads();
    const float factor = *slot;
    each(n, [=](int i) { return w[i]; }, [=](int i, float weight) { row[i] = row[i] * factor * weight; });
    each(n, [=](int i) { return w[n + i]; }, [=](int i, float bias) { row[i] = row[i] + bias; });
}

/* One token's norm(x), where it is wanted. */
INLINE void norm_of_x(const mer_gpu_join &j, const float *x, float *row, float *slot, long t, uint64_t norm, uint64_t h,
                      uint64_t h_host, uint64_t acts) {
    const int n = j.hidden;
    load_row(row, x, n);
    if (norm && j.layer_norm) layer_norm_row(row, (const float *)norm, n, j.eps, slot);
    else if (norm) rms_norm_row(row, (const float *)norm, n, j.eps, slot);
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        if (h) ((float *)h)[t * n + i] = row[i];
        if (h_host) ((float *)h_host)[t * n + i] = row[i];
    }
    if (acts) {
        const act_q8 a = act_view((uint8_t *)acts + t * j.act_bytes, n);
        /* A warp's elements of a turn are a block. */
        for (int i = threadIdx.x; i / 32 < n / ACT_BLOCK; i += blockDim.x)
            quantise_block(row[i], a, i / 32, threadIdx.x % 32);
    }
}

/* row = the sum of a token's experts in the router's order, each row of y times its weight. */
INLINE void sum_experts(const mer_gpu_join &j, float *row, long t) {
    const int32_t *const places = (const int32_t *)j.places + t * j.top_k;
    const float *const weights = (const float *)j.weights + t * j.top_k;
    for (int i = threadIdx.x; i < j.hidden; i += blockDim.x) {
        float sum = 0.0f;
#pragma unroll 8
        for (int k = 0; k < j.top_k; k++) sum += weights[k] * ((const float *)j.y)[(long)places[k] * j.hidden + i];
        row[i] = sum;
    }
}

/* grid = (tokens), MER_GPU_JOIN_THREADS; dynamic shared memory: hidden floats. */
MER_KERNEL_OF(MER_GPU_JOIN_THREADS, mer_join, mer_gpu_join j) {
    MER_DYNAMIC_SHARED(row);
    __shared__ float slot;
    const int n = j.hidden;
    const long t = blockIdx.x;
    float *const x = (float *)j.x + (j.rows ? ((const int32_t *)j.rows)[t] : t) * n;
    if (j.y) {
        float *const shared = j.shared ? (float *)j.shared + t * n : nullptr;
        if (j.shared_norm) { /* `shared` is the device's own and may be written */
            load_row(row, shared, n);
            rms_norm_row(row, (const float *)j.shared_norm, n, j.eps, &slot);
            for (int i = threadIdx.x; i < n; i += blockDim.x) shared[i] = row[i];
        }
        if (j.places) sum_experts(j, row, t);
        else load_row(row, (const float *)j.y + t * n, n);
        if (j.y_norm) rms_norm_row(row, (const float *)j.y_norm, n, j.eps, &slot);
        if (shared) {
            const float gate = j.shared_gate ? sigmoid(((const float *)j.shared_gate)[t]) : 1.0f;
            each(n, [=](int i) { return shared[i]; }, [=](int i, float v) { row[i] += gate * v; });
        }
        if (j.out_norm) rms_norm_row(row, (const float *)j.out_norm, n, j.eps, &slot);
        const float scale = j.scale, end = j.layer_scale ? *(const float *)j.layer_scale : 1.0f;
        each(n, [=](int i) { return x[i]; }, [=](int i, float v) { x[i] = (v + scale * row[i]) * end; });
    }
    if (j.h || j.h_host || j.acts) norm_of_x(j, x, row, &slot, t, j.norm, j.h, j.h_host, j.acts);
    if (j.h2 || j.acts2) norm_of_x(j, x, row, &slot, t, j.norm2, j.h2, 0, j.acts2);
}

/* qk_norm 1: each head, 2: the whole vector, of which the head is a part. */
INLINE void norm_head(const mer_gpu_heads &a, float *row, float *slot, const float *whole, int n, const float *w, int head) {
    if (a.qk_norm == 1) {
        rms_norm_row(row, w, a.dim, a.eps, slot);
    } else if (a.qk_norm == 2) {
        if (threadIdx.x < 32) {
            const float factor = norm_factor(whole, n, a.eps);
            if (threadIdx.x == 0) *slot = factor;
        }
        __syncthreads();
        const float factor = *slot;
        for (int i = threadIdx.x; i < a.dim; i += blockDim.x) row[i] = w[head * a.dim + i] * (row[i] * factor);
    }
}

/* The pairs (i, i + pairs), or (2 i, 2 i + 1), of a row turn. */
INLINE void rotate(float *row, const float *cosine, const float *sine, int pairs, int interleaved) {
    for (int i = threadIdx.x; i < pairs; i += blockDim.x) {
        float *const first = row + (interleaved ? 2 * i : i), *const second = interleaved ? first + 1 : first + pairs;
        const float f = *first, s = *second;
        *first = f * cosine[i] - s * sine[i];
        *second = s * cosine[i] + f * sine[i];
    }
}

/* grid = (n_heads + 2 n_kv, tokens); dynamic shared memory: dim floats. */
MER_KERNEL(mer_heads, mer_gpu_heads a) {
    MER_DYNAMIC_SHARED(row);
    __shared__ float slot;
    const int dim = a.dim;
    const long t = blockIdx.y;
    int part = 0, head = blockIdx.x; /* 0 query, 1 key, 2 value */
    if (head >= a.n_heads) {
        part = head >= a.n_heads + a.n_kv ? 2 : 1;
        head -= a.n_heads + (part - 1) * a.n_kv;
    }
    const float *whole = (const float *)a.qkv + t * a.stride;
    if (part) whole += a.n_heads * dim;
    if (part == 2 && !a.no_v) whole += a.n_kv * dim;
    const int n = (part ? a.n_kv : a.n_heads) * dim;
    const float *const w = (const float *)(part ? a.k_norm : a.q_norm);
    for (int i = threadIdx.x; i < dim; i += blockDim.x) row[i] = whole[head * dim + i];
    if (part < 2 && !a.qk_norm_last) norm_head(a, row, &slot, whole, n, w, head);
    if (part == 2 && a.v_norm) rms_norm_row(row, nullptr, dim, a.eps, &slot);
    if (a.limit >= 0) {
        for (int i = threadIdx.x; i < dim; i += blockDim.x) {
            if (row[i] > a.limit) row[i] = a.limit;
            if (row[i] < -a.limit) row[i] = -a.limit;
        }
    }
    if (part < 2) {
        __syncthreads();
        rotate(row, (const float *)a.cosine + t * a.pairs, (const float *)a.sine + t * a.pairs, a.pairs, a.interleaved);
        if (a.qk_norm_last) norm_head(a, row, &slot, whole, n, w, head);
    }
    __syncthreads();
    if (part == 0) {
        for (int i = threadIdx.x; i < dim; i += blockDim.x) ((float *)a.q)[(t * a.n_heads + head) * dim + i] = row[i];
        return;
    }
    const int position = ((const int32_t *)a.positions)[t];
    const int32_t *const table = (const int32_t *)a.tables + (long)((const int32_t *)a.sequence_of)[t] * a.table_stride;
    uint8_t *const block = (uint8_t *)a.blocks + (long)table[position / KV_BLOCK] * a.block_bytes;
    store_kv(block + ((part - 1) * a.n_kv + head) * kv_part_bytes(a.kv, dim), a.kv, position % KV_BLOCK, row, dim, part == 1);
}

/* grid = (n_heads + 1, tokens): the heads' queries, then the latent; dynamic shared memory: rank + rope floats. */
MER_KERNEL(mer_latent, mer_gpu_latent a) {
    MER_DYNAMIC_SHARED(row);
    __shared__ float slot;
    const int head = blockIdx.x, dim = a.rank + a.rope;
    const long t = blockIdx.y;
    const float *const cosine = (const float *)a.cosine + t * a.pairs, *const sine = (const float *)a.sine + t * a.pairs;
    if (head < a.n_heads) {
        const long at = t * a.n_heads + head;
        const float *const q = (const float *)a.q + at * (a.nope + a.rope) + a.nope;
        for (int i = threadIdx.x; i < a.rope; i += blockDim.x) row[i] = q[i];
        __syncthreads();
        rotate(row, cosine, sine, a.pairs, a.interleaved);
        __syncthreads();
        for (int i = threadIdx.x; i < a.rope; i += blockDim.x) ((float *)a.wide)[at * dim + a.rank + i] = row[i];
        return;
    }
    load_row(row, (const float *)a.latents + t * dim, dim);
    rms_norm_row(row, (const float *)a.norm, a.rank, a.eps, &slot);
    rotate(row + a.rank, cosine, sine, a.pairs, a.interleaved);
    __syncthreads();
    const int position = ((const int32_t *)a.positions)[t];
    const int32_t *const table = (const int32_t *)a.tables + (long)((const int32_t *)a.sequence_of)[t] * a.table_stride;
    store_kv((uint8_t *)a.blocks + (long)table[position / KV_BLOCK] * a.block_bytes, a.kv, position % KV_BLOCK, row, dim, false);
}
