/* Kernels that are wrong, or say how the simulator runs them: for its own tests. */
#include "cuda_shim.h"

/* Thread 0 waits for its block, the others of its warp for their warp: for ever. */
MER_KERNEL(test_stuck, float *) {
    if (threadIdx.x == 0)
        __syncthreads();
    else
        __syncwarp();
}

/* What the next thread wrote, with a barrier or without. */
MER_KERNEL(test_neighbours, int *out, int barrier) {
    __shared__ int written[128];
    written[threadIdx.x] = 0;
    __syncthreads();
    written[threadIdx.x] = (int)threadIdx.x + 1;
    if (barrier) __syncthreads();
    out[blockIdx.x * 128 + threadIdx.x] = written[(threadIdx.x + 1) % 128];
}

/* Of each lane what lane 31 - lane gave, then the sum of its eight. */
MER_KERNEL(test_lanes, int *out) {
    const int lane = (int)threadIdx.x % 32;
    int n = __shfl_sync(~0u, (int)threadIdx.x, 31 - lane);
    for (int by = 4; by; by /= 2) n += __shfl_xor_sync(~0u, n, by);
    out[threadIdx.x] = n;
}
