/* An expert is expected in d + L (1/p - 1) layers: d until its layer's turn, L layers of the model, p the chance that
 * a token wants it. Of p three moving averages are kept, of a short, a middle and a long memory, and mixed; with that
 * is mixed what the next token chose when the experts chosen now were chosen before. (Replays of a recorded trace of
 * Qwen3-30B-A3B and of the bundled model's gain 0.6 to 3 % of all accesses by it. What gained nothing or little: the
 * router's weights, other rates, more averages, what the layer before chose; of several requests the chance that any
 * of their tokens wants it, in place of p.)
 *
 * Waits change only when a layer has its turn. So a search needs no look at every expert: it goes to the layer whose
 * longest wait and distance are the most, and on to others only while they may hold something later.
 *
 * Memory: 37 bytes an expert, and one for each other expert of its layer; 1 MB for 48 layers of 128. */
#include "next_use.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { AVERAGES = 3 };
static const double MIX[AVERAGES] = {0.4, 0.3, 0.3};
static const double RATE[AVERAGES] = {0.5, 0.1, 0.02}; /* per token */
/* Of the averages: never 0, to tell waits apart for long, and far from denormal numbers, which are slow. */
static const double LEAST = 1e-30;
/* Of a chance: the part that is what the averages say, the part that is what followed before. */
static const double ALONE = 0.4, FOLLOWING = 0.6;

struct next_use {
    int64_t n_layers, n_experts; /* of each layer */
    int64_t layer;               /* whose turn it is */
    double *averages;            /* [n_layers, AVERAGES, n_experts] */
    double *wait;                /* [n_layers, n_experts] L (1/p - 1), or 0: expected */
    double *longest;             /* [n_layers] no expert of the layer that has a slot waits longer */
    double *reach;               /* [n_layers] of one search: the latest that may be found, -1: was looked at */
    double *part;                /* [n_experts] of one visit: the part of the tokens that chose an expert */
    double *alone, *following;   /* [n_experts] of one visit: the two chances */
    uint8_t *followed;           /* [n_layers, n_experts, n_experts] how often a token after i chose e */
    uint8_t *uses;               /* [n_layers, n_experts] of i, as far as it is known what followed */
    int32_t *last;               /* [n_layers, n_experts] what the tokens of the last step chose */
    int64_t *n_last;             /* [n_layers] how many those are; 0: more than there is room for */
};

next_use *next_use_new(int64_t n_layers, int64_t n_experts) {
    const size_t layers = (size_t)n_layers, experts = (size_t)n_experts, all = layers * experts;
    next_use *p = malloc(sizeof *p);
    if (!p) return NULL;
    *p = (next_use){.n_layers = n_layers, .n_experts = n_experts};
    p->averages = malloc(((AVERAGES + 1) * all + 2 * layers + 3 * experts) * sizeof *p->averages);
    p->followed = calloc(all * (experts + 1), 1);
    p->last = malloc(all * sizeof *p->last);
    p->n_last = calloc(layers, sizeof *p->n_last);
    if (!p->averages || !p->followed || !p->last || !p->n_last) {
        next_use_free(p);
        return NULL;
    }
    p->uses = p->followed + all * experts;
    p->wait = p->averages + AVERAGES * all;
    p->longest = p->wait + all;
    p->reach = p->longest + layers;
    p->part = p->reach + layers;
    p->alone = p->part + experts;
    p->following = p->alone + experts;
    for (size_t i = 0; i < AVERAGES * all; i++) p->averages[i] = LEAST;
    for (size_t i = 0; i < all; i++) p->wait[i] = (double)n_layers * (1 / LEAST - 1);
    for (size_t i = 0; i < layers; i++) p->longest[i] = INFINITY;
    return p;
}

void next_use_free(next_use *p) {
    if (!p) return;
    free(p->averages);
    free(p->followed);
    free(p->last);
    free(p->n_last);
    free(p);
}

/* A token chose now[n] of the layer, and the one before it in its text before[n]. */
static void learn(next_use *p, int64_t layer, const int32_t *before, const int32_t *now, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        uint8_t *const uses = &p->uses[layer * p->n_experts + before[i]];
        uint8_t *const followed = p->followed + (layer * p->n_experts + before[i]) * p->n_experts;
        if (*uses == UINT8_MAX) { /* half of it is forgotten */
            *uses /= 2;
            for (int64_t e = 0; e < p->n_experts; e++) followed[e] /= 2;
        }
        *uses += 1;
        for (int64_t k = 0; k < n; k++) followed[now[k]] += 1;
    }
}

/* A step of as many tokens as the one before it is taken for the next tokens of the same requests, in the same order.
 * Where that is wrong, as when one has left and another come, a little noise is learnt. */
static void learn_step(next_use *p, int64_t layer, const int32_t *ids, int64_t n, int64_t tokens) {
    int32_t *const last = p->last + layer * p->n_experts;
    if (p->n_last[layer] == n)
        for (int64_t i = 0; i < n; i += n / tokens) learn(p, layer, last + i, ids + i, n / tokens);
    p->n_last[layer] = n <= p->n_experts ? n : 0;
    memcpy(last, ids, (size_t)p->n_last[layer] * sizeof *last);
}

