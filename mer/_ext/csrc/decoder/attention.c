/* Attention: which level's code (attend.h) runs. */
#include "../mer_decoder.h"
#include "level.h"

MER_DECLARE_LEVELS(mer_attend, const mer_attention *, const int32_t *, long, long, long, long, int)
MER_DECLARE_LEVELS(mer_attend_chosen, const mer_attention *, const int32_t *, const int32_t *, long, long, long, long, int)
MER_DECLARE_LEVELS(mer_attend_rows, const mer_attention *, const mer_rows *, const int32_t *, const int32_t *, long, long,
                   long, long, int)
MER_DECLARE_LEVELS(mer_index_scores, const mer_index *, const int32_t *, long, long, long, float *, float *)

size_t mer_attend_scratch(const mer_attention *a, long tokens, long heads) {
    const size_t block = MER_KV_BLOCK * (size_t)(a->key_dim + (a->latent ? 0 : a->value_dim));
    const size_t queries = (size_t)tokens * heads;
    return (block + (MER_KV_BLOCK + 1) * MER_ATTENTION_UNITS(queries) + 2 * queries + 15) / 16 * 16;
}

void mer_attend(const mer_attention *a, const int32_t *table, long t0, long t1, long h0, long h1, int thread) {
    MER_BEST_LEVEL(mer_attend, a, table, t0, t1, h0, h1, thread);
}

void mer_attend_chosen(const mer_attention *a, const int32_t *table, const int32_t *chosen, long n, long t, long h0,
                       long h1, int thread) {
    MER_BEST_LEVEL(mer_attend_chosen, a, table, chosen, n, t, h0, h1, thread);
}

void mer_attend_rows(const mer_attention *a, const mer_rows *r, const int32_t *table, const int32_t *chosen, long n,
                     long t, long h0, long h1, int thread) {
    MER_BEST_LEVEL(mer_attend_rows, a, r, table, chosen, n, t, h0, h1, thread);
}

void mer_index_scores(const mer_index *x, const int32_t *table, long t, long b0, long b1, float *scratch,
                      float *scores) {
    MER_BEST_LEVEL(mer_index_scores, x, table, t, b0, b1, scratch, scores);
}
