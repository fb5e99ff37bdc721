/* Drives the C core of the reader the way moe does, from several threads, for the sanitizers to watch.
 * usage: reader_stress FILE; the file holds its own offsets as little-endian 64-bit words. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "mer_io.h"

#define CHECK(condition)                                                        \
    do {                                                                        \
        if (!(condition)) {                                                     \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);     \
            exit(1);                                                            \
        }                                                                       \
    } while (0)

enum { BLOCK = 4096, OPS = 64, ROUNDS = 30, THREADS = 4 };

static const char *path;
static int64_t file_bytes;

static mer_io *open_io(int uring, int direct, int depth, int threads) {
    int fds[2] = {open(path, O_RDONLY | (direct ? O_DIRECT : 0)), open(path, O_RDONLY)};
    mer_io *io = NULL;
    if (fds[0] < 0 || mer_io_open(&io, fds, 1, uring, direct, depth, threads) < 0) {
        if (fds[0] >= 0) close(fds[0]);
        close(fds[1]);
    } else if (!direct) {
        close(fds[1]);
    }
    return io;
}

static int holds(const char *memory, int64_t offset, int64_t length) {
    for (int64_t at = (8 - offset % 8) % 8; at + 8 <= length; at += 8) {
        int64_t word;
        memcpy(&word, memory + at, 8);
        if (word != offset + at) return 0;
    }
    return 1;
}

typedef struct {
    mer_io *io;
    unsigned seed;
} job;

/* Batches of ops with both priorities; waits the way several threads must. */
static void *batches(void *arg) {
    job *j = arg;
    mer_read_op *ops = calloc(OPS, sizeof *ops);
    char *memory = aligned_alloc(BLOCK, OPS * 4 * BLOCK);
    for (int round = 0; round < ROUNDS; round++) {
        for (int i = 0; i < OPS; i++) {
            memset(&ops[i], 0, sizeof ops[i]);
            ops[i].length = BLOCK * (1 + rand_r(&j->seed) % 4);
            ops[i].offset = rand_r(&j->seed) % ((file_bytes - 4 * BLOCK) / BLOCK) * BLOCK;
            ops[i].priority = rand_r(&j->seed) % 2;
            ops[i].dest = memory + i * 4 * BLOCK;
        }
        mer_io_submit(j->io, ops, OPS);
        for (int left = OPS; left;) {
            uint64_t seen = mer_io_completed(j->io);
            left = 0;
            for (int i = 0; i < OPS; i++) left += !mer_read_done(&ops[i]);
            if (left) mer_io_wait_past(j->io, seen);
        }
        for (int i = 0; i < OPS; i++) {
            if (ops[i].result == -EIO) continue; /* injected */
            CHECK(ops[i].result == 0);
            CHECK(holds(ops[i].dest, ops[i].offset, ops[i].length));
        }
    }
    free(memory);
    free(ops);
    return NULL;
}

static void *ranges(void *arg) {
    job *j = arg;
    char *memory = malloc(3000000);
    for (int round = 0; round < ROUNDS; round++) {
        mer_range r[3];
        int64_t at = rand_r(&j->seed) % 100;
        for (int i = 0; i < 3; i++) {
            int64_t length = 1 + rand_r(&j->seed) % 900000;
            r[i] = (mer_range){0, rand_r(&j->seed) % (file_bytes - length), length, memory + at};
            at += length;
        }
        long failed = -1;
        int rc = mer_io_read_ranges(j->io, r, 3, MER_IO_DEMAND, &failed);
        if (rc == -EIO) {
            CHECK(failed >= 0 && failed < 3);
            continue;
        }
        if (rc) fprintf(stderr, "ranges: %s\n", strerror(-rc));
        CHECK(rc == 0);
        for (int i = 0; i < 3; i++) CHECK(holds(r[i].dest, r[i].offset, r[i].length));
    }
    free(memory);
    return NULL;
}

static void many_threads(mer_io *io) {
    pthread_t ids[2 * THREADS];
    job jobs[2 * THREADS];
    mer_io_listen(io, 1);
    CHECK(mer_io_set_fault(io, 0, 100000, 300000, EIO, 0, 0, 20) == 0);
    CHECK(mer_io_set_fault(io, 0, 0, file_bytes, 0, BLOCK + 17, 0, 50) == 0);
    CHECK(mer_io_set_fault(io, 0, 0, file_bytes, EAGAIN, 0, 100000, 50) == 0);
    for (int i = 0; i < 2 * THREADS; i++) {
        jobs[i] = (job){io, (unsigned)i + 1};
        CHECK(pthread_create(&ids[i], NULL, i % 2 ? ranges : batches, &jobs[i]) == 0);
    }
    for (int i = 0; i < 200; i++) mer_io_set_depth(io, 1 + i % 64);
    for (int i = 0; i < 2 * THREADS; i++) pthread_join(ids[i], NULL);
    mer_io_listen(io, 0);
    mer_io_clear_faults(io);
}

