/* What is done to every logit. The same bits on every CPU: each operation rounds by itself, in one order. */
#include "../mer_sampling.h"

#include <math.h>

#include "../decoder/vec.h"

typedef double v8d __attribute__((vector_size(64)));
typedef int64_t v8l __attribute__((vector_size(64)));

/* e^x for x <= 0. Reduced to |r| <= ln(2) / 2, Taylor's series up to r^13 / 13!, whose rest is below 2^-57; in
 * pairs, since one long chain of operations would keep the processor waiting. */
MER_INLINE void v8d_exp(v8d *x) {
    const double magic = 0x1.8p52;
    const v8l none = *x < -745.1332191019412; /* e^x is less than half of the least number there is */
    const v8d a = (v8d)((v8l)*x & ~none);
    const v8d shifted = a * 0x1.71547652b82fep+0 + magic;
    const v8d n = shifted - magic;
    v8d r = a - n * 0x1.62e42feep-1; /* exact: the constant ends in zeros */
    r = r - n * 0x1.a39ef35793c76p-33;
    const v8d r2 = r * r, r4 = r2 * r2, r8 = r4 * r4;
    const v8d p0 = r + 1.0;
    const v8d p2 = r * (1.0 / 6.0) + 0.5;
    const v8d p4 = r * (1.0 / 120.0) + 1.0 / 24.0;
    const v8d p6 = r * (1.0 / 5040.0) + 1.0 / 720.0;
    const v8d p8 = r * (1.0 / 362880.0) + 1.0 / 40320.0;
    const v8d p10 = r * (1.0 / 39916800.0) + 1.0 / 3628800.0;
    const v8d p12 = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
    const v8d high = (p10 * r2 + p8) + p12 * r4;
    const v8d p = ((p6 * r2 + p4) * r4 + high * r8) + (p2 * r2 + p0);
    /* n + 64 goes into the exponent and 2^-64 is a factor, for results that are subnormal. */
    const v8d scaled = (v8d)((v8l)p + (((v8l)shifted + 64) << 52)) * 0x1p-64;
    *x = (v8d)((v8l)scaled & ~none);
}

MER_INLINE void weigh(const float *x, double peak, double slope, v8d *weights) {
    v8 narrow;
    memcpy(&narrow, x, sizeof narrow);
    *weights = (__builtin_convertvector(narrow, v8d) - peak) * slope;
    v8d_exp(weights);
}

MER_INLINE double block_sum(const float *x, double peak, double slope) {
    v8d a, b, c, d;
    weigh(x, peak, slope, &a);
    weigh(x + 8, peak, slope, &b);
    weigh(x + 16, peak, slope, &c);
    weigh(x + 24, peak, slope, &d);
    a = (a + b) + (c + d);
    return ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]));
}

/* The last block, of `left` logits, filled up with what has no weight. */
static void fill(const float *x, long left, float *block) {
    memcpy(block, x, sizeof(float) * (size_t)left);
    for (long i = left; i < MER_BLOCK; i++) block[i] = -INFINITY;
}

MER_CLONES int mer_peaks(const float *x, long n, float *peaks) {
    v16i strange = {0};
    float last[MER_BLOCK];
    for (long at = 0; at < n; at += MER_BLOCK) {
        const float *block = x + at;
        if (n - at < MER_BLOCK) fill(block, n - at, last), block = last;
        V16_LOAD(a, block);
        V16_LOAD(b, block + 16);
        /* Negative for a NaN. By arithmetic, since GCC takes comparisons apart that are no choice. */
        strange |= (0x7f800000 - ((v16i)a & INT32_MAX)) | (0x7f800000 - ((v16i)b & INT32_MAX));
        const v16i first = a > b;
        a = (v16)(((v16i)a & first) | ((v16i)b & ~first));
        peaks[at / MER_BLOCK] = v16_max(&a);
    }
    int found = 0;
    for (int i = 0; i < 16; i++) found |= strange[i];
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
    v8d w;
    long at = 0;
    for (; at + 8 <= n; at += 8) {
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
