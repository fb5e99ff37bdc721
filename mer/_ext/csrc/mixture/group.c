#include "../mer_group.h"

#include <string.h>

int mer_group(const int32_t *ids, int64_t tokens, int64_t top_k, int64_t n_experts, int64_t *first, int64_t *position) {
    const int64_t pairs = tokens * top_k;
    memset(first, 0, (size_t)(n_experts + 1) * sizeof *first);
    for (int64_t i = 0; i < pairs; i++) {
        if (ids[i] < 0 || ids[i] >= n_experts) return -1;
        for (int64_t j = i - i % top_k; j < i; j++)
            if (ids[j] == ids[i]) return -1;
        first[ids[i] + 1]++;
    }
    for (int64_t e = 0; e < n_experts; e++) first[e + 1] += first[e];
    for (int64_t i = 0; i < pairs; i++) position[i] = first[ids[i]]++;
    for (int64_t e = n_experts; e > 0; e--) first[e] = first[e - 1]; /* each was moved to the next one's */
    first[0] = 0;
    return 0;
}
