/* CUDA C++ as plain C++: the kernels' sources compile with this instead of CUDA's own definitions (MER_SIMULATED).
 *
 * A block's threads are fibers on one thread of the host. A fiber runs until it must wait for others of its warp or its
 * block; the order in which they run changes from block to block, so that a barrier that lacks shows. Shared memory is
 * static, since one block runs at a time. */
#ifndef CUDA_SHIM_H
#define CUDA_SHIM_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <functional>
#include <utility>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __shared__ static
#define __constant__ static const

struct dim3 {
    unsigned x, y, z;
};
struct int2 {
    int x, y;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace simulated {

struct place {
    dim3 thread, block, block_dim, grid_dim;
};
extern place *here; /* of the running fiber */
extern void *dynamic_shared;

void wait_for_block();
void wait_for_warp(uint32_t mask);
/* The word that another lane of the warp gave in the same call. */
uint32_t exchange(uint32_t mask, uint32_t word, int from);

typedef std::function<void()> call;
typedef std::function<call(void **params)> bind; /* copies the parameters */

struct registrar {
    static void add(const char *name, bind make);
    template <class... A> registrar(const char *name, void (*kernel)(A...)) {
        add(name, [kernel](void **params) { return copy(kernel, params, std::index_sequence_for<A...>()); });
    }
    template <class... A, size_t... I> static call copy(void (*kernel)(A...), void **params, std::index_sequence<I...>) {
        return std::bind(kernel, *(A *)params[I]...);
    }
};

template <class T> T shuffled(uint32_t mask, T value, int from) {
    static_assert(sizeof(T) == 4, "words only");
    uint32_t word;
    memcpy(&word, &value, 4);
    word = exchange(mask, word, from);
    memcpy(&value, &word, 4);
    return value;
}

static inline int lane() {
    const place *const p = here;
    return (int)((p->thread.x + p->block_dim.x * (p->thread.y + p->block_dim.y * p->thread.z)) % 32);
}

} // namespace simulated

#define threadIdx (simulated::here->thread)
#define blockIdx (simulated::here->block)
#define blockDim (simulated::here->block_dim)
#define gridDim (simulated::here->grid_dim)

#define MER_KERNEL(NAME, ...)                                             \
    extern "C" void NAME(__VA_ARGS__);                                    \
    static const simulated::registrar register_##NAME(#NAME, NAME);       \
    extern "C" void NAME(__VA_ARGS__)

static inline void __syncthreads() { simulated::wait_for_block(); }
static inline void __syncwarp(uint32_t mask = ~0u) { simulated::wait_for_warp(mask); }
template <class T> T __shfl_sync(uint32_t mask, T v, int from) { return simulated::shuffled(mask, v, from & 31); }
template <class T> T __shfl_xor_sync(uint32_t mask, T v, int by) {
    return simulated::shuffled(mask, v, simulated::lane() ^ by);
}
template <class T> T __shfl_down_sync(uint32_t mask, T v, int by) {
    const int from = simulated::lane() + by;
    return simulated::shuffled(mask, v, from < 32 ? from : simulated::lane());
}

template <class T> T __shfl_up_sync(uint32_t mask, T v, int by) {
    const int from = simulated::lane() - by;
    return simulated::shuffled(mask, v, from >= 0 ? from : simulated::lane());
}
static inline int __any_sync(uint32_t mask, int yes) {
    for (int by = 16; by; by /= 2) yes |= __shfl_xor_sync(mask, yes, by);
    return yes;
}

static inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 32; i += 8) c += (int8_t)(a >> i) * (int8_t)(b >> i);
    return c;
}
static inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
    return (uint32_t)(((uint64_t)high << 32 | low) >> (shift & 31));
}
static inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
    const uint64_t from = (uint64_t)y << 32 | x;
    uint32_t out = 0;
    for (int i = 0; i < 4; i++) {
        const uint32_t chosen = selector >> 4 * i & 15, byte = (uint32_t)(from >> 8 * (chosen & 7)) & 255;
        out |= (chosen & 8 ? (byte & 128 ? 255 : 0) : byte) << 8 * i;
    }
    return out;
}
static inline uint32_t __float_as_uint(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}
static inline float __uint_as_float(uint32_t u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}
static inline int __clz(int n) { return n ? __builtin_clz((unsigned)n) : 32; }
static inline int __float2int_rn(float f) { return (int)lrintf(f); }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }

#endif
