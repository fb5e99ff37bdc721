#include "elementwise.cuh"

/* x, f32 [tokens], rows x_stride floats apart, into prepared rows act_bytes apart; a warp takes 32 columns.
 * grid = (ceil(cols / MER_GPU_THREADS), tokens). */
MER_KERNEL(mer_quantise, const float *x, long x_stride, uint8_t *acts, long act_bytes, int cols, int tokens) {
    const int lane = threadIdx.x % 32, b = (blockIdx.x * MER_GPU_THREADS + threadIdx.x) / 32;
    if (b >= cols / ACT_BLOCK) return;
    for (int t = blockIdx.y; t < tokens; t += gridDim.y) {
        const act_q8 a = act_view(acts + t * act_bytes, cols);
        quantise_block(x[t * x_stride + b * ACT_BLOCK + lane], a, b, lane);
    }
}

/* h[i] = activate(gate[i], up[i]) of f32 [rows, inter]; h may be gate or up. Any grid. */
MER_KERNEL(mer_activate, const float *gate, const float *up, float *h, int rows, int inter, int kind, float alpha,
           float limit, float added) {
    const long n = (long)rows * inter, step = (long)gridDim.x * MER_GPU_THREADS;
    for (long i = (long)blockIdx.x * MER_GPU_THREADS + threadIdx.x; i < n; i += step)
        h[i] = activate(gate[i], up[i], kind, alpha, limit, added);
}

/* Both: the activated rows of [rows, inter] quantised, act_bytes apart, without their floats in between.
 * grid = (ceil(inter / MER_GPU_THREADS), rows), or fewer than rows. */
MER_KERNEL(mer_activate_quantise, const float *gate, const float *up, uint8_t *acts, long act_bytes, int rows, int inter,
           int kind, float alpha, float limit, float added) {
    const int lane = threadIdx.x % 32, b = (blockIdx.x * MER_GPU_THREADS + threadIdx.x) / 32;
    if (b >= inter / ACT_BLOCK) return;
    for (int r = blockIdx.y; r < rows; r += gridDim.y) {
        const long at = (long)r * inter + b * ACT_BLOCK + lane;
        const act_q8 a = act_view(acts + r * act_bytes, inter);
        quantise_block(activate(gate[at], up[at], kind, alpha, limit, added), a, b, lane);
    }
}
