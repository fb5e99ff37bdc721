/* Sixteen floats at a time by GCC's vector extension: one source, and the compiler's clones for wider CPUs. */
#ifndef MER_DECODER_VEC_H
#define MER_DECODER_VEC_H

#include <stdint.h>
#include <string.h>

/* The compiler's own dispatch by CPUID, by levels: a name such as "haswell" would mean just that CPU. Resolvers
 * run too early for the sanitizers. */
#if defined(MER_CLONES) /* by whoever compiles it for one level */
#elif defined(__x86_64__) && !defined(__clang__) && __GNUC__ >= 12 && !defined(__SANITIZE_THREAD__) && \
    !defined(__SANITIZE_ADDRESS__)
#define MER_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MER_CLONES
#endif

#define MER_INLINE static inline __attribute__((always_inline))

typedef float v16 __attribute__((vector_size(64)));
typedef float v8 __attribute__((vector_size(32)));
typedef float v4 __attribute__((vector_size(16)));
typedef int32_t v16i __attribute__((vector_size(64)));
typedef int32_t v8i __attribute__((vector_size(32)));
typedef int32_t v4i __attribute__((vector_size(16)));

/* Macros, because passing a vector by value would depend on the ABI of the clone. */
#define V16_LOAD(name, p) \
    v16 name;             \
    memcpy(&(name), (p), sizeof(v16))
#define V16_STORE(p, value)               \
    do {                                  \
        const v16 kept = (value);         \
        memcpy((p), &kept, sizeof(v16));  \
    } while (0)

#define V16_HALF(v, first) __builtin_shufflevector(v, v, first, first + 1, first + 2, first + 3, \
                                                   first + 4, first + 5, first + 6, first + 7)
#define V8_HALF(v, first) __builtin_shufflevector(v, v, first, first + 1, first + 2, first + 3)

/* The lanes added pairwise: i and i + 8, then i and i + 4, ... */
MER_INLINE float v16_sum(const v16 *v) {
    const v8 a = V16_HALF(*v, 0) + V16_HALF(*v, 8);
    const v4 b = V8_HALF(a, 0) + V8_HALF(a, 4);
    return (b[0] + b[2]) + (b[1] + b[3]);
}

MER_INLINE float v16_max(const v16 *v) {
    const v8 a = V16_HALF(*v, 0), b = V16_HALF(*v, 8);
    const v8i first = a > b;
    const v8 c = (v8)(((v8i)a & first) | ((v8i)b & ~first));
    const v4 d = V8_HALF(c, 0), e = V8_HALF(c, 4);
    const v4i second = d > e;
    const v4 f = (v4)(((v4i)d & second) | ((v4i)e & ~second));
    const float g = f[0] > f[1] ? f[0] : f[1], h = f[2] > f[3] ? f[2] : f[3];
    return g > h ? g : h;
}

MER_INLINE float dot(const float *a, const float *b, long n) {
    v16 even = {0}, odd = {0};
    long i = 0;
    for (; i + 32 <= n; i += 32) {
        V16_LOAD(a0, a + i);
        V16_LOAD(b0, b + i);
        V16_LOAD(a1, a + i + 16);
        V16_LOAD(b1, b + i + 16);
        even += a0 * b0;
        odd += a1 * b1;
    }
    if (i + 16 <= n) {
        V16_LOAD(a0, a + i);
        V16_LOAD(b0, b + i);
        even += a0 * b0;
        i += 16;
    }
    even += odd;
    float sum = v16_sum(&even);
    for (; i < n; i++) sum += a[i] * b[i];
    return sum;
}

MER_INLINE float total(const float *a, long n) {
    v16 lanes = {0};
    long i = 0;
    for (; i + 16 <= n; i += 16) {
        V16_LOAD(x, a + i);
        lanes += x;
    }
    float sum = v16_sum(&lanes);
    for (; i < n; i++) sum += a[i];
    return sum;
}

/* e^x for x <= 0 (less than -87 counts as -87), in place; relative error below 2^-22. */
MER_INLINE void v16_exp(v16 *x) {
    const float magic = 0x1.8p23f;
    v16 a = *x;
    const v16i low = a < -87.0f; /* false for a NaN, which stays one */
    a = (v16)(((v16i)a & ~low) | ((v16i)((v16){0} - 87.0f) & low));
    const v16 shifted = a * 0x1.715476p+0f + magic;
    const v16 n = shifted - magic;
    v16 r = a - n * 0x1.62e4p-1f;
    r = r - n * 0x1.7f7d1cp-20f;
    v16 p = r * 0x1.6c16c2p-10f + 0x1.111112p-7f;
    p = p * r + 0x1.555556p-5f;
    p = p * r + 0x1.555556p-3f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    *x = (v16)((v16i)p + ((v16i)shifted << 23));
}

/* The same of one number, in the same bits. */
MER_INLINE float exp1(float x) {
    v16 lanes = (v16){0} + x;
    v16_exp(&lanes);
    return lanes[0];
}

#endif
