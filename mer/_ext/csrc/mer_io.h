/* Reads of file extents into memory: io_uring, or threads where io_uring is not to be had.
 *
 * One mer_io serves any number of threads. submit() queues operations and returns; wait()
 * sets `result` and then `done` of those that completed. No function here needs the GIL.
 */
#ifndef MER_IO_H
#define MER_IO_H

#include <stddef.h>
#include <stdint.h>

enum { MER_IO_DEMAND = 0, MER_IO_PREFETCH = 1, MER_IO_PRIORITIES = 2 };

/* O_DIRECT needs offset, length and dest to be multiples of this. */
#define MER_IO_ALIGN 4096

/* The result of a read that met the end of the file too early. */
#define MER_IO_TRUNCATED (-61) /* -ENODATA */

/* Zero the whole struct before filling it in; leave it alone from submit() until `done`. */
typedef struct mer_read_op {
    int file;       /* index into the paths of the reader */
    int priority;   /* MER_IO_DEMAND or MER_IO_PREFETCH */
    int uncached;   /* 1: ask the device even for what the page cache holds */
    int64_t offset; /* in the file */
    int64_t length; /* bytes to ask for: dest has room for them */
    int64_t needed; /* bytes that must arrive, 0 for all. Less than length where the aligned
                     * superset of an extent reaches past the end of its file. */
    void *dest;
    int result; /* 0, or -errno (MER_IO_TRUNCATED, -ECANCELED when the reader was closed) */
    int done;   /* read it with mer_read_done() */
    /* private */
    int64_t progress; /* bytes that arrived so far */
    int64_t asked;    /* bytes of the request under way */
    int64_t limit;    /* bytes it may deliver, by an injected fault */
    int fd;           /* index of the descriptor that it goes through */
    int injected;     /* result of an injected fault, 0 for none */
    int64_t late[2];  /* how long that takes to come, seconds and nanoseconds */
    int retries;      /* consecutive ones without progress */
    int64_t started;  /* nanoseconds of CLOCK_MONOTONIC, when the device was first asked */
    struct mer_read_op *next;
} mer_read_op;

/* True once the read is over; result and the bytes at dest may then be used, and the op reused. */
static inline int mer_read_done(const mer_read_op *op) {
    return __atomic_load_n(&op->done, __ATOMIC_ACQUIRE);
}

typedef struct mer_io mer_io;

/* An extent at any offset, to be delivered at any address. */
typedef struct mer_range {
    int file;
    int64_t offset, length;
    char *dest;
} mer_range;

typedef struct mer_io_stats {
    int64_t ops, prefetch_ops, bytes, short_reads, retries, errors, fixed_ops, batches;
    int64_t registered_bytes, cached_ops;
} mer_io_stats;

/* fds are open already, and become the reader's own if this succeeds (*out set, 0 returned); -errno otherwise.
 * uring: io_uring, else `threads` threads. direct: fds[n] are O_DIRECT, and n more follow, of the same files
 * without it: through those is read what the page cache holds. */
int mer_io_open(mer_io **out, const int *fds, int n, int uring, int direct, int depth, int threads);
/* Cancels what is queued, waits for what is in flight, frees the ring, threads and fds; the eventfd stays open
 * until mer_io_free(), because an event loop may still hold it. */
void mer_io_close(mer_io *io);
/* After mer_io_close(), when no other thread holds `io`. */
void mer_io_free(mer_io *io);

int mer_io_files_registered(const mer_io *io); /* 1, or 0 */
/* Registers memory as fixed buffers, which touches and pins it. 0 or -errno (reads work anyhow). */
int mer_io_add_buffer(mer_io *io, void *address, size_t length);
/* They are fixed no longer: their pages are let go once no read into them is in flight. */
void mer_io_drop_buffers(mer_io *io);

void mer_io_submit(mer_io *io, mer_read_op *ops, long n);
/* From now on at most `depth` reads are under way at once: 1 to what the reader was opened with. */
void mer_io_set_depth(mer_io *io, int depth);
/* Whether the page cache holds all of a part of a file, as far as can be known. */
int mer_io_cached(const mer_io *io, int file, int64_t offset, int64_t length);
/* Blocks until min_done reads completed since it last returned, or none is left; 0 polls. Returns how
 * many did. For the one thread that drives a reader; several threads use mer_io_wait_past(). */
long mer_io_wait(mer_io *io, long min_done);
/* Notices completions, and does not count as a wait. */
void mer_io_poll(mer_io *io);
/* Reads completed since the start: look at it, then at your ops, then wait past it. */
uint64_t mer_io_completed(const mer_io *io);
/* Blocks until more than `seen` reads completed or none is left. */
void mer_io_wait_past(mer_io *io, uint64_t seen);
/* Reads the ranges, whatever their alignment, with at most 16 MiB of bounce buffers. 0, or -errno and
 * *failed is the index of the range. */
int mer_io_read_ranges(mer_io *io, const mer_range *ranges, long n, int priority, long *failed);

/* An eventfd that becomes readable when reads complete, while mer_io_listen(io, 1) holds. */
int mer_io_eventfd(const mer_io *io);
void mer_io_listen(mer_io *io, int on);

/* The next `times` requests of `file` that touch [lo, hi) end with -error (error > 0), or seem to
 * deliver at most `limit` bytes (error == 0; with O_DIRECT less than a block is the end of the file). An error comes
 * `late_ns` nanoseconds after it was asked for; EINTR is tried again, which makes a slow read of it. -ENOSPC: too many faults set. */
int mer_io_set_fault(mer_io *io, int file, int64_t lo, int64_t hi, int error, int64_t limit, int64_t late_ns, long times);
void mer_io_clear_faults(mer_io *io);

void mer_io_get_stats(mer_io *io, mer_io_stats *out);

/* How long reads took, from the device being asked until somebody noticed that they were over. */
enum { MER_IO_LATENCIES = 16 };
typedef struct mer_io_latency {
    int64_t counts[MER_IO_LATENCIES]; /* counts[i]: at most mer_io_latency_bounds[i] ns, and more than the bound before */
    int64_t total_ns;
} mer_io_latency;
extern const int64_t mer_io_latency_bounds[MER_IO_LATENCIES]; /* the last is INT64_MAX */
void mer_io_get_latency(mer_io *io, mer_io_latency *out);

/* Random aligned reads of `block` bytes at `depth` for `seconds`, into `memory`, of `room` bytes, at least a block, again
 * and again; what ends in the first `ramp` seconds, beside those, is not counted. 0 or -errno. */
int mer_io_measure(mer_io *io, int file, int64_t file_bytes, int64_t block, long depth, double seconds, double ramp,
                   char *memory, size_t room, int64_t *bytes, double *elapsed);
/* What O_DIRECT asks of addresses and offsets in the file at `path` (0: it refuses), as statx says.
 * 0, or -errno; -EOPNOTSUPP where the kernel (before 6.1) or the file system does not say. */
int mer_dio_alignment(const char *path, uint32_t *memory, uint32_t *offset);

#endif
