/* The gated delta rule, a token at a time. */
#include <math.h>

#include "../mer_recurrent.h"
#include "../decoder/gates.h"

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

/* One token through [rows, COLUMNS] of a state; two chains of sums, over even and odd rows. */
MER_INLINE void step(const float *from, float *to, long rows, const float *q, const float *k, const v16 *v,
                     float decay, float beta, v16 *out) {
    v16 even0 = {0}, even1 = {0}, odd0 = {0}, odd1 = {0};
    long i = 0;
    for (; from && i + 2 <= rows; i += 2) {
        V16_LOAD(a, from + i * COLUMNS);
        V16_LOAD(b, from + i * COLUMNS + 16);
        V16_LOAD(c, from + i * COLUMNS + 32);
        V16_LOAD(e, from + i * COLUMNS + 48);
        even0 += k[i] * a;
        even1 += k[i] * b;
        odd0 += k[i + 1] * c;
        odd1 += k[i + 1] * e;
    }
    for (; from && i < rows; i++) {
        V16_LOAD(a, from + i * COLUMNS);
        V16_LOAD(b, from + i * COLUMNS + 16);
        even0 += k[i] * a;
        even1 += k[i] * b;
    }
    const v16 change0 = beta * (v[0] - decay * (even0 + odd0)), change1 = beta * (v[1] - decay * (even1 + odd1));
    even0 = even1 = odd0 = odd1 = (v16){0};
    for (i = 0; i < rows; i++) {
        v16 a = {0}, b = {0};
        if (from) {
            memcpy(&a, from + i * COLUMNS, sizeof a);
            memcpy(&b, from + i * COLUMNS + 16, sizeof b);
        }
        a = decay * a + k[i] * change0;
        b = decay * b + k[i] * change1;
        V16_STORE(to + i * COLUMNS, a);
        V16_STORE(to + i * COLUMNS + 16, b);
        if (i & 1) {
            odd0 += q[i] * a;
            odd1 += q[i] * b;
        } else {
            even0 += q[i] * a;
            even1 += q[i] * b;
        }
    }
    out[0] = even0 + odd0;
    out[1] = even1 + odd1;
}

MER_CLONES
void mer_delta_rule(const mer_delta *d, long t0, long t1, long head, long column, const float *before, float *after,
                    float *kept, long kept_at) {
    const long key_head = d->tiled ? head % d->key_heads : head / (d->value_heads / d->key_heads);
    const long width = d->value_dim - column, at = column * d->key_dim;
    const float *from = before ? before + at : NULL;
    float *to = after + at;
    for (long t = t0; t < t1; t++) {
        const float *q = d->mixed + t * d->stride + key_head * d->key_dim, *k = q + d->key_heads * d->key_dim;
        const float *value = d->mixed + t * d->stride + 2 * d->key_heads * d->key_dim + head * d->value_dim + column;
        float *out = d->out + (t * d->value_heads + head) * d->value_dim + column;
        v16 v[2], result[2];
        v16_load_some(v, value, width);
        v16_load_some(v + 1, width > 16 ? value + 16 : NULL, width - 16);
        step(from, to, d->key_dim, q, k, v, d->decay[t * d->value_heads + head], d->beta[t * d->value_heads + head],
             result);
        v16_store_some(out, result, width);
        if (width > 16) v16_store_some(out + 16, result + 1, width - 16);
        from = to;
        if (kept && t - t0 + 1 == kept_at) memcpy(kept + at, to, sizeof(float) * (size_t)(COLUMNS * d->key_dim));
    }
}

MER_CLONES
void mer_gated_rms_norm(const float *x, const float *w, const float *gate, float *y, long n, float eps) {
    const float factor = 1.0f / sqrtf(dot(x, x, n) / (float)n + eps);
    for (long i = 0; i < n; i += 16) {
        v16 v, g, weight;
        v16_load_some(&v, x + i, n - i);
        v16_load_some(&g, gate + i, n - i);
        v16_load_some(&weight, w + i, n - i);
        v16_silu(&g);
        v = weight * (v * factor) * g;
        v16_store_some(y + i, &v, n - i);
    }
}
