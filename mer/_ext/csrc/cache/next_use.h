/* The policy next-use: of two experts the one goes that is expected to be wanted later. See next_use.c.
 * Everything here is done under the cache's mutex. */
#ifndef MER_CACHE_NEXT_USE_H
#define MER_CACHE_NEXT_USE_H

#include "word.h"

typedef struct next_use next_use;

/* Experts of each layer. NULL when there is no memory. */
next_use *next_use_new(int64_t n_layers, int64_t n_experts);
void next_use_free(next_use *p);
/* The turn of a layer: its `tokens` tokens chose ids[n], several each. */
void next_use_visit(next_use *p, int64_t layer, const int32_t *ids, int64_t n, int64_t tokens);
/* The expert will be wanted at its layer's next turn: until then nothing else counts. */
void next_use_expect(next_use *p, int64_t expert);
/* The expert has got a slot. */
void next_use_admit(next_use *p, int64_t expert);
/* The chance that a token wants it, as the averages say; and what that was at another time, in (0, 1]. */
double next_use_chance(const next_use *p, int64_t expert);
void next_use_remember(next_use *p, int64_t expert, double chance);
/* Layers until it is expected to be wanted. */
double next_use_in(const next_use *p, int64_t expert);
/* The evictable expert (by its word) that is expected last, and later than in `later_than` layers, or -1. */
int64_t next_use_victim(next_use *p, const word *words, double later_than);

#endif
