/* What the decoder's kernels take, by value; the host includes this, too. Pointers are numbers. */
#ifndef MER_GPU_DECODER_CUH
#define MER_GPU_DECODER_CUH

#if defined(__CUDACC__) || defined(MER_SIMULATED)
#include "mer_gpu.cuh"
#else
#include <stdint.h>
#endif

#define MER_GPU_JOIN_THREADS 512
#define MER_GPU_MOST_GROUPS 32 /* of a router's experts */
#define MER_GPU_QUERIES 8 /* rows of a tile of attention: queries of one key's heads */

/* The end of one block of a layer and the beginning of the next; pointers may be 0. */
typedef struct {
    uint64_t x;           /* [tokens, hidden], += scale * y, then *= layer_scale[0] */
    uint64_t y;           /* [tokens, hidden] what the block gave; 0: nothing is added */
    uint64_t places, weights; /* i32, f32 [tokens, top_k]; not 0: y has rows of experts, whose weighted sum the block gave */
    uint64_t shared;      /* [tokens, hidden], added to y before, */
    uint64_t shared_gate; /* times the sigmoid of [tokens] */
    uint64_t y_norm, shared_norm, out_norm; /* [hidden]: of y by itself, of shared by itself, of their sum */
    uint64_t layer_scale;
    uint64_t rows;                   /* i32 [tokens]: which of x it is; 0: each */
    uint64_t norm, h, h_host, acts;  /* h = norm(x); a copy; its prepared rows */
    uint64_t norm2, h2, acts2;       /* another norm of the same */
    uint64_t act_bytes;
    float scale, eps;
    int32_t hidden, layer_norm;      /* norm and norm2 have biases, behind their weights */
    int32_t top_k;
} mer_gpu_join;

/* The router's choice for few tokens, in a layer all of whose experts are on the device, and what they are to do.
 * Pairs of token and choice have rows in the order of experts, and of tokens. */
typedef struct {
    uint64_t logits;                         /* f32 [tokens, n_experts] */
    uint64_t bias, expert_scale;             /* f32 [n_experts]; 0: none */
    uint64_t experts;                        /* u64 [n_experts, 3]: where the weights of gate, up and down are */
    uint64_t gate_bias, up_bias, down_bias;  /* f32 [n_experts, inter], the same, [n_experts, hidden]; 0: none */
    uint64_t gate_rows, up_rows, out_rows;   /* f32 [pairs, inter], the same, [pairs, hidden] */
    uint64_t ids;                            /* i32 [tokens, top_k], the host's */
    uint64_t weights, places;                /* f32, i32 [tokens, top_k]: each pair's weight, and its row */
    uint64_t index, products;                /* i32 [pairs]: each row's token; [3, n_products], the last ones of no token */
    float scale, epsilon;
    int32_t tokens, n_experts, top_k, n_groups, top_groups, group_best, sigmoid, normalise;
    int32_t inter, hidden, n_products;
} mer_gpu_choice;

/* Between projections and attention. */
typedef struct {
    uint64_t qkv;                   /* f32 [tokens, stride]: queries, keys, values, each a head's dim floats */
    uint64_t q;                     /* f32 [tokens, n_heads * dim], where the queries go */
    uint64_t q_norm, k_norm;
    uint64_t cosine, sine;          /* [tokens, pairs] */
    uint64_t blocks, positions, sequence_of, tables;
    uint64_t block_bytes, stride;
    float eps, limit;               /* limit: of q, k and v; below 0: none */
    int32_t n_heads, n_kv, dim, pairs, interleaved, qk_norm, qk_norm_last, v_norm, no_v, table_stride, kv;
} mer_gpu_heads;

/* The same of latent attention: latents to their places, rotated parts of queries to those of the wide ones. */
typedef struct {
    uint64_t q;                     /* f32 [tokens, n_heads, nope + rope] */
    uint64_t wide;                  /* f32 [tokens, n_heads, rank + rope]: the last `rope` are written */
    uint64_t latents, norm;         /* f32 [tokens, rank + rope], [rank] */
    uint64_t cosine, sine;          /* [tokens, pairs] */
    uint64_t blocks, positions, sequence_of, tables;
    uint64_t block_bytes;
    float eps;
    int32_t n_heads, nope, rope, rank, pairs, interleaved, table_stride, kv;
} mer_gpu_latent;

/* Attention of queries [first, end) of a step. */
typedef struct {
    uint64_t q, out;              /* f32 [tokens, n_heads, dim], [tokens, n_heads, value_dim] */
    uint64_t gate;                /* f32 [tokens], gate_stride apart: times whose sigmoid the result is; 0: none */
    uint64_t sinks;               /* f32 [n_heads]; 0: none */
    uint64_t blocks, positions, sequence_of, tables;
    uint64_t spans;               /* i32 [spans, 3]: sequence, first token, end */
    uint64_t scores, shrinks, sums;
    uint64_t block_bytes, gate_stride, stride;
    float scale;
    int32_t n_heads, n_kv, dim, value_dim, window, table_stride, kv, first, end;
    int32_t tiles;                /* of a span: of ROWS queries of one key's heads */
    int32_t heads;                /* of a block of threads of the values: 1, 2 or 4 */
    int32_t latent;               /* values are the first value_dim elements of what is stored by position, [16, dim] */
} mer_gpu_attention;

#endif
