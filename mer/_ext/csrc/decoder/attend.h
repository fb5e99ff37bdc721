/* Attention over paged keys and values: softmax block by block of 16 positions, in ascending order.
 *
 * A span of queries shares each block it reads (converted from F16 once), but a query's own sums are
 * formed from the same blocks in the same order whatever span it is in. One query's part of one block is a
 * long chain of operations, each waiting for the one before: so all queries, and of few queries several
 * blocks, are scored, then all weighted, then all values added. */
#ifndef MER_DECODER_ATTEND_H
#define MER_DECODER_ATTEND_H

#include <math.h>

#include "../mer_decoder.h"
#include "kv.h"
#include "level.h"

#define PRAGMA(X) _Pragma(#X)
#define UNROLL(N) PRAGMA(GCC unroll N)

/* Softmax under way. Of each unit, which is one query and one block, 16 scores, later weights, and what the query's sums
 * before are to be multiplied by; of each query the highest score so far, and the sum of weights. */
typedef struct {
    float *weights, *shrink, *max, *sum;
} softmax;

MER_INLINE softmax softmax_in(float *memory, long queries) {
    softmax s = {.weights = memory};
    s.shrink = s.weights + MER_KV_BLOCK * MER_ATTENTION_UNITS((size_t)queries);
    s.max = s.shrink + MER_ATTENTION_UNITS((size_t)queries);
    s.sum = s.max + queries;
    return s;
}

/* q times 16 keys that are stored by element: four chains, so that additions overlap. */
MER_INLINE void score_by_element(const float *q, const float *keys, long dim, v16 *out) {
    v16 a = {0}, b = {0}, c = {0}, e = {0};
    long d = 0;
    UNROLL(2) for (; d + 4 <= dim; d += 4)
        EACH_PART(p) {
            const float *const at = keys + d * 16 + p * LANES;
            VF_LOAD(k0, at);
            VF_LOAD(k1, at + 16);
            VF_LOAD(k2, at + 32);
            VF_LOAD(k3, at + 48);
            a.part[p] += q[d] * k0;
            b.part[p] += q[d + 1] * k1;
            c.part[p] += q[d + 2] * k2;
            e.part[p] += q[d + 3] * k3;
        }
    for (; d < dim; d++)
        EACH_PART(p) {
            VF_LOAD(k0, keys + d * 16 + p * LANES);
            a.part[p] += q[d] * k0;
        }
    EACH_PART(p) out->part[p] = (a.part[p] + b.part[p]) + (c.part[p] + e.part[p]);
}

/* q times 16 keys that are stored by position, four at a time. */
MER_INLINE void score_by_position(const float *q, const float *keys, long dim, v16 *out) {
    float s[16];
    for (long j = 0; j < 16; j += 4) {
        const float *k0 = keys + j * dim, *k1 = k0 + dim, *k2 = k1 + dim, *k3 = k2 + dim;
        v16 a = {0}, b = {0}, c = {0}, e = {0};
        long d = 0;
        for (; d + 16 <= dim; d += 16)
            EACH_PART(p) {
                VF_LOAD(x, q + d + p * LANES);
                VF_LOAD(y0, k0 + d + p * LANES);
                VF_LOAD(y1, k1 + d + p * LANES);
                VF_LOAD(y2, k2 + d + p * LANES);
                VF_LOAD(y3, k3 + d + p * LANES);
                a.part[p] += x * y0;
                b.part[p] += x * y1;
                c.part[p] += x * y2;
                e.part[p] += x * y3;
            }
        s[j] = v16_sum(&a);
        s[j + 1] = v16_sum(&b);
        s[j + 2] = v16_sum(&c);
        s[j + 3] = v16_sum(&e);
        for (; d < dim; d++) {
            s[j] += q[d] * k0[d];
            s[j + 1] += q[d] * k1[d];
            s[j + 2] += q[d] * k2[d];
            s[j + 3] += q[d] * k3[d];
        }
    }
    memcpy(out, s, sizeof s);
}

/* So many elements of add_values(), a constant: their sums are registers. */
MER_INLINE void add_elements(const int n, float *out, const float *p, const float *values, long stride, long j0, long j1) {
    vf sum[64 / LANES];
    UNROLL(16) for (int i = 0; i < n / LANES; i++) memcpy(sum + i, out + i * LANES, sizeof(vf));
    UNROLL(4) for (long j = j0; j < j1; j++)
        UNROLL(16) for (int i = 0; i < n / LANES; i++) {
            VF_LOAD(v, values + j * stride + i * LANES);
            sum[i] += p[j] * v;
        }
    UNROLL(16) for (int i = 0; i < n / LANES; i++) VF_STORE(out + i * LANES, sum[i]);
}

