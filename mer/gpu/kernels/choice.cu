/* The router's choice on the device, and the products that follow from it, so that no host has to be asked.
 *
 * Scores, choice and weights are those of csrc/decoder/router.c, operation by operation; the rows of pairs are those of
 * csrc/mixture/group.c. One block of threads for all tokens: a warp takes every fourth of them. */
#include "decoder.cuh"
#include "vec.cuh"

#define WARPS (MER_GPU_THREADS / 32)
#define NOTHING __uint_as_float(0xff800000u)

/* x in shared memory becomes its softmax, by a warp. */
INLINE void softmax(float *x, int n) {
    const int lane = threadIdx.x % 32;
    float top = x[0], sum = 0.0f;
    for (int i = lane; i < n; i += 32) top = x[i] > top ? x[i] : top;
    for (int by = 16; by; by /= 2) {
        const float other = __shfl_xor_sync(~0u, top, by);
        top = other > top ? other : top;
    }
    __syncwarp();
    for (int i = lane; i < n; i += 32) x[i] = exp_below(x[i] - top);
    __syncwarp();
#pragma unroll 8
    for (int i = 0; i < n; i++) sum += x[i];
    __syncwarp();
    for (int i = lane; i < n; i += 32) x[i] /= sum;
}

/* Takes the largest of x out (it becomes -infinity), by a warp: its index, the lowest one of equals. */
INLINE int take_best(float *x, int n) {
    const int lane = threadIdx.x % 32;
    int best = lane;
    float top = NOTHING;
    for (int i = lane; i < n; i += 32)
        if (x[i] > top) {
            top = x[i];
            best = i;
        }
    for (int by = 16; by; by /= 2) {
        const float other = __shfl_xor_sync(~0u, top, by);
        const int index = __shfl_xor_sync(~0u, best, by);
        if (other > top || (other == top && index < best)) {
            top = other;
            best = index;
        }
    }
    __syncwarp();
    if (lane == 0) x[best] = NOTHING;
    __syncwarp();
    return best;
}

/* Experts outside the best groups become -infinity. */
INLINE void keep_best_groups(const mer_gpu_choice &c, float *choice, float *scores) {
    const int lane = threadIdx.x % 32, size = c.n_experts / c.n_groups;
    uint32_t kept = 0;
    if (lane < c.n_groups) {
        float first = NOTHING, second = NOTHING;
        for (int i = lane * size; i < (lane + 1) * size; i++) {
            if (choice[i] > first) {
                second = first;
                first = choice[i];
            } else if (choice[i] > second) {
                second = choice[i];
            }
        }
        scores[lane] = c.group_best == 1 ? first : first + second;
    }
    __syncwarp();
    for (int k = 0; k < c.top_groups; k++) kept |= 1u << take_best(scores, c.n_groups);
    for (int i = lane; i < c.n_experts; i += 32)
        if (!(kept >> i / size & 1)) choice[i] = NOTHING;
    __syncwarp();
}

/* Of token t into ids [top_k] of shared memory, best first; scores, choice and groups are this warp's own. */
INLINE void choose(const mer_gpu_choice &c, int t, float *scores, float *choice, float *groups, int *ids) {
    const int lane = threadIdx.x % 32, n = c.n_experts;
    const float *const logits = (const float *)c.logits + (long)t * n, *const scale = (const float *)c.expert_scale;
    float *const weights = (float *)c.weights + t * c.top_k;
    for (int i = lane; i < n; i += 32) scores[i] = c.sigmoid ? sigmoid(logits[i]) : logits[i];
    __syncwarp();
    if (!c.sigmoid) softmax(scores, n);
    for (int i = lane; i < n; i += 32) {
        const float score = c.bias ? scores[i] + ((const float *)c.bias)[i] : scores[i];
        choice[i] = score > -1e38f ? score : -1e38f; /* a NaN, too */
    }
    __syncwarp();
    if (c.n_groups > 1) keep_best_groups(c, choice, groups);
    for (int k = 0; k < c.top_k; k++) {
        const int best = take_best(choice, n);
        if (lane == 0) ids[k] = ((int32_t *)c.ids)[t * c.top_k + k] = best;
    }
    if (lane) return;
    float sum = c.epsilon;
    for (int k = 0; k < c.top_k; k++) sum += scores[ids[k]];
    for (int k = 0; k < c.top_k; k++) {
        float weight = scores[ids[k]];
        if (c.normalise) weight /= sum;
        weight *= c.scale;
        weights[k] = scale ? weight * scale[ids[k]] : weight;
    }
}

/* An expert's three products, of the rows [place, place + count). */
INLINE void list_products(const mer_gpu_choice &c, int at, int expert, int place, int count) {
    mer_gpu_product *const p = (mer_gpu_product *)c.products + at;
    const uint64_t *const weights = (const uint64_t *)c.experts + 3 * expert;
    const uint64_t mid = 4 * (uint64_t)c.inter, out = 4 * (uint64_t)c.hidden, index = c.index + 4 * (uint64_t)place;
    const uint64_t gate_bias = c.gate_bias ? c.gate_bias + expert * mid : 0;
    const uint64_t up_bias = c.up_bias ? c.up_bias + expert * mid : 0;
    const uint64_t down_bias = c.down_bias ? c.down_bias + expert * out : 0;
    p[0] = {weights[0], gate_bias, c.gate_rows + place * mid, index, 0, count};
    p[c.n_products] = {weights[1], up_bias, c.up_rows + place * mid, index, 0, count};
    p[2 * c.n_products] = {weights[2], down_bias, c.out_rows + place * out, 0, place, count};
}

/* grid = (1). Dynamic shared memory: words for 2 n_experts + MER_GPU_MOST_GROUPS of each warp, and for 2 of each pair. */
MER_KERNEL(mer_choose, mer_gpu_choice c) {
    MER_DYNAMIC_SHARED(memory);
    const int pairs = c.tokens * c.top_k, warp = threadIdx.x / 32, width = 2 * c.n_experts + MER_GPU_MOST_GROUPS;
    float *const own = memory + warp * width;
    int *const ids = (int *)(memory + WARPS * width), *const first = ids + pairs;
    int32_t *const places = (int32_t *)c.places, *const index = (int32_t *)c.index;
    for (int t = warp; t < c.tokens; t += WARPS)
        choose(c, t, own, own + c.n_experts, own + 2 * c.n_experts, ids + t * c.top_k);
    __syncthreads();
    for (int p = threadIdx.x; p < pairs; p += MER_GPU_THREADS) {
        int place = 0, same = 0; /* pairs before this one; of the same expert */
        for (int q = 0; q < pairs; q++) {
            same += ids[q] == ids[p] && q < p;
            place += ids[q] < ids[p];
        }
        places[p] = place + same;
        index[place + same] = p / c.top_k;
        first[p] = same ? -1 : place;
    }
    __syncthreads();
    int experts = 0;
    for (int q = 0; q < pairs; q++) experts += first[q] >= 0;
    for (int p = threadIdx.x; p < pairs; p += MER_GPU_THREADS) {
        if (first[p] < 0) continue;
        int at = 0, count = 0;
        for (int q = 0; q < pairs; q++) {
            at += first[q] >= 0 && ids[q] < ids[p];
            count += ids[q] == ids[p];
        }
        list_products(c, at, ids[p], first[p], count);
    }
    for (int i = experts + threadIdx.x; i < c.n_products; i += MER_GPU_THREADS)
        for (int part = 0; part < 3; part++) ((mer_gpu_product *)c.products)[part * c.n_products + i].count = 0;
}

#undef WARPS
#undef NOTHING
