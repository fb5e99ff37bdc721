/* An expert is expected in d + L (1/p - 1) layers: d until its layer's turn, L layers of the model, p the chance that
 * a token wants it. Of p three moving averages are kept, of a short, a middle and a long memory, and mixed.
 *
 * Waits change only when a layer has its turn. So a search needs no look at every expert: it goes to the layer whose
 * longest wait and distance are the most, and on to others only while they may hold something later. */
#include "next_use.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { AVERAGES = 3 };
static const double MIX[AVERAGES] = {0.4, 0.3, 0.3};
static const double RATE[AVERAGES] = {0.5, 0.1, 0.02}; /* per token */
/* Of the averages: never 0, to tell waits apart for long, and far from denormal numbers, which are slow. */
static const double LEAST = 1e-30;

struct next_use {
    int64_t n_layers, n_experts; /* of each layer */
    int64_t layer;               /* whose turn it is */
    double *averages;            /* [n_layers, AVERAGES, n_experts] */
    double *wait;                /* [n_layers, n_experts] L (1/p - 1), or 0: expected */
    double *longest;             /* [n_layers] no expert of the layer that has a slot waits longer */
    double *reach;               /* [n_layers] of one search: the latest that may be found, -1: was looked at */
    double *part;                /* [n_experts] of one visit: the part of the tokens that chose an expert */
};

next_use *next_use_new(int64_t n_layers, int64_t n_experts) {
    const size_t layers = (size_t)n_layers, experts = (size_t)n_experts, all = layers * experts;
    next_use *p = malloc(sizeof *p);
    double *room = malloc(((AVERAGES + 1) * all + 2 * layers + experts) * sizeof *room);
    if (!p || !room) {
        free(p);
        free(room);
        return NULL;
    }
    *p = (next_use){.n_layers = n_layers, .n_experts = n_experts, .averages = room};
    p->wait = p->averages + AVERAGES * all;
    p->longest = p->wait + all;
    p->reach = p->longest + layers;
    p->part = p->reach + layers;
    for (size_t i = 0; i < AVERAGES * all; i++) p->averages[i] = LEAST;
    for (size_t i = 0; i < all; i++) p->wait[i] = (double)n_layers * (1 / LEAST - 1);
    for (size_t i = 0; i < layers; i++) p->longest[i] = INFINITY;
    return p;
}

void next_use_free(next_use *p) {
    if (!p) return;
    free(p->averages);
    free(p);
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
        double chance = 0;
        for (int a = 0; a < AVERAGES; a++) {
            double *const average = &averages[a * experts + e];
            *average += gain[a] * (p->part[e] - *average);
            if (*average < LEAST) *average = LEAST;
            chance += MIX[a] * *average;
        }
        wait[e] = (double)p->n_layers * (1 / chance - 1);
    }
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
