/* What is done to every logit. The same bits on every CPU: each operation rounds by itself, in one order. */
#include "../mer_sampling.h"

#include <math.h>

#include "../decoder/vec.h"

typedef double v4d __attribute__((vector_size(32)));
typedef int64_t v4l __attribute__((vector_size(32)));

/* e^x for x <= 0. Reduced to |r| <= ln(2) / 2, Taylor's series up to r^13 / 13!, whose rest is below 2^-57; in
 * pairs, since one long chain of operations would keep the processor waiting. */
MER_INLINE void v4d_exp(v4d *x) {
    const double magic = 0x1.8p52;
    const v4l none = *x < -745.1332191019412; /* e^x is less than half of the least number there is */
    const v4d a = (v4d)((v4l)*x & ~none);
    const v4d shifted = a * 0x1.71547652b82fep+0 + magic;
    const v4d n = shifted - magic;
    v4d r = a - n * 0x1.62e42feep-1; /* exact: the constant ends in zeros */
    r = r - n * 0x1.a39ef35793c76p-33;
    const v4d r2 = r * r, r4 = r2 * r2, r8 = r4 * r4;
    const v4d p0 = r + 1.0;
    const v4d p2 = r * (1.0 / 6.0) + 0.5;
    const v4d p4 = r * (1.0 / 120.0) + 1.0 / 24.0;
    const v4d p6 = r * (1.0 / 5040.0) + 1.0 / 720.0;
    const v4d p8 = r * (1.0 / 362880.0) + 1.0 / 40320.0;
    const v4d p10 = r * (1.0 / 39916800.0) + 1.0 / 3628800.0;
    const v4d p12 = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
    const v4d high = (p10 * r2 + p8) + p12 * r4;
    const v4d p = ((p6 * r2 + p4) * r4 + high * r8) + (p2 * r2 + p0);
    /* n + 64 goes into the exponent and 2^-64 is a factor, for results that are subnormal. */
    const v4d scaled = (v4d)((v4l)p + (((v4l)shifted + 64) << 52)) * 0x1p-64;
    *x = (v4d)((v4l)scaled & ~none);
}

/* Four weights. */
MER_INLINE void weigh(const float *x, double peak, double slope, v4d *weights) {
    v4 narrow;
    memcpy(&narrow, x, sizeof narrow);
    *weights = (__builtin_convertvector(narrow, v4d) - peak) * slope;
    v4d_exp(weights);
}

/* Every eighth weight is added first. */
MER_INLINE double block_sum(const float *x, double peak, double slope) {
    v4d w[8];
    _Pragma("GCC unroll 8") for (int i = 0; i < 8; i++) weigh(x + 4 * i, peak, slope, w + i);
    const v4d low = (w[0] + w[2]) + (w[4] + w[6]), high = (w[1] + w[3]) + (w[5] + w[7]), sum = low + high;
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

/* The last block, of `left` logits, filled up with what has no weight. */
static void fill(const float *x, long left, float *block) {
    memcpy(block, x, sizeof(float) * (size_t)left);
    for (long i = left; i < MER_BLOCK; i++) block[i] = -INFINITY;
}

MER_CLONES int mer_peaks(const float *x, long n, float *peaks) {
    vi strange = {0};
    float last[MER_BLOCK];
    for (long at = 0; at < n; at += MER_BLOCK) {
        const float *block = x + at;
        if (n - at < MER_BLOCK) fill(block, n - at, last), block = last;
        v16 greater;
        EACH_PART(p) {
            VF_LOAD(a, block + p * LANES);
            VF_LOAD(b, block + 16 + p * LANES);
            /* Negative for a NaN. By arithmetic, since GCC takes comparisons apart that are no choice. */
            strange |= (0x7f800000 - ((vi)a & INT32_MAX)) | (0x7f800000 - ((vi)b & INT32_MAX));
            const vi first = a > b;
            greater.part[p] = VF_CHOOSE(first, a, b);
        }
        peaks[at / MER_BLOCK] = v16_max(&greater);
    }
    int found = 0;
    for (int i = 0; i < LANES; i++) found |= strange[i];
    return found < 0;
}

MER_CLONES void mer_block_sums(const float *x, long n, float peak, double slope, double *sums) {
    float last[MER_BLOCK];
    for (long at = 0; at < n; at += MER_BLOCK) {
        const float *block = x + at;
        if (n - at < MER_BLOCK) fill(block, n - at, last), block = last;
        sums[at / MER_BLOCK] = block_sum(block, peak, slope);
    }
}

MER_CLONES void mer_weights(const float *x, long n, float peak, double slope, double *weights) {
    v4d w;
    long at = 0;
    for (; at + 4 <= n; at += 4) {
        weigh(x + at, peak, slope, &w);
        memcpy(weights + at, &w, sizeof w);
    }
    if (at == n) return;
    float last[MER_BLOCK];
    fill(x + at, n - at, last);
    weigh(last, peak, slope, &w);
    memcpy(weights + at, &w, sizeof(double) * (size_t)(n - at));
}

MER_CLONES void mer_only(const float *x, const uint8_t *allowed, long n, float *out) {
    for (long i = 0; i < n; i++) out[i] = allowed[i] ? x[i] : -INFINITY;
}
