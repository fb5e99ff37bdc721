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

/* The sum of x[i]^2. */
float mer_square_sum(const float *x, long n);

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

/* DeepSeek-V4's compressed attention. A layer's block begins with 16 rows of keys, which are the values, too. Behind
 * them, in bytes from its start, are rows of what every `rate` positions are compressed from, [places * dim] values,
 * then as many gates; and the rows [dim] made of them, in the block of their last position. */
typedef struct {
    const char *blocks;
    size_t block_bytes;
    size_t raw;     /* where rows to compress begin */
    size_t entries; /* where compressed rows begin */
    long dim, rate;
    int overlap;    /* places are 2: the first is for the next window's row, the second for its own; else 1 */
    int kv, raw_kv; /* MER_KV_... of the keys and compressed rows, and of those to compress */
} mer_rows;

/* Bytes of a row of n numbers, and one in and out of memory that need not be aligned. */
size_t mer_kv_row_bytes(int kv, long n);
void mer_kv_row_store(char *row, int kv, const float *x, long n);

/* out [dim]: what the window that ends with `position` is compressed into, before norm and rotation: of each element
 * the mean of its values, weighted by the softmax of gate + bias. bias: [rate, places * dim]. scratch: as many floats
 * as a row to compress has, and 2 dim. */
void mer_compress(const mer_rows *r, const int32_t *table, long position, const float *bias, float *scratch,
                  float *out);

/* The place of compressed row `entry`. */
char *mer_entry(const mer_rows *r, const int32_t *table, long entry);

/* Scores of the first n compressed rows: the sum over heads of weight * max(0, q . row). q: [n_heads, dim]. */
void mer_entry_scores(const mer_rows *r, const int32_t *table, const float *q, const float *weights, long n_heads,
                      long n, float *scratch, float *scores);

/* Attention of token t over the positions of its window, then over n compressed rows: those chosen, or, NULL, the
 * first. Scratch as for mer_attend_chosen. */
void mer_attend_rows(const mer_attention *a, const mer_rows *r, const int32_t *table, const int32_t *chosen, long n,
                     long t, long h0, long h1, int thread);

/* n streams (16 at the most) of a hidden state, each `width` wide. rounds, eps: of the Sinkhorn-Knopp iteration. */
typedef struct {
    long n, width, rounds;
    float eps, norm_eps;
    int last; /* there are no weights but `pre` */
} mer_streams;

/* mixes: a projection of x [n, width] -> pre [n], post [n], comb [n, n], each being scale[i] * mixes / rms(x) + base,
 * made positive, comb's rows and columns adding up to 1. */
void mer_stream_weights(float *mixes, const float *x, const float *base, const float *scale, const mer_streams *s);

/* out = the sum of pre[i] * x[i] */
void mer_collapse(const float *x, const float *pre, long n, long width, float *out);

/* x[k] = post[k] * y + the sum of comb[j, k] * x[j] */
void mer_spread(float *x, const float *y, const float *post, const float *comb, long n, long width);

enum { MER_SCORE_SOFTMAX, MER_SCORE_SIGMOID, MER_SCORE_SQRT_SOFTPLUS };

typedef struct {
    long n_experts, top_k, n_groups, top_groups;
    int group_best;    /* a group counts as much as this many of its best experts: 1 or 2 */
    int score;         /* MER_SCORE_... */
    int normalise;     /* divide the chosen weights by their sum + epsilon */
    float scale, epsilon;
    float jitter;      /* above 0: sparsemixer, instead of all of this but n_experts and top_k */
    const float *bias; /* [n_experts], added to the scores for the choice only; NULL: none */
    const float *expert_scale; /* [n_experts], times which the weights are at last; NULL: none */
} mer_router;

/* logits [n_experts] -> ids and weights [top_k], best first, ties to the lowest index. logits are overwritten;
 * choice is scratch of n_experts floats. fixed [top_k]: the choice, in its order, where something else has made it;
 * NULL: none has. */
void mer_route(const mer_router *r, float *logits, float *choice, const int32_t *fixed, int32_t *ids,
               float *weights);

float mer_sigmoid(float x);

/* out [n, cols] = the rows of weights that tokens name; 0 where the format is none of F32, F16, BF16 and Q8_0. */
int mer_embed(int fmt, const void *weights, long cols, const int32_t *tokens, long n, float *out);

#endif
