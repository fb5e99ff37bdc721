/* Many threads on a cache of few slots, for the sanitizers to watch. Whoever loads an expert fills its slot with the
 * expert's own pattern; whoever holds a pin reads it with plain loads and finds nothing else. */
#include "mer_cache.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(ok)                                                        \
    do {                                                                 \
        if (!(ok)) {                                                     \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #ok);     \
            exit(1);                                                     \
        }                                                                \
    } while (0)

/* Few bytes are looked at, so that most of the time goes into the cache itself. */
enum { LAYERS = 4, EXPERTS = 40, SLOTS = 24, SLOT_BYTES = 4096, WORDS = 8, THREADS = 8, TURNS = 50000, HAND = 3 };

static mer_cache *cache;
static atomic_int loaders[EXPERTS], stop;

typedef struct {
    uint64_t random;
    int64_t acquired[4], published, failed, cleared;
} job;

static uint64_t next_random(job *j) {
    j->random ^= j->random << 13;
    j->random ^= j->random >> 7;
    j->random ^= j->random << 17;
    return j->random >> 16;
}

/* Low numbers far more often than high ones. */
static int64_t some_expert(job *j) {
    const uint64_t u = next_random(j) % 1024;
    return (int64_t)(u * u * EXPERTS >> 20);
}

static uint64_t *words_of(int64_t slot) {
    return (uint64_t *)(void *)(mer_cache_arena(cache) + slot * SLOT_BYTES + SLOT_BYTES - 8 * WORDS);
}

static uint64_t pattern(int64_t expert, int i) { return (uint64_t)(expert + 1) * 0x9e3779b97f4a7c15u + (uint64_t)i; }

static void verify(int64_t expert, int64_t slot) {
    const uint64_t *words = words_of(slot);
    for (int i = 0; i < WORDS; i++) CHECK(words[i] == pattern(expert, i));
}

/* The read: 1, or 0 when it "fails" half way. Nobody else may be at it. */
static int load(job *j, int64_t expert, int64_t slot) {
    const int fails = next_random(j) % 16 == 0;
    CHECK(atomic_fetch_add(&loaders[expert], 1) == 0);
    CHECK(mer_cache_state(cache, expert) == MER_STATE_LOADING);
    for (int i = 0; i < WORDS; i++) {
        words_of(slot)[i] = fails ? 0 : pattern(expert, i);
        if (i == WORDS / 2) {
            if (next_random(j) % 4 == 0) sched_yield();
            if (fails) break;
        }
    }
    CHECK(atomic_fetch_sub(&loaders[expert], 1) == 1);
    return !fails;
}

/* Acquires an expert and has it resident: its slot; or -1 and nothing is held. */
static int64_t take(job *j, int64_t expert) {
    int64_t slot = -1;
    const int early = next_random(j) % 8 == 0;
    const int found = (early ? mer_cache_acquire_early : mer_cache_acquire)(cache, expert, &slot);
    j->acquired[found]++;
    if (found == MER_ACQ_FULL) return -1;
    CHECK(slot >= 0 && slot < SLOTS);
    CHECK(mer_cache_pins(cache, expert) > 0);
    if (found == MER_ACQ_MISS) {
        if (load(j, expert, slot)) {
            CHECK(mer_cache_publish(cache, expert) == 0);
            j->published++;
        } else {
            CHECK(mer_cache_fail(cache, expert) == 0);
            CHECK(mer_cache_release(cache, expert) == 0);
            j->failed++;
            return -1;
        }
    }
    if (found == MER_ACQ_BUSY) {
        int state = MER_STATE_FAILED; /* as one who loses patience and lets go without another look */
        if (next_random(j) % 2)
            while ((state = mer_cache_state(cache, expert)) == MER_STATE_LOADING) sched_yield();
        else
            sched_yield();
        if (state != MER_STATE_RESIDENT) {
            CHECK(mer_cache_release(cache, expert) == 0);
            return -1;
        }
    }
    verify(expert, slot);
    return slot;
}

static void *work(void *arg) {
    job *j = arg;
    int64_t experts[HAND], slots[HAND];
    for (int i = 0; i < HAND; i++) slots[i] = -1;
    for (int turn = 0; turn < TURNS + HAND; turn++) {
        const int at = turn % HAND;
        if (slots[at] >= 0) { /* held since HAND turns ago */
            CHECK(mer_cache_state(cache, experts[at]) == MER_STATE_RESIDENT);
            verify(experts[at], slots[at]);
            CHECK(mer_cache_release(cache, experts[at]) == 0);
            slots[at] = -1;
        }
        if (turn >= TURNS) continue;
        experts[at] = some_expert(j);
        slots[at] = take(j, experts[at]);
    }
    return NULL;
}

