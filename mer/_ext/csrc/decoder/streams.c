/* Hyper-connections: a hidden state of several streams, which learnt weights make one, and a block's output several. */
#include <math.h>

#include "../mer_decoder.h"
#include "gates.h"

#define STREAMS 16

void mer_stream_weights(float *mixes, const float *x, const float *base, const float *scale, const mer_streams *s) {
    const long n = s->n;
    const float factor = 1.0f / sqrtf(mer_square_sum(x, n * s->width) / (float)(n * s->width) + s->norm_eps);
    float *pre = mixes, *post = mixes + n, *comb = mixes + 2 * n;
    for (long i = 0; i < n; i++) pre[i] = mer_sigmoid(pre[i] * factor * scale[0] + base[i]) + s->eps;
    if (s->last) return;
    for (long i = 0; i < n; i++) post[i] = 2.0f * mer_sigmoid(post[i] * factor * scale[1] + base[n + i]);
    for (long i = 0; i < n; i++) {
        float *row = comb + i * n, top = -INFINITY, sum = 0.0f;
        for (long j = 0; j < n; j++) {
            row[j] = row[j] * factor * scale[2] + base[2 * n + i * n + j];
            top = row[j] > top ? row[j] : top;
        }
        for (long j = 0; j < n; j++) sum += row[j] = expf(row[j] - top);
        for (long j = 0; j < n; j++) row[j] = row[j] / sum + s->eps;
    }
    /* Sinkhorn and Knopp: columns, then rows and columns in turn, are made to add up to 1. */
    for (long round = 0; round < s->rounds; round++) {
        for (long i = 0; i < n && round; i++) {
            float sum = s->eps;
            for (long j = 0; j < n; j++) sum += comb[i * n + j];
            for (long j = 0; j < n; j++) comb[i * n + j] /= sum;
        }
        for (long j = 0; j < n; j++) {
            float sum = s->eps;
            for (long i = 0; i < n; i++) sum += comb[i * n + j];
            for (long i = 0; i < n; i++) comb[i * n + j] /= sum;
        }
    }
}

MER_CLONES
void mer_collapse(const float *x, const float *pre, long n, long width, float *out) {
    for (long d = 0; d < width; d++) out[d] = pre[0] * x[d];
    for (long i = 1; i < n; i++)
        for (long d = 0; d < width; d++) out[d] += pre[i] * x[i * width + d];
}

MER_CLONES
void mer_spread(float *x, const float *y, const float *post, const float *comb, long n, long width) {
    for (long d = 0; d < width; d += LANES) {
        vf before[STREAMS], block;
        vf_load_some(&block, y + d, width - d);
        for (long i = 0; i < n; i++) vf_load_some(before + i, x + i * width + d, width - d);
        for (long k = 0; k < n; k++) {
            vf sum = post[k] * block;
            for (long j = 0; j < n; j++) sum += comb[j * n + k] * before[j];
            vf_store_some(x + k * width + d, &sum, width - d);
        }
    }
}
