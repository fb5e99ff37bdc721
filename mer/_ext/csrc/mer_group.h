/* The (token, choice) pairs of a step in the order of their experts. */
#ifndef MER_GROUP_H
#define MER_GROUP_H

#include <stdint.h>

/* Counting sort of ids[tokens, top_k]. first[n_experts + 1]: the first sorted pair of each expert; position[tokens *
 * top_k]: the sorted place of each pair. 0, or -1: an id is outside [0, n_experts), or a token chose one twice. */
int mer_group(const int32_t *ids, int64_t tokens, int64_t top_k, int64_t n_experts, int64_t *first, int64_t *position);

#endif
