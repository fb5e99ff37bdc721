/* From logits to a token: what survives temperature, top-k, top-p and min-p, and which of it is drawn. */
#ifndef MER_SAMPLING_H
#define MER_SAMPLING_H

#include <stdint.h>

enum { MER_BLOCK = 32 }; /* logits of which the largest and the sum of weights are kept */

static inline long mer_blocks(long n) { return (n + MER_BLOCK - 1) / MER_BLOCK; }

/* temperature: above 0. top_k 0, top_p 1, min_p 0: everything survives. */
typedef struct {
    double temperature, top_p, min_p;
    long top_k;
} mer_filters;

/* key: by score, then by index, the lower one higher; see mer_key. */
typedef struct {
    uint64_t key;
    double weight;
} mer_candidate;

/* Memory for logits of n tokens: peaks and sums of mer_blocks(n), all else of n. */
typedef struct {
    float *peaks, *scores;
    double *sums, *weights;
    int32_t *ids;
    mer_candidate *candidates;
} mer_room;

/* peaks[b]: the largest of block b. Whether there is a NaN, which leaves the peaks undefined. */
int mer_peaks(const float *x, long n, float *peaks);
/* sums[b]: of block b's weights, exp((x - peak) * slope), each the same bits as by mer_weights. */
void mer_block_sums(const float *x, long n, float peak, double slope, double *sums);
/* weights[i] = exp((x[i] - peak) * slope), with a relative error below 2^-51; no x may be above peak. */
void mer_weights(const float *x, long n, float peak, double slope, double *weights);
/* out[i] = x[i] where allowed[i], else -inf. */
void mer_only(const float *x, const uint8_t *allowed, long n, float *out);

/* The index of the largest, the lowest of equals, that of a NaN if there is one; fills in the peaks. */
long mer_likeliest(const float *x, long n, const mer_room *room);
/* How many survive; they are in room's ids, ascending, and weights. 0: all tokens whose weight is not 0.
 * best: from mer_likeliest, x[best] is finite. */
long mer_survivors(const float *x, long n, const mer_filters *filters, long best, const mer_room *room);
/* The token at `uniform`, in [0, 1 - 2^-53], of the survivors' cumulative distribution in order of indices. */
long mer_draw(const float *x, long n, const mer_filters *filters, long best, double uniform, const mer_room *room);
/* The logarithm of the sum of exp(x). */
double mer_log_total(const float *x, long n, long best, const mer_room *room);
/* The k largest, at most n, into room's ids: best first, of equals the lowest index first. */
void mer_top(const float *x, long n, long k, const mer_room *room);
/* A number of [0, 1), a multiple of 2^-53: from Philox4x64-10 with key `seed` and counter `position` + 1. */
double mer_uniform(uint64_t seed, uint64_t position);

#endif
