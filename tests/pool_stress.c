/* The pool under stress: each task runs once and in a job of its own, whatever the sizes and the pauses. */
#include "mer_pool.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

struct job {
    int *seen; /* plain memory: a race on it is a race of the pool */
    int *by_thread;
    int mark;
};

static void task(void *arg, long i, int thread) {
    const struct job *j = arg;
    j->seen[i] += j->mark;
    j->by_thread[thread * 32]++;
    if (i % 7 == 0)
        for (volatile int k = 0; k < 50; k++)
            ;
}

static void range(void *arg, long first, long end, int thread) {
    for (long i = first; i < end; i++) task(arg, i, thread);
}

static int stress(mer_pool *pool, unsigned seed, int rounds) {
    enum { MOST = 100 };
    int seen[MOST], by_thread[32 * 8];
    for (int round = 0; round < rounds; round++) {
        seed = seed * 1664525u + 1013904223u;
        const long n = (long)(seed >> 16) % (MOST + 1);
        for (int i = 0; i < MOST; i++) seen[i] = 0;
        for (int i = 0; i < 32 * 8; i++) by_thread[i] = 0;
        struct job j = {seen, by_thread, round + 1};
        if (round % 2)
            mer_pool_run(pool, task, &j, n);
        else
            mer_pool_run_ranges(pool, range, &j, n);
        int total = 0;
        for (int i = 0; i < mer_pool_size(pool); i++) total += by_thread[i * 32];
        for (int i = 0; i < MOST; i++)
            if (seen[i] != (i < n ? round + 1 : 0)) {
                fprintf(stderr, "round %d: task %d of %ld was marked %d\n", round, i, n, seen[i]);
                return 1;
            }
        if (total != n) {
            fprintf(stderr, "round %d: %d tasks counted, not %ld\n", round, total, n);
            return 1;
        }
        if (seed % 16 == 0) usleep(seed % 200); /* sometimes long enough for the threads to fall asleep */
    }
    return 0;
}

static void *caller(void *pool) { return stress(pool, 77, 100) ? pool : NULL; }

int main(void) {
    for (int threads = 1; threads <= 5; threads++)
        for (int spin = 0; spin <= 40; spin += 20) {
            mer_pool *pool = mer_pool_new(threads, spin);
            if (!pool || stress(pool, (unsigned)threads, 300)) return 1;
            pthread_t others[2];
            for (int i = 0; i < 2; i++) pthread_create(&others[i], NULL, caller, pool);
            for (int i = 0; i < 2; i++) {
                void *failed;
                pthread_join(others[i], &failed);
                if (failed) return 1;
            }
            mer_pool_free(pool);
        }
    for (int i = 0; i < 50; i++) mer_pool_free(mer_pool_new(4, 30)); /* the end comes at any moment */
    puts("passed");
    return 0;
}
