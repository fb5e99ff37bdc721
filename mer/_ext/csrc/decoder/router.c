/* The router's choice of experts for one token. */
#include <math.h>

#include "../mer_decoder.h"
#include "vec.h"

/* By an exponential function of our own: the C library's differs between libraries, and a GPU has none of them. */
MER_CLONES static void softmax(float *x, long n) {
    float top = x[0], sum = 0.0f;
    long i = 0;
    for (long j = 1; j < n; j++) top = x[j] > top ? x[j] : top;
    for (; i + LANES <= n; i += LANES) {
        VF_LOAD(a, x + i);
        a -= top;
        vf_exp(&a);
        VF_STORE(x + i, a);
    }
    for (; i < n; i++) x[i] = exp1(x[i] - top);
    for (i = 0; i < n; i++) sum += x[i];
    for (i = 0; i < n; i++) x[i] /= sum;
}

/* Takes the largest of x out (it becomes -infinity) and returns its index; the lowest one of equals. */
static long take_best(float *x, long n) {
    long best = 0;
    for (long i = 1; i < n; i++)
        if (x[i] > x[best]) best = i;
    x[best] = -INFINITY;
    return best;
}

/* Experts outside the best groups become -infinity; a group counts as much as its best one or two. */
static void keep_best_groups(const mer_router *r, float *choice) {
    const long size = r->n_experts / r->n_groups;
    float scores[r->n_groups];
    char kept[r->n_groups];
    for (long g = 0; g < r->n_groups; g++) {
        float first = -INFINITY, second = -INFINITY;
        for (long i = g * size; i < (g + 1) * size; i++) {
            if (choice[i] > first) {
                second = first;
                first = choice[i];
            } else if (choice[i] > second) {
                second = choice[i];
            }
        }
        scores[g] = r->group_best == 1 ? first : first + second;
        kept[g] = 0;
    }
    for (long k = 0; k < r->top_groups; k++) kept[take_best(scores, r->n_groups)] = 1;
    for (long i = 0; i < r->n_experts; i++)
        if (!kept[i / size]) choice[i] = -INFINITY;
}

/* Each choice's weight is its share in the softmax of those that are left and nearly as good as it. */
static void mix_sparsely(const mer_router *r, const float *logits, float *choice, int32_t *ids, float *weights) {
    for (long i = 0; i < r->n_experts; i++) choice[i] = logits[i] > -1e38f ? logits[i] : -1e38f;
    for (long k = 0; k < r->top_k; k++) {
        const long best = take_best(choice, r->n_experts);
        const float top = logits[best];
        float sum = 1.0f;
        for (long i = 0; i < r->n_experts; i++) {
            if (choice[i] == -INFINITY) continue;
            const float size = fabsf(logits[i]) > top ? fabsf(logits[i]) : top;
            if ((top - logits[i]) / size <= 2.0f * r->jitter) sum += expf(logits[i] - top);
        }
        ids[k] = (int32_t)best;
        weights[k] = 1.0f / sum;
    }
}

void mer_route(const mer_router *r, float *logits, float *choice, const int32_t *fixed, int32_t *ids,
               float *weights) {
    const long n = r->n_experts;
    if (r->jitter > 0.0f) {
        mix_sparsely(r, logits, choice, ids, weights);
        return;
    }
    if (r->score == MER_SCORE_SIGMOID)
        for (long i = 0; i < n; i++) logits[i] = mer_sigmoid(logits[i]);
    else if (r->score == MER_SCORE_SQRT_SOFTPLUS) /* beyond 20 a float's softplus is the float */
        for (long i = 0; i < n; i++) logits[i] = sqrtf(logits[i] > 20.0f ? logits[i] : log1pf(expf(logits[i])));
    else
        softmax(logits, n);
    for (long i = 0; i < n; i++) {
        choice[i] = r->bias ? logits[i] + r->bias[i] : logits[i];
        /* A NaN is a bad choice, but an expert all the same; two of them have a finite sum. */
        if (!(choice[i] > -1e38f)) choice[i] = -1e38f;
    }
    if (r->n_groups > 1) keep_best_groups(r, choice);
    float sum = r->epsilon;
    for (long k = 0; k < r->top_k; k++) {
        ids[k] = fixed ? fixed[k] : (int32_t)take_best(choice, n);
        weights[k] = logits[ids[k]];
    }
    for (long k = 0; k < r->top_k; k++) sum += weights[k];
    for (long k = 0; k < r->top_k; k++) {
        if (r->normalise) weights[k] /= sum;
        weights[k] *= r->scale;
        if (r->expert_scale) weights[k] *= r->expert_scale[ids[k]];
    }
}
