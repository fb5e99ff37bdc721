/* Queueing, completion and waiting: what both back ends have in common. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "internal.h"

const int64_t mer_io_latency_bounds[MER_IO_LATENCIES] = {
    25000,    50000,    100000,    250000,    500000,    1000000,   2500000,    5000000,
    10000000, 25000000, 50000000, 100000000, 250000000, 500000000, 1000000000, INT64_MAX};

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

int mer_io_open(mer_io **out, const int *fds, int n, int uring, int direct, int depth, int threads) {
    mer_io *io = calloc(1, sizeof *io);
    if (!io) return -ENOMEM;
    io->event_fd = -1;
    io->n_fds = direct ? 2 * n : n;
    io->fds = malloc(sizeof(int) * (size_t)(n > 0 ? io->n_fds : 1));
    int rc = io->fds ? 0 : -ENOMEM;
    if (rc == 0 && (io->event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) < 0) rc = -errno;
    if (rc == 0) {
        memcpy(io->fds, fds, sizeof(int) * (size_t)io->n_fds);
        io->n_files = n;
        io->depth = io->most = depth;
        io->direct = direct;
        io->uring = uring;
        pthread_mutex_init(&io->lock, NULL);
        pthread_cond_init(&io->changed, NULL);
        pthread_cond_init(&io->work, NULL);
        rc = uring ? mer_ring_open(io) : mer_threads_open(io, threads);
    }
    if (rc < 0) {
        if (io->event_fd >= 0) close(io->event_fd);
        free(io->fds);
        free(io);
        return rc;
    }
    *out = io;
    return 0;
}

mer_read_op *mer_io_take(mer_io *io) {
    for (int p = 0; p < MER_IO_PRIORITIES; p++) {
        mer_queue *q = &io->pending[p];
        mer_read_op *op = q->head;
        if (!op) continue;
        q->head = op->next;
        if (!q->head) q->tail = NULL;
        return op;
    }
    return NULL;
}

int mer_io_prepare(mer_io *io, mer_read_op *op) {
    if (!op->started) op->started = now_ns();
    op->injected = 0;
    op->fd = op->file;
    op->limit = INT64_MAX;
    op->asked = op->length - op->progress;
    if (op->asked > MER_IO_MAX_REQUEST) op->asked = MER_IO_MAX_REQUEST;
    for (int i = 0; i < io->n_faults; i++) {
        mer_fault *f = &io->faults[i];
        int64_t at = op->offset + op->progress;
        if (f->times <= 0 || f->file != op->file || at >= f->hi || at + op->asked <= f->lo) continue;
        f->times--;
        if (f->error) {
            op->injected = -f->error;
            op->late[0] = f->late_ns / 1000000000;
            op->late[1] = f->late_ns % 1000000000;
            return 1;
        }
        if (op->limit > f->limit) op->limit = f->limit;
    }
    int64_t at = op->offset + op->progress, left = op->needed - op->progress;
    if (io->direct && !op->uncached && mer_io_in_page_cache(io->fds[io->n_files + op->file], at, left)) {
        op->fd = io->n_files + op->file;
        io->stats.cached_ops++;
    }
    return 0;
}

static void time_read(mer_io *io, const mer_read_op *op) {
    int64_t took = now_ns() - op->started;
    int i = 0;
    while (took > mer_io_latency_bounds[i]) i++;
    io->latency.counts[i]++;
    io->latency.total_ns += took;
}

void mer_io_finish(mer_io *io, mer_read_op *op, int result) {
    if (result == 0) time_read(io, op);
    io->stats.ops++;
    io->stats.prefetch_ops += op->priority == MER_IO_PREFETCH;
    io->stats.errors += result < 0 && result != -ECANCELED;
    op->result = result;
    /* From here on the op is its owner's, who may free it. */
    __atomic_store_n(&op->done, 1, __ATOMIC_RELEASE);
    __atomic_store_n(&io->completed, io->completed + 1, __ATOMIC_RELEASE);
    pthread_cond_broadcast(&io->changed);
    if (io->listeners) {
        uint64_t one = 1;
        /* It can only fail when the counter is full, and then the listener is woken anyhow. */
        ssize_t written = write(io->event_fd, &one, sizeof one);
        (void)written;
    }
}