/* In `following`: the chances by what followed the experts of this step. Once, at least, `alone` did. */
static void follow(next_use *p, int64_t layer, int64_t n, int64_t tokens) {
    double *const restrict following = p->following;
    const double *const restrict alone = p->alone;
    const double weight = (double)tokens / (double)n; /* 1 / top_k */
    memset(following, 0, (size_t)p->n_experts * sizeof *following);
    for (int64_t i = 0; i < p->n_experts; i++) {
        if (p->part[i] == 0) continue;
        const uint8_t *const restrict followed = p->followed + (layer * p->n_experts + i) * p->n_experts;
        const double share = p->part[i] * weight / (p->uses[layer * p->n_experts + i] + 1);
        for (int64_t e = 0; e < p->n_experts; e++) following[e] += share * (followed[e] + alone[e]);
    }
}

void next_use_visit(next_use *p, int64_t layer, const int32_t *ids, int64_t n, int64_t tokens) {
    const int64_t experts = p->n_experts;
    double *const wait = p->wait + layer * experts, gain[AVERAGES];
    double *const averages = p->averages + layer * AVERAGES * experts;
    memset(p->part, 0, (size_t)experts * sizeof *p->part);
    for (int64_t i = 0; i < n; i++) p->part[ids[i]] += 1;
    for (int64_t e = 0; e < experts; e++) p->part[e] /= (double)tokens;
    /* Token by token each would move an average by `rate`, to 1 or 0. The tokens of a step have no order (several
     * requests, or a prompt of which only the sum is kept): this is the mean over all orders, exactly. */
    for (int a = 0; a < AVERAGES; a++) {
        double kept = 1;
        for (int64_t t = 0; t < tokens; t++) kept *= 1 - RATE[a];
        gain[a] = 1 - kept;
    }
    for (int64_t e = 0; e < experts; e++) {
        p->alone[e] = 0;
        for (int a = 0; a < AVERAGES; a++) {
            double *const average = &averages[a * experts + e];
            *average += gain[a] * (p->part[e] - *average);
            if (*average < LEAST) *average = LEAST;
            p->alone[e] += MIX[a] * *average;
        }
    }
    learn_step(p, layer, ids, n, tokens);
    follow(p, layer, n, tokens);
    for (int64_t e = 0; e < experts; e++)
        wait[e] = (double)p->n_layers * (1 / (ALONE * p->alone[e] + FOLLOWING * p->following[e]) - 1);
    p->longest[layer] = INFINITY; /* a search finds it out, if it comes to that */
    p->layer = layer;
}

/* Layers until a layer's turn: 1 for the next one, all for the one whose turn it is. */
static double turn(const next_use *p, int64_t layer) {
    return (double)(layer > p->layer ? layer - p->layer : layer - p->layer + p->n_layers);
}

void next_use_expect(next_use *p, int64_t expert) { p->wait[expert] = 0; }

void next_use_admit(next_use *p, int64_t expert) {
    double *const longest = &p->longest[expert / p->n_experts];
    if (p->wait[expert] > *longest) *longest = p->wait[expert];
}

double next_use_chance(const next_use *p, int64_t expert) {
    const double *const average = p->averages + expert / p->n_experts * AVERAGES * p->n_experts + expert % p->n_experts;
    double chance = 0;
    for (int a = 0; a < AVERAGES; a++) chance += MIX[a] * average[a * p->n_experts];
    return chance;
}

void next_use_remember(next_use *p, int64_t expert, double chance) {
    double *const average = p->averages + expert / p->n_experts * AVERAGES * p->n_experts + expert % p->n_experts;
    for (int a = 0; a < AVERAGES; a++) average[a * p->n_experts] = chance;
    p->wait[expert] = (double)p->n_layers * (1 / chance - 1);
}

double next_use_in(const next_use *p, int64_t expert) { return turn(p, expert / p->n_experts) + p->wait[expert]; }

int64_t next_use_victim(next_use *p, const word *words, double later_than) {
    int64_t victim = -1;
    double latest = later_than;
    for (int64_t l = 0; l < p->n_layers; l++) p->reach[l] = turn(p, l) + p->longest[l];
    for (;;) {
        int64_t layer = 0;
        for (int64_t l = 1; l < p->n_layers; l++)
            if (p->reach[l] > p->reach[layer]) layer = l;
        if (p->reach[layer] < latest) return victim;
        p->reach[layer] = -1;
        const double until = turn(p, layer);
        double longest = -INFINITY;
        for (int64_t e = layer * p->n_experts; e < (layer + 1) * p->n_experts; e++) {
            const uint64_t w = atomic_load_explicit(&words[e], memory_order_relaxed);
            if (state_of(w) == MER_STATE_ABSENT) continue;
            if (p->wait[e] > longest) longest = p->wait[e];
            const double in = until + p->wait[e];
            /* Of equals the first, whichever layer was looked at first. */
            if (evictable(w) && (in > latest || (in == latest && e < victim))) {
                latest = in;
                victim = e;
            }
        }
        p->longest[layer] = longest;
    }
}
