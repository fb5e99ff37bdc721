/* Filters and the draw. Nothing is sorted but the few tokens whose log-probabilities are wanted. */
#include "../mer_sampling.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Top-p's tokens are looked for within so many nats below the likeliest one, then within so many more ... */
static const double NEAR = 3.0, FAR = 40.0;

static uint64_t key_of(float score, long index) {
    score += 0.0f; /* minus zero equals zero */
    uint32_t bits;
    memcpy(&bits, &score, sizeof bits);
    bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (uint64_t)bits << 32 | (uint32_t)~(uint32_t)index;
}

static long index_of(mer_candidate candidate) { return (long)(uint32_t)~(uint32_t)candidate.key; }

/* From 1 / temperature on everything is finite, and 0 times it is 0. */
static double slope_of(double temperature) { return fmin(1.0 / temperature, DBL_MAX); }

/* Brings the highest keys to the front, as few as weigh `goal` together, but one or more; all where that is
 * less. How many: the last of them has the lowest key. Quickselect by weight instead of by number; pivots are
 * taken by chance (of a fixed generator), so that no order of logits is a slow one. */
static long highest(mer_candidate *c, long n, double goal) {
    long low = 0, high = n;
    double above = 0.0;
    uint64_t state = 1;
    while (low < high) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        const long at = low + (long)((state >> 33) % (uint64_t)(high - low));
        const mer_candidate pivot = c[at];
        c[at] = c[high - 1];
        long mid = low;
        double mass = above;
        for (long i = low; i < high - 1; i++) { /* without branches, which nobody could predict */
            const mer_candidate each = c[i];
            const int higher = each.key > pivot.key;
            c[i] = c[mid];
            c[mid] = each;
            mid += higher;
            mass += higher ? each.weight : 0.0;
        }
        c[high - 1] = c[mid];
        c[mid] = pivot;
        if (mid > low && mass >= goal) {
            high = mid;
        } else {
            above = mass + pivot.weight;
            low = mid + 1;
            if (above >= goal) break;
        }
    }
    return low;
}

long mer_likeliest(const float *x, long n, const mer_room *room) {
    long i = 0, block = 0;
    if (mer_peaks(x, n, room->peaks)) {
        while (x[i] == x[i]) i++;
        return i;
    }
    for (long b = 1; b < mer_blocks(n); b++) block = room->peaks[b] > room->peaks[block] ? b : block;
    for (i = block * MER_BLOCK; x[i] != room->peaks[block];) i++;
    return i;
}

/* Logits of at least `floor`: how many, their ids ascending. */
static long gather(const float *x, long n, float floor, const mer_room *room) {
    long found = 0;
    for (long b = 0; b < mer_blocks(n); b++) {
        if (room->peaks[b] < floor) continue;
        const long end = (b + 1) * MER_BLOCK < n ? (b + 1) * MER_BLOCK : n;
        for (long i = b * MER_BLOCK; i < end; i++) {
            room->ids[found] = (int32_t)i;
            found += x[i] >= floor;
        }
    }
    return found;
}

/* The k largest and those that equal the k-th: how many, their ids ascending. */
static long top_k(const float *x, long n, long k, const mer_room *room) {
    mer_candidate *c = room->candidates;
    const long blocks = mer_blocks(n);
    float floor = -INFINITY;
    if (k < blocks) { /* the k-th largest peak is a lower bound of the k-th largest */
        for (long b = 0; b < blocks; b++) c[b] = (mer_candidate){key_of(room->peaks[b], b), 1.0};
        floor = room->peaks[index_of(c[highest(c, blocks, (double)k) - 1])];
    }
    const long near = gather(x, n, floor, room);
    for (long i = 0; i < near; i++) c[i] = (mer_candidate){key_of(x[room->ids[i]], room->ids[i]), 1.0};
    floor = x[index_of(c[highest(c, near, (double)k) - 1])];
    long kept = 0;
    for (long i = 0; i < near; i++) {
        const int32_t id = room->ids[i];
        room->ids[kept] = id;
        kept += x[id] >= floor;
    }
    return kept;
}

/* Weights of the tokens in ids; their sum. */
static double weigh(const float *x, long count, float peak, double slope, const mer_room *room) {
    for (long i = 0; i < count; i++) room->scores[i] = x[room->ids[i]];
    mer_weights(room->scores, count, peak, slope, room->weights);
    double sum = 0.0;
    for (long i = 0; i < count; i++) sum += room->weights[i];
    return sum;
}

static double total(const float *x, long n, float peak, double slope, const mer_room *room) {
    mer_block_sums(x, n, peak, slope, room->sums);
    double sum = 0.0;
    for (long b = 0; b < mer_blocks(n); b++) sum += room->sums[b];
    return sum;
}

/* The logit that lies `nats` below the likeliest one, or a little less. */
static float below(float peak, double nats, double temperature) {
    const float floor = nextafterf((float)(peak - (nats + 1e-6) * temperature), -INFINITY);
    return fmaxf(floor, -FLT_MAX); /* -inf has no weight */
}

