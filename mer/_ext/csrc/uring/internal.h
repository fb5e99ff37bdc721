/* What the files of this folder share: the queues, the counters, and the two back ends. */
#ifndef MER_IO_INTERNAL_H
#define MER_IO_INTERNAL_H

#include <liburing.h>
#include <pthread.h>

#include "mer_io.h"

#define MER_IO_MAX_FAULTS 16
#define MER_IO_MAX_RETRIES 64
/* One request of the kernel; longer reads go on where it ends. */
#define MER_IO_MAX_REQUEST ((int64_t)1 << 30)
/* io_uring takes fixed buffers of at most 1 GiB. */
#define MER_IO_BUFFER_PIECE ((size_t)1 << 30)
#define MER_IO_BUFFER_SLOTS 1024

typedef struct {
    int file, error;
    int64_t lo, hi, limit, late_ns;
    long times;
} mer_fault;

typedef struct {
    char *base;
    size_t length;
    unsigned first; /* slot of its first piece in the ring's table */
} mer_buffer;

typedef struct {
    mer_read_op *head, *tail;
} mer_queue;

struct mer_io {
    pthread_mutex_t lock; /* guards everything below but `completed` for reading */
    pthread_cond_t changed; /* reads completed, or the reaper left */
    pthread_cond_t work;    /* something is queued, or the threads must stop */
    mer_queue pending[MER_IO_PRIORITIES];
    uint64_t submitted, completed;
    uint64_t observed; /* completions that mer_io_wait() has told of */
    int depth, in_flight, waiters; /* depth: at most so many are in flight */
    int most; /* what depth may become: the ring's entries */
    int direct, closing, closed;
    int *fds;           /* [n_files], and with O_DIRECT as many again without it */
    int n_files, n_fds;
    int event_fd, listeners;
    int n_faults;
    mer_fault faults[MER_IO_MAX_FAULTS];
    mer_io_stats stats;
    mer_io_latency latency;

    int uring; /* this back end, else the threads */
    struct io_uring ring;
    int reaping;    /* a thread sleeps in the kernel until a completion comes */
    int ring_error; /* the ring refused a submission for good */
    int files_registered, buffer_table;
    mer_buffer *buffers;
    unsigned n_buffers, buffer_slots_used;

    pthread_t *threads;
    int n_threads, stop;
};

/* page_cache.c */
int mer_io_in_page_cache(int fd, int64_t offset, int64_t length); /* 1 where all of it is, as far as can be known */

/* core.c; the lock is held in all of these */
mer_read_op *mer_io_take(mer_io *io);                  /* the next pending op, demand first; or NULL */
int mer_io_prepare(mer_io *io, mer_read_op *op);       /* sets op->asked, fd, injected; 1 if there is a fault */
int mer_io_advance(mer_io *io, mer_read_op *op, int64_t res); /* 1: issue it again, 0: it is finished and not ours */
void mer_io_finish(mer_io *io, mer_read_op *op, int result);

/* ring.c; the lock is held, mer_ring_block drops it while it sleeps */
int mer_ring_open(mer_io *io);
void mer_ring_close(mer_io *io);
void mer_ring_pump(mer_io *io);
int mer_ring_reap(mer_io *io);
void mer_ring_block(mer_io *io);

/* threads.c */
int mer_threads_open(mer_io *io, int n);
void mer_threads_close(mer_io *io);

#endif