/* out += the sum over j in [j0, j1) of p[j] * values[j], for each element in ascending order of j. */
MER_INLINE void add_values(float *out, const float *p, const float *values, long stride, long dim, long j0,
                           long j1) {
    long d = 0;
    for (; d + 64 <= dim; d += 64) add_elements(64, out + d, p, values + d, stride, j0, j1);
    for (; d + 32 <= dim; d += 32) add_elements(32, out + d, p, values + d, stride, j0, j1);
    for (; d + 16 <= dim; d += 16) add_elements(16, out + d, p, values + d, stride, j0, j1);
    for (; d < dim; d++)
        for (long j = j0; j < j1; j++) out[d] += p[j] * values[j * stride + d];
}

/* From element 16 - j on: which of sixteen places are j or above. Not comparisons, whose results GCC combines one by one. */
static const int32_t counting[2 * MER_KV_BLOCK] = {
    [16] = -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
};

/* The places [from, to) of a block that count for a query; the others may hold anything. */
typedef struct {
    long from, to;
} places;

/* Those of block b that token t may see. */
MER_INLINE places seen_places(const mer_attention *a, long t, long b) {
    const long position = a->positions[t] - b * MER_KV_BLOCK;
    const long first = a->window ? position - a->window + 1 : 0;
    const places seen = {first > 0 ? first : 0, position < MER_KV_BLOCK ? position + 1 : MER_KV_BLOCK};
    return seen.from < seen.to ? seen : (places){0, 0};
}

/* Which of part p's places count. */
MER_INLINE vi counted(places seen, int p) {
    vi from, to;
    memcpy(&from, counting + MER_KV_BLOCK - seen.from + p * LANES, sizeof from);
    memcpy(&to, counting + MER_KV_BLOCK - seen.to + p * LANES, sizeof to);
    return from & ~to;
}

/* 16 scores of one query, -inf where nothing counts. */
MER_INLINE void score(const mer_attention *a, const float *q, const float *keys, places seen, float *out) {
    v16 scores;
    if (a->latent)
        score_by_position(q, keys, a->key_dim, &scores);
    else
        score_by_element(q, keys, a->key_dim, &scores);
    EACH_PART(p) VF_STORE(out + p * LANES, VF_CHOOSE(counted(seen, p), scores.part[p] * a->scale, VF_ALL(-INFINITY)));
}

/* Unit u's weights, onto query i's sum; what that has so far shrinks where a score is above all before. */
MER_INLINE void weigh(const softmax *s, long u, long i, places seen) {
    v16 scores;
    EACH_PART(p) memcpy(scores.part + p, s->weights + u * MER_KV_BLOCK + p * LANES, sizeof(vf));
    const float top = v16_max(&scores);
    float shrink = 1.0f;
    if (top > s->max[i]) {
        shrink = exp1(s->max[i] - top);
        s->sum[i] *= shrink;
        s->max[i] = top;
    }
    s->shrink[u] = shrink;
    EACH_PART(p) {
        scores.part[p] -= s->max[i];
        vf_exp(scores.part + p);
        scores.part[p] = (vf)((vi)scores.part[p] & counted(seen, p));
        VF_STORE(s->weights + u * MER_KV_BLOCK + p * LANES, scores.part[p]);
    }
    s->sum[i] += v16_sum(&scores);
}

/* What unit u gives to its query's output. */
MER_INLINE void take(const mer_attention *a, const softmax *s, long u, const float *values, places seen, float *out) {
    if (s->shrink[u] != 1.0f)
        for (long d = 0; d < a->value_dim; d++) out[d] *= s->shrink[u];
    add_values(out, s->weights + u * MER_KV_BLOCK, values, a->latent ? a->key_dim : a->value_dim, a->value_dim,
               seen.from, seen.to);
}

/* Some heads of token t, and the first n of 16 keys that stand in a row and are the values, too. */
MER_INLINE void attend_rows(const mer_attention *a, const softmax *s, const float *keys, long n, long t, long h0,
                            long h1) {
    const places seen = {0, n};
    const float *q = a->q + (t * a->n_heads + h0) * a->key_dim;
    float *out = a->out + (t * a->n_heads + h0) * a->value_dim;
    for (long i = 0; i < h1 - h0; i++) score(a, q + i * a->key_dim, keys, seen, s->weights + i * MER_KV_BLOCK);
    for (long i = 0; i < h1 - h0; i++) weigh(s, i, i, seen);
    for (long i = 0; i < h1 - h0; i++) take(a, s, i, keys, seen, out + i * a->value_dim);
}

