/* Measured bandwidth: of the device through the reader itself, and of memory. */
#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "internal.h"

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static uint64_t xorshift(uint64_t *state) {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    return *state ^= *state << 17;
}

int mer_io_measure(mer_io *io, int file, int64_t file_bytes, int64_t block, long depth, double seconds,
                   int64_t *bytes, double *elapsed) {
    int64_t blocks = file_bytes / block;
    if (blocks < 1 || depth < 1) return -EINVAL;
    size_t room = (size_t)(block * depth);
    char *memory = mmap(NULL, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    mer_read_op *ops = calloc((size_t)depth, sizeof *ops);
    if (memory == MAP_FAILED || !ops) {
        if (memory != MAP_FAILED) munmap(memory, room);
        free(ops);
        return -ENOMEM;
    }
    uint64_t random = (uint64_t)(now() * 1e9) | 1;
    for (long i = 0; i < depth; i++) {
        ops[i].file = file;
        ops[i].length = block;
        ops[i].offset = (int64_t)(xorshift(&random) % (uint64_t)blocks) * block;
        ops[i].dest = memory + i * block;
    }
    int rc = 0;
    double start = now(), end = start + seconds;
    *bytes = 0;
    mer_io_submit(io, ops, depth);
    for (long left = depth; left;) {
        uint64_t seen = mer_io_completed(io);
        int progress = 0;
        for (long i = 0; i < depth; i++) {
            if (!ops[i].length || !mer_read_done(&ops[i])) continue;
            progress = 1;
            if (ops[i].result < 0)
                rc = ops[i].result;
            else
                *bytes += block;
            if (rc == 0 && now() < end) {
                ops[i].offset = (int64_t)(xorshift(&random) % (uint64_t)blocks) * block;
                mer_io_submit(io, &ops[i], 1);
            } else {
                ops[i].length = 0;
                left--;
            }
        }
        if (left && !progress) mer_io_wait_past(io, seen);
    }
    *elapsed = now() - start;
    munmap(memory, room);
    free(ops);
    return rc;
}

typedef struct {
    const uint64_t *words;
    size_t n;
    double seconds, rate;
    uint64_t sum; /* keeps the reads from being optimised away */
    const int *go;
} stream;

static void *read_stream(void *arg) {
    stream *s = arg;
    uint64_t a = 0, b = 0, c = 0, d = 0;
    while (!__atomic_load_n(s->go, __ATOMIC_ACQUIRE)) sched_yield();
    double start = now(), spent;
    size_t passes = 0;
    do {
        for (size_t i = 0; i + 32 <= s->n; i += 32)
            for (size_t k = 0; k < 32; k += 4) {
                a += s->words[i + k];
                b += s->words[i + k + 1];
                c += s->words[i + k + 2];
                d += s->words[i + k + 3];
            }
        __asm__ volatile("" : "+r"(a), "+r"(b), "+r"(c), "+r"(d) : : "memory");
        passes++;
        spent = now() - start;
    } while (spent < s->seconds);
    s->sum = a + b + c + d;
    s->rate = (double)(passes * s->n * sizeof *s->words) / spent;
    return NULL;
}

double mer_memory_bandwidth(int threads, size_t bytes, double seconds) {
    size_t each = bytes / 256 * 256;
    if (threads < 1 || each == 0) return -EINVAL;
    pthread_t *ids = calloc((size_t)threads, sizeof *ids);
    stream *streams = calloc((size_t)threads, sizeof *streams);
    int go = 0;
    char *memory = mmap(NULL, each * (size_t)threads, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    double rate = -ENOMEM;
    if (ids && streams && memory != MAP_FAILED) {
        madvise(memory, each * (size_t)threads, MADV_HUGEPAGE);
        memset(memory, 1, each * (size_t)threads);
        int made = 0;
        for (; made < threads; made++) {
            streams[made] = (stream){(const uint64_t *)(memory + each * (size_t)made), each / 8, seconds, 0, 0, &go};
            if (pthread_create(&ids[made], NULL, read_stream, &streams[made])) break; /* measure with fewer */
        }
        __atomic_store_n(&go, 1, __ATOMIC_RELEASE);
        rate = 0;
        for (int i = 0; i < made; i++) {
            pthread_join(ids[i], NULL);
            rate += streams[i].rate;
        }
    }
    if (memory != MAP_FAILED) munmap(memory, each * (size_t)threads);
    free(ids);
    free(streams);
    return rate;
}
