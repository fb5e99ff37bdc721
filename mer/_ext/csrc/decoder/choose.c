/* The highest of many scores. */
#include <stdlib.h>

#include "../mer_decoder.h"
#include "vec.h"

/* Numbers that sort as (score, then the lower position): all are different, so there is one order. */
static uint64_t key_of(float score, long position) {
    if (!(score > -3e38f)) score = -3e38f;
    if (score == 0.0f) score = 0.0f; /* minus zero, too */
    uint32_t bits;
    memcpy(&bits, &score, 4);
    bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (uint64_t)bits << 32 | (uint32_t)~(uint32_t)position;
}

/* Reorder x so that its k highest come first. */
static void bring_highest(uint64_t *x, long n, long k) {
    long low = 0, high = n - 1;
    while (low < high) {
        const uint64_t pivot = x[low + (high - low) / 2];
        long i = low, j = high;
        while (i <= j) {
            while (x[i] > pivot) i++;
            while (x[j] < pivot) j--;
            if (i <= j) {
                const uint64_t kept = x[i];
                x[i++] = x[j];
                x[j--] = kept;
            }
        }
        if (k - 1 <= j)
            high = j;
        else if (k - 1 >= i)
            low = i;
        else
            break;
    }
}

static int by_position(const void *a, const void *b) {
    const int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return (x > y) - (x < y);
}

void mer_choose(const float *scores, long n, long k, uint64_t *scratch, int32_t *chosen) {
    long held = 0;
    uint64_t least = 0; /* what is below this is not among the highest k */
    for (long i = 0; i < n; i++) {
        const uint64_t key = key_of(scores[i], i);
        if (key < least) continue;
        scratch[held++] = key;
        if (held == 2 * k) {
            bring_highest(scratch, held, k);
            held = k;
            least = scratch[0];
            for (long j = 1; j < k; j++) least = scratch[j] < least ? scratch[j] : least;
        }
    }
    bring_highest(scratch, held, k);
    for (long i = 0; i < k; i++) chosen[i] = (int32_t)~(uint32_t)scratch[i];
    qsort(chosen, (size_t)k, sizeof *chosen, by_position);
}
