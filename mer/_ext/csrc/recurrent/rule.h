/* The gated delta rule of a token after the other. */
#ifndef MER_RECURRENT_RULE_H
#define MER_RECURRENT_RULE_H

#include "../mer_recurrent.h"
#include "../decoder/gates.h"

#define COLUMNS MER_DELTA_COLUMNS

/* A row of COLUMNS columns. */
enum { ROW = COLUMNS / LANES };
#define EACH(i) _Pragma("GCC unroll 8") for (int i = 0; i < ROW; i++)

/* One token through [rows, COLUMNS] of a state; two chains of sums, over even and odd rows. */
MER_INLINE void step(const float *from, float *to, long rows, const float *q, const float *k, const vf *v, float decay,
                     float beta, vf *out) {
    vf even[ROW] = {0}, odd[ROW] = {0}, change[ROW];
    long i = 0;
    for (; from && i + 2 <= rows; i += 2) {
        EACH(c) {
            VF_LOAD(a, from + i * COLUMNS + c * LANES);
            VF_LOAD(b, from + (i + 1) * COLUMNS + c * LANES);
            even[c] += k[i] * a;
            odd[c] += k[i + 1] * b;
        }
    }
    if (from && i < rows) EACH(c) {
        VF_LOAD(a, from + i * COLUMNS + c * LANES);
        even[c] += k[i] * a;
    }
    EACH(c) change[c] = beta * (v[c] - decay * (even[c] + odd[c]));
    EACH(c) even[c] = odd[c] = (vf){0};
    for (i = 0; i < rows; i++) EACH(c) {
        vf a = {0};
        if (from) memcpy(&a, from + i * COLUMNS + c * LANES, sizeof a);
        a = decay * a + k[i] * change[c];
        VF_STORE(to + i * COLUMNS + c * LANES, a);
        if (i & 1)
            odd[c] += q[i] * a;
        else
            even[c] += q[i] * a;
    }
    EACH(c) out[c] = even[c] + odd[c];
}

void FUNCTION(mer_delta_rule)(const mer_delta *d, long t0, long t1, long head, long column, const float *before, float *after,
                    float *kept, long kept_at) {
    const long key_head = d->tiled ? head % d->key_heads : head / (d->value_heads / d->key_heads);
    const long width = d->value_dim - column, at = column * d->key_dim;
    const float *from = before ? before + at : NULL;
    float *to = after + at;
    for (long t = t0; t < t1; t++) {
        const float *q = d->mixed + t * d->stride + key_head * d->key_dim, *k = q + d->key_heads * d->key_dim;
        const float *value = d->mixed + t * d->stride + 2 * d->key_heads * d->key_dim + head * d->value_dim + column;
        float *out = d->out + (t * d->value_heads + head) * d->value_dim + column;
        vf v[ROW], result[ROW];
        EACH(c) vf_load_some(v + c, value + c * LANES, width - c * LANES);
        step(from, to, d->key_dim, q, k, v, d->decay[t * d->value_heads + head], d->beta[t * d->value_heads + head],
             result);
        EACH(c) if (width > c * LANES) vf_store_some(out + c * LANES, result + c, width - c * LANES);
        from = to;
        if (kept && t - t0 + 1 == kept_at) memcpy(kept + at, to, sizeof(float) * (size_t)(COLUMNS * d->key_dim));
    }
}

#endif
