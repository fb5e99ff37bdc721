/* How fast this machine reads memory: the ceiling of every kernel that streams weights. */
#include "../mer_kernels.h"

#include <errno.h>
#include <sys/mman.h>
#include <time.h>

#define PIECE ((size_t)1 << 20)

struct sweep {
    const uint64_t *words;
    uint64_t *sums;
};

static void sweep_task(void *arg, long task, int thread) {
    (void)thread;
    const struct sweep *s = arg;
    const uint64_t *w = s->words + (size_t)task * (PIECE / 8);
    uint64_t acc[8] = {0};
    for (size_t i = 0; i < PIECE / 8; i += 8)
        for (int j = 0; j < 8; j++) acc[j] += w[i + (size_t)j];
    s->sums[task] = acc[0] + acc[1] + acc[2] + acc[3] + acc[4] + acc[5] + acc[6] + acc[7];
}

double mer_memory_bandwidth(mer_pool *pool, long n_pieces, int sweeps) {
    const size_t bytes = (size_t)n_pieces * PIECE, total = bytes + (size_t)n_pieces * 8;
    char *room = mmap(NULL, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (room == MAP_FAILED) return -errno;
    madvise(room, total, MADV_HUGEPAGE); /* with small pages it would be their table that is measured */
    memset(room, 1, total); /* pages of its own, not one shared page of zeros */
    struct sweep s = {(const uint64_t *)room, (uint64_t *)(room + bytes)};
    double best = 0;
    for (int i = 0; i < sweeps; i++) {
        struct timespec from, to;
        clock_gettime(CLOCK_MONOTONIC, &from);
        mer_pool_run(pool, sweep_task, &s, n_pieces);
        clock_gettime(CLOCK_MONOTONIC, &to);
        const double seconds = (double)(to.tv_sec - from.tv_sec) + 1e-9 * (double)(to.tv_nsec - from.tv_nsec);
        if (seconds > 0 && (double)bytes / seconds > best) best = (double)bytes / seconds;
    }
    munmap(room, total);
    return best;
}
