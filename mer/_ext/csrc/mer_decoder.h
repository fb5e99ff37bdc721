/* The decoder's operations on one token (or one span of tokens); decoder.pyx spreads them over the pool.
 *
 * Each result is computed in one fixed order that depends on that token alone: not on the other tokens of
 * the step, nor on the thread, nor on how a prompt was cut into steps. */
#ifndef MER_DECODER_H
#define MER_DECODER_H

#include <stddef.h>
#include <stdint.h>

#define MER_KV_BLOCK 16

/* y = x / rms(x) * w; y may be x. w NULL: all ones. */
void mer_rms_norm(const float *x, const float *w, float *y, long n, float eps);

/* y = (x - mean(x)) / sqrt(variance(x) + eps) * w + bias; y may be x. */
void mer_layer_norm(const float *x, const float *w, const float *bias, float *y, long n, float eps);

/* x += y */
void mer_add(float *x, const float *y, long n);

/* x += factor * y */
void mer_add_scaled(float *x, const float *y, float factor, long n);

/* x *= sigmoid(gate) */
void mer_gate(float *x, const float *gate, long n);

/* x *= factor */
void mer_scale(float *x, float factor, long n);

/* x = cap * tanh(x / cap) */
void mer_soft_cap(float *x, float cap, long n);

/* -limit <= x <= limit */
void mer_clip(float *x, float limit, long n);

/* cos and sin of position * inv_freq[i], times scale; each [pairs]. */
void mer_rope_angles(int32_t position, const float *inv_freq, long pairs, float scale, float *cosine,
                     float *sine);

/* Rotate the pairs (i, i + pairs), or (2 i, 2 i + 1) when interleaved, of x [2 * pairs] in place. */
void mer_rope(float *x, const float *cosine, const float *sine, long pairs, int interleaved);

/* How a block stores numbers. Q8_0: a part's int8 codes in order, then F16 scales, one for each 32 elements of a vector
 * (the last of them may be fewer): [groups, 16] for keys, [16, groups] for what is stored by position. */
enum { MER_KV_F32, MER_KV_F16, MER_KV_Q8_0 };

/* Bytes of one part of a block: 16 vectors of `dim`. */
size_t mer_kv_part_bytes(int kv, long dim);

/* Keys [n_kv, dim] and values [n_kv, dim] of one token to place `at` of a block: it has n_kv parts of keys, each
 * [dim, 16], then n_kv parts of values, each [16, dim]. */
void mer_kv_store(void *block, int kv, long at, const float *k, const float *v, long n_kv, long dim);

/* One token's latent [dim] to place `at` of a block, which is one part [16, dim]. */
void mer_latent_store(void *block, int kv, long at, const float *latent, long dim);

/* One token's index key [dim] to place `at` of a part [dim, 16], which stands behind the latents of a block. */
void mer_index_store(void *part, int kv, long at, const float *key, long dim);

typedef struct {
    const float *q;           /* [tokens, n_heads, key_dim] */
    float *out;               /* [tokens, n_heads, value_dim] */
    const char *blocks;       /* this layer's blocks */
    const int32_t *positions; /* [tokens] */
    const float *sinks;       /* [n_heads] a score that every query has besides its keys', without a value; NULL: none */
    float *scratch;           /* scratch_floats for each thread */
    size_t block_bytes, scratch_floats;
    long n_heads, n_kv, key_dim, value_dim;
    long window; /* positions seen, own included; 0: all */
    float scale;
    int kv;     /* MER_KV_... */
    int latent; /* a block is [16, key_dim] and the values are its first value_dim elements */
} mer_attention;

/* Floats of scratch that one call needs. */
size_t mer_attend_scratch(const mer_attention *a, long tokens, long heads);

/* Attention of tokens [t0, t1) of one sequence, query heads [h0, h1) of one key/value head. */
void mer_attend(const mer_attention *a, const int32_t *table, long t0, long t1, long h0, long h1, int thread);

/* The same for token t, which sees n chosen positions, ascending, and no others. For latents. */
void mer_attend_chosen(const mer_attention *a, const int32_t *table, const int32_t *chosen, long n, long t, long h0,
                       long h1, int thread);

typedef struct {
    const float *q;       /* [tokens, n_heads, dim] */
    const float *weights; /* [tokens, n_heads] */
    const char *keys;     /* the part with index keys of block 0 */
    size_t block_bytes;
    long n_heads, dim;
    int kv; /* MER_KV_... */
} mer_index;

/* scores [(b1 - b0) * 16] of token t for the positions of blocks [b0, b1) of its sequence: the sum over heads of
 * weight * max(0, q . key). scratch: 16 * dim floats. */
void mer_index_scores(const mer_index *x, const int32_t *table, long t, long b0, long b1, float *scratch,
                      float *scores);

/* The positions of the k highest of n scores, ascending; k <= n. Ties go to the lowest position, and a NaN is the
 * lowest score. scratch: 2 k numbers. */
void mer_choose(const float *scores, long n, long k, uint64_t *scratch, int32_t *chosen);

typedef struct {
    long n_experts, top_k, n_groups, top_groups;
    int group_best;    /* a group counts as much as this many of its best experts: 1 or 2 */
    int sigmoid;       /* else softmax */
    int normalise;     /* divide the chosen weights by their sum + epsilon */
    float scale, epsilon;
    float jitter;      /* above 0: sparsemixer, instead of all of this but n_experts and top_k */
    const float *bias; /* [n_experts], added to the scores for the choice only; NULL: none */
    const float *expert_scale; /* [n_experts], times which the weights are at last; NULL: none */
} mer_router;

/* logits [n_experts] -> ids and weights [top_k], best first, ties to the lowest index. logits are overwritten;
 * choice is scratch of n_experts floats. */
void mer_route(const mer_router *r, float *logits, float *choice, int32_t *ids, float *weights);

float mer_sigmoid(float x);

#endif
