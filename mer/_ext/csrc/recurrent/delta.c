/* The gated delta rule, a token at a time. */
#include <math.h>

#include "../mer_recurrent.h"
#include "../decoder/gates.h"
#include "../decoder/level.h"

#define COLUMNS MER_DELTA_COLUMNS

size_t mer_delta_state(long key_dim, long value_dim) {
    return (size_t)(value_dim + COLUMNS - 1) / COLUMNS * COLUMNS * (size_t)key_dim;
}

static float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

MER_INLINE void to_length_one(float *x, long n, float factor) {
    const float f = factor / sqrtf(dot(x, x, n) + 1e-6f);
    for (long i = 0; i < n; i++) x[i] *= f;
}

MER_CLONES
void mer_delta_prepare(const mer_delta *d, long t) {
    float *q = d->mixed + t * d->stride, *k = q + d->key_heads * d->key_dim;
    const float root = 1.0f / sqrtf((float)d->key_dim);
    for (long h = 0; h < d->key_heads; h++) {
        to_length_one(q + h * d->key_dim, d->key_dim, root);
        to_length_one(k + h * d->key_dim, d->key_dim, 1.0f);
    }
    float *decay = d->decay + t * d->value_heads, *beta = d->beta + t * d->value_heads;
    for (long h = 0; h < d->value_heads; h++) {
        decay[h] = expf(d->rate[h] * softplus(decay[h] + d->bias[h]));
        beta[h] = 1.0f / (1.0f + expf(-beta[h]));
    }
}

MER_DECLARE_LEVELS(mer_delta_rule, const mer_delta *, long, long, long, long, const float *, float *, float *, long)

void mer_delta_rule(const mer_delta *d, long t0, long t1, long head, long column, const float *before, float *after,
                    float *kept, long kept_at) {
    MER_BEST_LEVEL(mer_delta_rule, d, t0, t1, head, column, before, after, kept, kept_at);
}

MER_CLONES
void mer_gated_rms_norm(const float *x, const float *w, const float *gate, float *y, long n, float eps) {
    const float factor = 1.0f / sqrtf(dot(x, x, n) / (float)n + eps);
    for (long i = 0; i < n; i += LANES) {
        vf v, g, weight;
        vf_load_some(&v, x + i, n - i);
        vf_load_some(&g, gate + i, n - i);
        vf_load_some(&weight, w + i, n - i);
        vf_silu(&g);
        v = weight * (v * factor) * g;
        vf_store_some(y + i, &v, n - i);
    }
}
