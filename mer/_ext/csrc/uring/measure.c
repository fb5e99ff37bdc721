/* The bandwidth of the device, measured through the reader itself. */
#include <errno.h>
#include <stdlib.h>
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

int mer_io_measure(mer_io *io, int file, int64_t file_bytes, int64_t block, long depth, double seconds, double ramp,
                   char *memory, size_t room, int64_t *bytes, double *elapsed) {
    int64_t blocks = file_bytes / block, places = (int64_t)room / block;
    if (blocks < 1 || depth < 1 || places < 1) return -EINVAL;
    mer_read_op *ops = calloc((size_t)depth, sizeof *ops);
    if (!ops) return -ENOMEM;
    uint64_t random = (uint64_t)(now() * 1e9) | 1;
    for (long i = 0; i < depth; i++) {
        ops[i].file = file;
        ops[i].length = block;
        ops[i].uncached = 1;
        ops[i].offset = (int64_t)(xorshift(&random) % (uint64_t)blocks) * block;
        ops[i].dest = memory + i % places * block;
    }
    int rc = 0;
    double start = now() + ramp, end = start + seconds;
    *bytes = 0;
    mer_io_submit(io, ops, depth);
    for (long left = depth; left;) {
        uint64_t seen = mer_io_completed(io);
        int progress = 0;
        for (long i = 0; i < depth; i++) {
            if (!ops[i].length || !mer_read_done(&ops[i])) continue;
            progress = 1;
            double seen_at = now();
            if (ops[i].result < 0)
                rc = ops[i].result;
            else if (seen_at >= start)
                *bytes += block;
            if (rc == 0 && seen_at < end) {
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
    free(ops);
    return rc;
}