/* With one request at a time, everything that is queued as demand comes before any prefetch. */
static void demand_first(int uring, int direct) {
    mer_io *io = open_io(uring, direct, 8, 8);
    mer_io_set_depth(io, 1);
    char *memory = aligned_alloc(BLOCK, 20 * BLOCK);
    mer_read_op ops[20] = {0};
    for (int i = 0; i < 20; i++) {
        ops[i].length = BLOCK;
        ops[i].offset = (int64_t)i * BLOCK;
        ops[i].dest = memory + i * BLOCK;
        ops[i].priority = i % 2 ? MER_IO_DEMAND : MER_IO_PREFETCH;
    }
    mer_io_submit(io, ops, 20);
    while (mer_io_wait(io, 1)) {
        int demand = 0, prefetch = 0;
        for (int i = 0; i < 20; i += 2) prefetch += mer_read_done(&ops[i]);
        for (int i = 1; i < 20; i += 2) demand += mer_read_done(&ops[i]); /* looked at last: reads go on */
        CHECK(prefetch == 0 || demand == 10);
    }
    for (int i = 0; i < 20; i++) CHECK(ops[i].result == 0 && holds(ops[i].dest, ops[i].offset, BLOCK));
    mer_io_close(io);
    mer_io_free(io);
    free(memory);
}

/* Closing waits for the reads in flight: the memory is freed at once afterwards. */
static void close_in_flight(int uring, int direct) {
    for (int round = 0; round < 20; round++) {
        mer_io *io = open_io(uring, direct, 16, 4);
        char *memory = aligned_alloc(BLOCK, OPS * 32 * BLOCK);
        mer_read_op *ops = calloc(OPS, sizeof *ops);
        for (int i = 0; i < OPS; i++) {
            ops[i].length = 32 * BLOCK;
            ops[i].offset = (int64_t)i * BLOCK;
            ops[i].dest = memory + i * 32 * BLOCK;
        }
        mer_io_submit(io, ops, OPS);
        mer_io_wait(io, round % 3);
        mer_io_close(io);
        for (int i = 0; i < OPS; i++) {
            CHECK(mer_read_done(&ops[i]));
            CHECK(ops[i].result == 0 || ops[i].result == -ECANCELED);
        }
        mer_io_submit(io, ops, OPS); /* refused, and nobody is left waiting */
        CHECK(mer_io_wait(io, 1) >= 0 && ops[0].result == -ECANCELED);
        free(memory);
        free(ops);
        mer_io_free(io);
    }
}

static void what_is_refused(mer_io *io) {
    char *memory = aligned_alloc(BLOCK, 4 * BLOCK);
    mer_read_op ops[4] = {0};
    for (int i = 0; i < 4; i++) {
        ops[i].length = BLOCK;
        ops[i].dest = memory + i * BLOCK;
    }
    ops[1].file = 1;
    ops[2].needed = BLOCK + 1;
    ops[3].offset = (file_bytes + BLOCK) / BLOCK * BLOCK;
    mer_io_submit(io, ops, 4);
    for (int left = 1; left;) {
        uint64_t seen = mer_io_completed(io);
        left = 0;
        for (int i = 0; i < 4; i++) left += !mer_read_done(&ops[i]);
        if (left) mer_io_wait_past(io, seen);
    }
    CHECK(ops[0].result == 0);
    CHECK(ops[1].result == -EINVAL && ops[2].result == -EINVAL);
    CHECK(ops[3].result == MER_IO_TRUNCATED);
    free(memory);
}

int main(int argc, char **argv) {
    CHECK(argc == 2);
    path = argv[1];
    struct stat st;
    CHECK(stat(path, &st) == 0);
    file_bytes = st.st_size;
    static const int kinds[3][2] = {{1, 1}, {0, 1}, {0, 0}};
    for (int k = 0; k < 3; k++) {
        int uring = kinds[k][0], direct = kinds[k][1];
        mer_io *io = open_io(uring, direct, 8, 3);
        if (!io) {
            printf("skipped: uring %d, direct %d\n", uring, direct);
            continue;
        }
        what_is_refused(io);
        many_threads(io);
        mer_io_close(io);
        mer_io_free(io);
        demand_first(uring, direct);
        close_in_flight(uring, direct);
        printf("passed: uring %d, direct %d\n", uring, direct);
    }
    return 0;
}