int mer_io_advance(mer_io *io, mer_read_op *op, int64_t res) {
    /* ECANCELED: the kernel found no thread for a read that was to have one. Nobody else cancels a request. */
    if (res == -EINTR || res == -EAGAIN || res == -ECANCELED) {
        io->stats.retries++;
        if (++op->retries <= MER_IO_MAX_RETRIES) return 1;
    }
    if (res < 0) {
        mer_io_finish(io, op, (int)res);
        return 0;
    }
    if (res > op->limit) res = op->limit;
    int64_t before = op->progress;
    op->progress += res;
    op->retries = 0;
    io->stats.bytes += res;
    if (op->progress >= op->needed) {
        mer_io_finish(io, op, 0);
        return 0;
    }
    /* O_DIRECT can go on at a block boundary only. A read that does not even reach the next one
     * met the end of the file. */
    int64_t resume = io->direct ? op->progress & ~(int64_t)(MER_IO_ALIGN - 1) : op->progress;
    if (resume <= before) {
        mer_io_finish(io, op, MER_IO_TRUNCATED);
        return 0;
    }
    op->progress = resume;
    io->stats.short_reads++;
    return 1;
}

static int acceptable(const mer_io *io, const mer_read_op *op) {
    if (op->file < 0 || op->file >= io->n_files || op->offset < 0 || op->length <= 0) return 0;
    if (op->needed > op->length || !op->dest) return 0;
    uint64_t bits = (uint64_t)op->offset | (uint64_t)op->length | (uint64_t)(uintptr_t)op->dest;
    return !io->direct || bits % MER_IO_ALIGN == 0;
}

/* Whoever gives requests to the device looks at what is pending; the lock is held. */
static void start_pending(mer_io *io) {
    if (io->closing)
        ;
    else if (io->uring)
        mer_ring_pump(io);
    else
        pthread_cond_broadcast(&io->work);
}

void mer_io_submit(mer_io *io, mer_read_op *ops, long n) {
    pthread_mutex_lock(&io->lock);
    io->submitted += (uint64_t)n;
    io->stats.batches++;
    for (long i = 0; i < n; i++) {
        mer_read_op *op = &ops[i];
        op->next = NULL;
        op->done = op->retries = 0;
        op->progress = op->started = 0;
        if (op->needed <= 0) op->needed = op->length;
        if (op->priority != MER_IO_PREFETCH) op->priority = MER_IO_DEMAND;
        if (io->closing || !acceptable(io, op)) {
            mer_io_finish(io, op, io->closing ? -ECANCELED : -EINVAL);
            continue;
        }
        mer_queue *q = &io->pending[op->priority];
        if (q->tail)
            q->tail->next = op;
        else
            q->head = op;
        q->tail = op;
    }
    start_pending(io);
    pthread_mutex_unlock(&io->lock);
}

void mer_io_set_depth(mer_io *io, int depth) {
    pthread_mutex_lock(&io->lock);
    io->depth = depth < io->most ? depth : io->most;
    start_pending(io);
    pthread_mutex_unlock(&io->lock);
}

int mer_io_cached(const mer_io *io, int file, int64_t offset, int64_t length) {
    return mer_io_in_page_cache(io->fds[io->direct ? io->n_files + file : file], offset, length);
}

/* Sleeps until something changed. At most one thread sleeps in the kernel for the ring; the others sleep here
 * and one of them takes its place when it leaves. */
static void block(mer_io *io) {
    if (io->uring && !io->reaping)
        mer_ring_block(io);
    else
        pthread_cond_wait(&io->changed, &io->lock);
}

static void leave(mer_io *io) {
    if (--io->waiters == 0 && io->closing) pthread_cond_broadcast(&io->changed);
    pthread_mutex_unlock(&io->lock);
}