/* Queries [tokens, heads] and their outputs, before the first key. */
MER_INLINE void begin(const mer_attention *a, long t0, long t1, long h0, long h1, const softmax *s) {
    const long heads = h1 - h0;
    for (long i = 0; i < (t1 - t0) * heads; i++) {
        s->max[i] = a->sinks ? a->sinks[h0 + i % heads] : -INFINITY;
        s->sum[i] = a->sinks ? 1.0f : 0.0f;
    }
    for (long t = t0; t < t1; t++)
        memset(a->out + (t * a->n_heads + h0) * a->value_dim, 0, sizeof(float) * heads * a->value_dim);
}

/* The outputs, after the last key. */
MER_INLINE void end(const mer_attention *a, long t0, long t1, long h0, long h1, const float *sum) {
    for (long t = t0; t < t1; t++)
        for (long h = h0; h < h1; h++) {
            float *out = a->out + (t * a->n_heads + h) * a->value_dim;
            const float whole = sum[(t - t0) * (h1 - h0) + h - h0];
            for (long d = 0; d < a->value_dim; d++) out[d] /= whole;
        }
}

/* Bytes of keys or values that are needed soon: blocks lie anywhere, so the CPU does not see them coming. A share at a time,
 * between computations, for it waits when asked for more lines at once than it can have under way. */
MER_INLINE void fetch(const char *part, size_t share) {
    for (size_t at = 0; at < share; at += 64) __builtin_prefetch(part + at);
}

void FUNCTION(mer_attend)(const mer_attention *a, const int32_t *table, long t0, long t1, long h0, long h1, int thread) {
    const size_t key_floats = MER_KV_BLOCK * (size_t)a->key_dim;
    const size_t value_floats = MER_KV_BLOCK * (size_t)a->value_dim;
    const long kv_head = h0 / (a->n_heads / a->n_kv), heads = h1 - h0, queries = (t1 - t0) * heads;
    const size_t part = mer_kv_part_bytes(a->kv, a->key_dim), share = (part + (size_t)queries - 1) / (size_t)queries;
    float *key_buffer = a->scratch + (size_t)thread * a->scratch_floats;
    float *value_buffer = key_buffer + key_floats;
    const softmax s = softmax_in(a->latent ? value_buffer : value_buffer + value_floats, queries);
    begin(a, t0, t1, h0, h1, &s);

    const long oldest = a->window && a->positions[t0] >= a->window ? a->positions[t0] - a->window + 1 : 0;
    const long last = a->positions[t1 - 1] / MER_KV_BLOCK;
    /* Latents are keys and values at once, and there is room for those of one block. */
    const long together = a->latent || queries >= MER_LEAST_UNITS ? 1 : MER_LEAST_UNITS / queries;
    for (long b0 = oldest / MER_KV_BLOCK, b1; b0 <= last; b0 = b1) {
        b1 = b0 + together <= last ? b0 + together : last + 1;
        const float *keys = NULL, *values;
        for (long b = b0, u = 0; b < b1; b++) {
            const char *next = a->blocks + (size_t)table[b < last ? b + 1 : b] * a->block_bytes + kv_head * part;
            const char *block = a->blocks + (size_t)table[b] * a->block_bytes + kv_head * part;
            keys = as_floats(block, a->kv, a->key_dim, !a->latent, key_buffer);
            for (long t = t0, i = 0; t < t1; t++) {
                const float *q = a->q + (t * a->n_heads + h0) * a->key_dim;
                const places seen = seen_places(a, t, b);
                for (long h = 0; h < heads; h++, i++, u++) {
                    fetch(next + i * share, share);
                    score(a, q + h * a->key_dim, keys, seen, s.weights + u * MER_KV_BLOCK);
                }
            }
        }
        for (long b = b0, u = 0; b < b1; b++) {
            const char *block = a->blocks + (size_t)table[b] * a->block_bytes + (kv_head + a->n_kv) * part;
            for (long t = t0, i = 0; t < t1; t++) {
                const places seen = seen_places(a, t, b);
                for (long h = 0; h < heads; h++, i++, u++) {
                    if (!a->latent) fetch(block + i * share, share);
                    weigh(&s, u, i, seen);
                }
            }
        }
        for (long b = b0, u = 0; b < b1; b++) {
            const char *block = a->blocks + (size_t)table[b] * a->block_bytes + (kv_head + a->n_kv) * part;
            values = a->latent ? keys : as_floats(block, a->kv, a->value_dim, 0, value_buffer);
            for (long t = t0; t < t1; t++) {
                float *out = a->out + (t * a->n_heads + h0) * a->value_dim;
                const places seen = seen_places(a, t, b);
                for (long h = 0; h < heads; h++, u++) take(a, &s, u, values, seen, out + h * a->value_dim);
            }
        }
    }
    end(a, t0, t1, h0, h1, s.sum);
}

