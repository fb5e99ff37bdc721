/* Floats by GCC's vector extension: one source, and the compiler's clones for wider CPUs.
 *
 * A vector is as wide as a register: GCC keeps wider ones in memory, writes them there in parts and reads them as a whole,
 * for which a processor waits. LANES: floats of a register. */
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

#ifndef LANES
#define LANES 8
#endif
enum { PARTS = 16 / LANES };

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef float v8 __attribute__((vector_size(32)));
typedef float v4 __attribute__((vector_size(16)));

/* Sixteen floats: the order of sums and of what hangs together is the same, however wide a register is. */
typedef struct {
    vf part[PARTS];
} v16;

#define EACH_PART(p) _Pragma("GCC unroll 4") for (int p = 0; p < PARTS; p++)

/* Macros, because passing a vector by value would depend on the ABI of the clone. */
#define VF_LOAD(name, p) \
    vf name;             \
    memcpy(&(name), (p), sizeof(vf))
#define VF_STORE(p, value)               \
    do {                                 \
        const vf kept = (value);         \
        memcpy((p), &kept, sizeof(vf));  \
    } while (0)
#define VF_ALL(x) ((vf){0} + (x))
#define VF_CHOOSE(mask, yes, no) ((vf)(((vi)(yes) & (mask)) | ((vi)(no) & ~(mask))))

/* Lanes added, or the greater ones of them, pairwise: i and i + 8, then i and i + 4, ... */
#define HALF_8(v, first) __builtin_shufflevector(v, v, first, first + 1, first + 2, first + 3, \
                                                 first + 4, first + 5, first + 6, first + 7)
#define HALF_4(v, first) __builtin_shufflevector(v, v, first, first + 1, first + 2, first + 3)
#define GREATER(type, itype, a, b) \
    ((type)(((itype)(a) & ((a) > (b))) | ((itype)(b) & ~((a) > (b)))))
typedef int32_t v8i __attribute__((vector_size(32)));
typedef int32_t v4i __attribute__((vector_size(16)));

MER_INLINE float v16_sum(const v16 *v) {
#if LANES == 16
    const v8 a = HALF_8(v->part[0], 0) + HALF_8(v->part[0], 8);
    const v4 b = HALF_4(a, 0) + HALF_4(a, 4);
#elif LANES == 8
    const v8 a = v->part[0] + v->part[1];
    const v4 b = HALF_4(a, 0) + HALF_4(a, 4);
#else
    const v4 b = (v->part[0] + v->part[2]) + (v->part[1] + v->part[3]);
#endif
    return (b[0] + b[2]) + (b[1] + b[3]);
}

MER_INLINE float v16_max(const v16 *v) {
#if LANES == 16
    const v8 a = HALF_8(v->part[0], 0), b = HALF_8(v->part[0], 8), c = GREATER(v8, v8i, a, b);
    const v4 d = HALF_4(c, 0), e = HALF_4(c, 4);
#elif LANES == 8
    const v8 c = GREATER(v8, v8i, v->part[0], v->part[1]);
    const v4 d = HALF_4(c, 0), e = HALF_4(c, 4);
#else
    const v4 d = GREATER(v4, v4i, v->part[0], v->part[2]), e = GREATER(v4, v4i, v->part[1], v->part[3]);
#endif
    const v4 f = GREATER(v4, v4i, d, e);
    const float g = f[0] > f[1] ? f[0] : f[1], h = f[2] > f[3] ? f[2] : f[3];
    return g > h ? g : h;
}

MER_INLINE float dot(const float *a, const float *b, long n) {
    v16 even = {0}, odd = {0};
    long i = 0;
    for (; i + 32 <= n; i += 32)
        EACH_PART(p) {
            VF_LOAD(a0, a + i + p * LANES);
            VF_LOAD(b0, b + i + p * LANES);
            VF_LOAD(a1, a + i + 16 + p * LANES);
            VF_LOAD(b1, b + i + 16 + p * LANES);
            even.part[p] += a0 * b0;
            odd.part[p] += a1 * b1;
        }
    if (i + 16 <= n) {
        EACH_PART(p) {
            VF_LOAD(a0, a + i + p * LANES);
            VF_LOAD(b0, b + i + p * LANES);
            even.part[p] += a0 * b0;
        }
        i += 16;
    }
    EACH_PART(p) even.part[p] += odd.part[p];
    float sum = v16_sum(&even);
    for (; i < n; i++) sum += a[i] * b[i];
    return sum;
}

MER_INLINE float total(const float *a, long n) {
    v16 lanes = {0};
    long i = 0;
    for (; i + 16 <= n; i += 16)
        EACH_PART(p) {
            VF_LOAD(x, a + i + p * LANES);
            lanes.part[p] += x;
        }
    float sum = v16_sum(&lanes);
    for (; i < n; i++) sum += a[i];
    return sum;
}

/* e^x for x <= 0 (less than -87 counts as -87), in place; relative error below 2^-22. */
MER_INLINE void vf_exp(vf *x) {
    const float magic = 0x1.8p23f;
    vf a = *x;
    const vi low = a < -87.0f; /* false for a NaN, which stays one */
    a = VF_CHOOSE(low, VF_ALL(-87.0f), a);
    const vf shifted = a * 0x1.715476p+0f + magic;
    const vf n = shifted - magic;
    vf r = a - n * 0x1.62e4p-1f;
    r = r - n * 0x1.7f7d1cp-20f;
    vf p = r * 0x1.6c16c2p-10f + 0x1.111112p-7f;
    p = p * r + 0x1.555556p-5f;
    p = p * r + 0x1.555556p-3f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    *x = (vf)((vi)p + ((vi)shifted << 23));
}

/* The same of one number, in the same bits. */
MER_INLINE float exp1(float x) {
    vf lanes = VF_ALL(x);
    vf_exp(&lanes);
    return lanes[0];
}

#endif