/* Of the tokens in ids, the fewest whose weights reach `goal`, likeliest first: how many, ascending. */
static long top_p(long count, double goal, const mer_room *room) {
    mer_candidate *c = room->candidates;
    for (long i = 0; i < count; i++)
        c[i] = (mer_candidate){key_of(room->scores[i], room->ids[i]), room->weights[i]};
    const uint64_t least = c[highest(c, count, goal) - 1].key;
    long kept = 0;
    for (long i = 0; i < count; i++) {
        const int stays = key_of(room->scores[i], room->ids[i]) >= least;
        room->ids[kept] = room->ids[i];
        room->weights[kept] = room->weights[i];
        kept += stays;
    }
    return kept;
}

long mer_survivors(const float *x, long n, const mer_filters *filters, long best, const mer_room *room) {
    const double slope = slope_of(filters->temperature);
    const float peak = x[best];
    double all = 1.0;
    long count;
    if (0 < filters->top_k && filters->top_k < n) {
        count = top_k(x, n, filters->top_k, room);
        all = weigh(x, count, peak, slope, room);
    } else if (filters->top_p < 1) {
        all = total(x, n, peak, slope, room);
        for (double nats = NEAR;; nats = nats < FAR ? nats + NEAR : INFINITY) {
            count = gather(x, n, below(peak, nats, filters->temperature), room);
            const double sum = weigh(x, count, peak, slope, room);
            if (sum >= filters->top_p * all || nats == INFINITY) break;
        }
    } else if (filters->min_p > 0) {
        count = gather(x, n, below(peak, -log(filters->min_p), filters->temperature), room);
        weigh(x, count, peak, slope, room);
    } else {
        return 0;
    }
    if (filters->top_p < 1) count = top_p(count, filters->top_p * all, room);
    long kept = 0;
    for (long i = 0; i < count; i++) { /* the likeliest one has weight 1 */
        const double weight = room->weights[i];
        room->ids[kept] = room->ids[i];
        room->weights[kept] = weight;
        kept += weight >= filters->min_p && weight > 0;
    }
    return kept;
}

/* The token where the cumulative sum of `count` weights, from `sum` on, passes `point`; the last one that has
 * a weight, where rounding lets it end before. */
static long passes(const double *weights, long count, double sum, double point) {
    long found = 0;
    for (long i = 0; i < count; i++) {
        sum += weights[i];
        if (weights[i] > 0) found = i;
        if (sum > point) break;
    }
    return found;
}

long mer_draw(const float *x, long n, const mer_filters *filters, long best, double uniform, const mer_room *room) {
    const long count = mer_survivors(x, n, filters, best, room);
    double sum = 0.0;
    if (count) {
        for (long i = 0; i < count; i++) sum += room->weights[i];
        return room->ids[passes(room->weights, count, 0.0, uniform * sum)];
    }
    /* Which block first: its weights are computed again, and no others kept. */
    const double slope = slope_of(filters->temperature);
    const double point = uniform * total(x, n, x[best], slope, room);
    long block = 0;
    while (sum + room->sums[block] <= point) sum += room->sums[block++];
    const long start = block * MER_BLOCK, left = n - start < MER_BLOCK ? n - start : MER_BLOCK;
    mer_weights(x + start, left, x[best], slope, room->weights);
    return start + passes(room->weights, left, sum, point);
}

double mer_log_total(const float *x, long n, long best, const mer_room *room) {
    return x[best] + log(total(x, n, x[best], 1.0, room));
}

static int by_key(const void *a, const void *b) {
    const uint64_t x = ((const mer_candidate *)a)->key, y = ((const mer_candidate *)b)->key;
    return (x < y) - (x > y);
}

void mer_top(const float *x, long n, long k, const mer_room *room) {
    mer_candidate *c = room->candidates;
    const long count = top_k(x, n, k, room);
    for (long i = 0; i < count; i++) c[i] = (mer_candidate){key_of(x[room->ids[i]], room->ids[i]), 1.0};
    highest(c, count, (double)k);
    qsort(c, (size_t)k, sizeof *c, by_key);
    for (long i = 0; i < k; i++) room->ids[i] = (int32_t)index_of(c[i]);
}

double mer_uniform(uint64_t seed, uint64_t position) {
    uint64_t a = position + 1, b = 0, c = 0, d = 0, key = seed, other = 0;
    for (int round = 0; round < 10; round++) {
        const unsigned __int128 left = (unsigned __int128)0xD2E7470EE14C6C93u * a;
        const unsigned __int128 right = (unsigned __int128)0xCA5A826395121157u * c;
        a = (uint64_t)(right >> 64) ^ b ^ key, b = (uint64_t)right;
        c = (uint64_t)(left >> 64) ^ d ^ other, d = (uint64_t)left;
        key += 0x9E3779B97F4A7C15u, other += 0xBB67AE8584CAA73Bu;
    }
    return (double)(a >> 11) * 0x1p-53;
}