/* As mer_attend does it for a query that sees n keys, sixteen of them at a time: where all are chosen, the bytes are
 * the same. */
void FUNCTION(mer_attend_chosen)(const mer_attention *a, const int32_t *table, const int32_t *chosen, long n, long t, long h0,
                       long h1, int thread) {
    float *keys = a->scratch + (size_t)thread * a->scratch_floats;
    const softmax s = softmax_in(keys + MER_KV_BLOCK * (size_t)a->key_dim, h1 - h0);
    begin(a, t, t + 1, h0, h1, &s);
    for (long first = 0; first < n; first += MER_KV_BLOCK) {
        const long count = n - first < MER_KV_BLOCK ? n - first : MER_KV_BLOCK;
        for (long j = 0; j < count; j++) {
            const int32_t position = chosen[first + j];
            row_as_floats(a->blocks + (size_t)table[position / MER_KV_BLOCK] * a->block_bytes, a->kv, a->key_dim,
                          position % MER_KV_BLOCK, keys + j * a->key_dim);
        }
        attend_rows(a, &s, keys, count, t, h0, h1);
    }
    end(a, t, t + 1, h0, h1, s.sum);
}

void FUNCTION(mer_attend_rows)(const mer_attention *a, const mer_rows *r, const int32_t *table, const int32_t *chosen, long n,
                     long t, long h0, long h1, int thread) {
    float *keys = a->scratch + (size_t)thread * a->scratch_floats;
    const softmax s = softmax_in(keys + MER_KV_BLOCK * (size_t)a->key_dim, h1 - h0);
    const size_t row = mer_kv_row_bytes(a->kv, a->key_dim);
    const long position = a->positions[t], oldest = position >= a->window ? position - a->window + 1 : 0;
    const long seen = position + 1 - oldest;
    begin(a, t, t + 1, h0, h1, &s);
    for (long first = 0; first < seen + n; first += MER_KV_BLOCK) {
        const long count = seen + n - first < MER_KV_BLOCK ? seen + n - first : MER_KV_BLOCK;
        for (long j = 0; j < count; j++) {
            const long i = first + j, p = oldest + i;
            const char *key;
            if (i < seen)
                key = a->blocks + (size_t)table[p / MER_KV_BLOCK] * a->block_bytes + p % MER_KV_BLOCK * row;
            else
                key = mer_entry(r, table, chosen ? chosen[i - seen] : i - seen);
            mer_kv_row_load(key, a->kv, a->key_dim, keys + j * a->key_dim);
        }
        attend_rows(a, &s, keys, count, t, h0, h1);
    }
    end(a, t, t + 1, h0, h1, s.sum);
}

/* Every head's query times 16 keys; what is above 0 counts, times the head's weight. */
void FUNCTION(mer_index_scores)(const mer_index *x, const int32_t *table, long t, long b0, long b1, float *scratch,
                      float *scores) {
    for (long b = b0; b < b1; b++) {
        const float *keys = as_floats(x->keys + (size_t)table[b] * x->block_bytes, x->kv, x->dim, 1, scratch);
        v16 sum = {0};
        for (long h = 0; h < x->n_heads; h++) {
            v16 score;
            score_by_element(x->q + (t * x->n_heads + h) * x->dim, keys, x->dim, &score);
            EACH_PART(p) {
                const vf above = (vf)((vi)score.part[p] & (score.part[p] > 0.0f));
                sum.part[p] += x->weights[t * x->n_heads + h] * above;
            }
        }
        EACH_PART(p) VF_STORE(scores + (b - b0) * MER_KV_BLOCK + p * LANES, sum.part[p]);
    }
}

#endif