long mer_io_wait(mer_io *io, long min_done) {
    pthread_mutex_lock(&io->lock);
    io->waiters++;
    uint64_t target = io->observed + (uint64_t)(min_done > 0 ? min_done : 0);
    if (io->uring && !io->reaping && !io->closed) mer_ring_reap(io);
    while (io->completed < target && io->completed < io->submitted) block(io);
    long got = (long)(io->completed - io->observed);
    io->observed = io->completed;
    leave(io);
    return got;
}

void mer_io_poll(mer_io *io) {
    pthread_mutex_lock(&io->lock);
    if (io->uring && !io->reaping && !io->closed) mer_ring_reap(io);
    pthread_mutex_unlock(&io->lock);
}

uint64_t mer_io_completed(const mer_io *io) { return __atomic_load_n(&io->completed, __ATOMIC_ACQUIRE); }

void mer_io_wait_past(mer_io *io, uint64_t seen) {
    pthread_mutex_lock(&io->lock);
    io->waiters++;
    while (io->completed <= seen && io->completed < io->submitted) block(io);
    leave(io);
}

int mer_io_eventfd(const mer_io *io) { return io->event_fd; }

void mer_io_listen(mer_io *io, int on) {
    pthread_mutex_lock(&io->lock);
    io->listeners = on;
    /* The kernel writes to the eventfd only while somebody listens. */
    if (io->uring && !io->closed) io_uring_cq_eventfd_toggle(&io->ring, on != 0);
    pthread_mutex_unlock(&io->lock);
}

int mer_io_set_fault(mer_io *io, int file, int64_t lo, int64_t hi, int error, int64_t limit, int64_t late_ns, long times) {
    pthread_mutex_lock(&io->lock);
    int slot = 0;
    while (slot < io->n_faults && io->faults[slot].times > 0) slot++;
    int rc = slot < MER_IO_MAX_FAULTS ? 0 : -ENOSPC;
    if (rc == 0) {
        io->faults[slot] = (mer_fault){file, error, lo, hi, limit, late_ns, times};
        if (slot == io->n_faults) io->n_faults++;
    }
    pthread_mutex_unlock(&io->lock);
    return rc;
}

void mer_io_clear_faults(mer_io *io) {
    pthread_mutex_lock(&io->lock);
    io->n_faults = 0;
    pthread_mutex_unlock(&io->lock);
}

void mer_io_get_stats(mer_io *io, mer_io_stats *out) {
    pthread_mutex_lock(&io->lock);
    *out = io->stats;
    pthread_mutex_unlock(&io->lock);
}

void mer_io_get_latency(mer_io *io, mer_io_latency *out) {
    pthread_mutex_lock(&io->lock);
    *out = io->latency;
    pthread_mutex_unlock(&io->lock);
}

void mer_io_close(mer_io *io) {
    pthread_mutex_lock(&io->lock);
    if (io->closing) {
        /* Another thread closes it: return when it has. */
        while (!io->closed) pthread_cond_wait(&io->changed, &io->lock);
        pthread_mutex_unlock(&io->lock);
        return;
    }
    io->closing = 1;
    for (mer_read_op *op; (op = mer_io_take(io));) mer_io_finish(io, op, -ECANCELED);
    /* The kernel may still write to memory that the callers own: wait for it. */
    while (io->completed < io->submitted) block(io);
    while (io->waiters > 0) pthread_cond_wait(&io->changed, &io->lock);
    if (io->uring)
        mer_ring_close(io);
    else
        mer_threads_close(io);
    for (int i = 0; i < io->n_fds; i++) close(io->fds[i]);
    io->closed = 1;
    pthread_cond_broadcast(&io->changed);
    pthread_mutex_unlock(&io->lock);
}

void mer_io_free(mer_io *io) {
    pthread_mutex_destroy(&io->lock);
    pthread_cond_destroy(&io->changed);
    pthread_cond_destroy(&io->work);
    close(io->event_fd);
    free(io->fds);
    free(io);
}