/* What another part of the program does meanwhile. */
static void *meddle(void *arg) {
    job *j = arg;
    int64_t protected_one = 0, seen = 0;
    while (!atomic_load(&stop)) {
        mer_cache_stats stats;
        mer_cache_census now;
        mer_cache_protect(cache, protected_one, 0);
        protected_one = some_expert(j);
        const int64_t used = some_expert(j), size = EXPERTS / LAYERS;
        const int32_t ids[] = {(int32_t)(used % size), (int32_t)((used + 1) % size)};
        mer_cache_visit(cache, used / size, ids, 2, 1);
        mer_cache_protect(cache, protected_one, 1);
        if (next_random(j) % 16 == 0) j->cleared += mer_cache_clear(cache);
        if (next_random(j) % 8 == 0) {
            const int64_t wanted = SLOTS / 2 + (int64_t)(next_random(j) % (SLOTS / 2 + 1)), left = mer_cache_resize(cache, wanted);
            CHECK(left >= wanted && left <= SLOTS);
        }
        mer_cache_get_stats(cache, &stats);
        CHECK(stats.misses >= seen);
        seen = stats.misses;
        mer_cache_count(cache, &now);
        CHECK(now.pinned_set == 1);
        CHECK(!mer_cache_all_protected(cache));
        sched_yield();
    }
    mer_cache_protect(cache, protected_one, 0);
    return NULL;
}

/* The argument: lru or next-use. */
int main(int argc, char **argv) {
    pthread_t threads[THREADS + 1];
    job jobs[THREADS + 1] = {0}, sum = {0};
    CHECK(argc == 2);
    const int policy = strcmp(argv[1], "lru") ? MER_CACHE_NEXT_USE : MER_CACHE_LRU;
    cache = mer_cache_new(LAYERS, EXPERTS, SLOTS, SLOT_BYTES, policy, 0);
    CHECK(cache);
    for (int i = 0; i <= THREADS; i++) {
        jobs[i].random = 88172645463325252u + (uint64_t)i * 7919;
        CHECK(pthread_create(&threads[i], NULL, i ? work : meddle, &jobs[i]) == 0);
    }
    for (int i = 1; i <= THREADS; i++) pthread_join(threads[i], NULL);
    atomic_store(&stop, 1);
    pthread_join(threads[0], NULL);
    for (int i = 0; i <= THREADS; i++) {
        for (int k = 0; k < 4; k++) sum.acquired[k] += jobs[i].acquired[k];
        sum.published += jobs[i].published;
        sum.failed += jobs[i].failed;
        sum.cleared += jobs[i].cleared;
    }

    mer_cache_stats stats;
    mer_cache_census now;
    mer_cache_get_stats(cache, &stats);
    mer_cache_count(cache, &now);
    CHECK(stats.hits == sum.acquired[MER_ACQ_HIT] && stats.misses == sum.acquired[MER_ACQ_MISS]);
    CHECK(stats.busy == sum.acquired[MER_ACQ_BUSY] && stats.full == sum.acquired[MER_ACQ_FULL]);
    CHECK(stats.failures == sum.failed && stats.misses == sum.published + sum.failed);
    CHECK(stats.hits + stats.misses + stats.busy + stats.full == (int64_t)THREADS * TURNS);
    CHECK(now.in_use == 0 && now.loading == 0 && now.failed == 0 && now.pinned_set == 0);
    CHECK(sum.published == stats.evictions + sum.cleared + now.resident);
    CHECK(stats.hits && stats.evictions && sum.failed);

    CHECK(mer_cache_resize(cache, SLOTS) == SLOTS);
    /* No slot was lost: all of them can be had at once, and no more. */
    CHECK(mer_cache_clear(cache) == now.resident);
    int64_t slot, all = 0;
    for (int64_t e = 0; e < SLOTS; e++) {
        CHECK(mer_cache_acquire(cache, e, &slot) == MER_ACQ_MISS);
        all |= INT64_C(1) << slot;
    }
    CHECK(all == (INT64_C(1) << SLOTS) - 1);
    CHECK(mer_cache_acquire(cache, SLOTS, &slot) == MER_ACQ_FULL);
    mer_cache_free(cache);
    printf("passed\n");
    return 0;
}
