/* DeepSeek-V4's compressed attention: rows of a block, and vectors that several positions are compressed into.
 *
 * What is compressed stays in the block of its position, so a step that is done again, a chunk that ends inside a
 * window and a block that two sequences share need nothing else. */
#include <math.h>

#include "../mer_decoder.h"
#include "gates.h"
#include "kv.h"

size_t mer_kv_row_bytes(int kv, long n) { return mer_kv_part_bytes(kv, n) / MER_KV_BLOCK; }

void mer_kv_row_store(char *row, int kv, const float *x, long n) {
    if (kv == MER_KV_F32)
        memcpy(row, x, sizeof(float) * (size_t)n);
    else if (kv == MER_KV_F16)
        for (long i = 0; i < n; i++) ((uint16_t *)row)[i] = mer_float_to_half(x[i]);
    else
        for (long i = 0; i < n; i += MER_KV_GROUP) {
            const long count = n - i < MER_KV_GROUP ? n - i : MER_KV_GROUP;
            const uint16_t scale = mer_quantise_group(x + i, count, (int8_t *)row + i, 1);
            memcpy(row + n + i / MER_KV_GROUP * 2, &scale, 2);
        }
}

/* The row of `position` that is to be compressed. */
static const char *raw_row(const mer_rows *r, const int32_t *table, long position) {
    const size_t row = mer_kv_row_bytes(r->raw_kv, 2 * (1 + r->overlap) * r->dim);
    return r->blocks + (size_t)table[position / MER_KV_BLOCK] * r->block_bytes + r->raw +
           position % MER_KV_BLOCK * row;
}

char *mer_entry(const mer_rows *r, const int32_t *table, long entry) {
    const long last = (entry + 1) * r->rate - 1, at = r->rate < MER_KV_BLOCK ? entry % (MER_KV_BLOCK / r->rate) : 0;
    return (char *)r->blocks + (size_t)table[last / MER_KV_BLOCK] * r->block_bytes + r->entries +
           at * mer_kv_row_bytes(r->kv, r->dim);
}

/* One more value of each element: top is the greatest gate so far, sum and out are sums times e^-top. */
MER_INLINE void take_in(const float *values, const float *gates, const float *bias, long dim, float *top, float *sum,
                        float *out) {
    for (long d = 0; d < dim; d += LANES) {
        vf gate, more, value, before, total, mean;
        vf_load_some(&gate, gates + d, dim - d);
        vf_load_some(&more, bias + d, dim - d);
        vf_load_some(&value, values + d, dim - d);
        vf_load_some(&before, top + d, dim - d);
        vf_load_some(&total, sum + d, dim - d);
        vf_load_some(&mean, out + d, dim - d);
        gate += more;
        const vi higher = gate > before;
        const vf now = VF_CHOOSE(higher, gate, before);
        vf old = before - now, fresh = gate - now;
        vf_exp(&old);
        vf_exp(&fresh);
        total = total * old + fresh;
        mean = mean * old + fresh * value;
        vf_store_some(top + d, &now, dim - d);
        vf_store_some(sum + d, &total, dim - d);
        vf_store_some(out + d, &mean, dim - d);
    }
}

MER_CLONES
void mer_compress(const mer_rows *r, const int32_t *table, long position, const float *bias, float *scratch,
                  float *out) {
    const long dim = r->dim, width = (1 + r->overlap) * dim, first = position + 1 - r->rate;
    float *row = scratch, *top = row + 2 * width, *sum = top + dim;
    for (long d = 0; d < dim; d++) {
        top[d] = -INFINITY;
        sum[d] = out[d] = 0.0f;
    }
    for (long p = r->overlap && first ? first - r->rate : first; p <= position; p++) {
        row_as_floats(raw_row(r, table, p), r->raw_kv, 2 * width, 0, row);
        const long half = r->overlap && p >= first ? dim : 0;
        take_in(row + half, row + width + half, bias + p % r->rate * width + half, dim, top, sum, out);
    }
    for (long d = 0; d < dim; d++) out[d] /= sum[d];
}

MER_CLONES
void mer_entry_scores(const mer_rows *r, const int32_t *table, const float *q, const float *weights, long n_heads,
                      long n, float *scratch, float *scores) {
    for (long e = 0; e < n; e++) {
        mer_kv_row_load(mer_entry(r, table, e), r->kv, r->dim, scratch);
        float sum = 0.0f;
        for (long h = 0; h < n_heads; h++) {
            const float score = dot(q + h * r->dim, scratch, r->dim);
            if (score > 0.0f) sum += weights[h] * score;
        }
        scores[e] = sum;
    }
}
