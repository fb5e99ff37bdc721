/* The io_uring back end. Every function is called with io->lock held. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>

#include "internal.h"

int mer_ring_open(mer_io *io) {
    int rc = io_uring_queue_init((unsigned)io->depth, &io->ring, 0);
    if (rc < 0) return rc;
    struct io_uring_probe *probe = io_uring_get_probe_ring(&io->ring);
    int usable = probe && io_uring_opcode_supported(probe, IORING_OP_READ) &&
                 io_uring_opcode_supported(probe, IORING_OP_READ_FIXED);
    if (probe) io_uring_free_probe(probe);
    rc = usable ? io_uring_register_eventfd(&io->ring, io->event_fd) : -EOPNOTSUPP;
    if (rc < 0) {
        io_uring_queue_exit(&io->ring);
        return rc;
    }
    io_uring_cq_eventfd_toggle(&io->ring, false);
    /* Both registrations only save time: a kernel or a limit that refuses them stops nothing. */
    io->files_registered = io->n_files > 0 && io_uring_register_files(&io->ring, io->fds, (unsigned)io->n_fds) == 0;
    io->buffer_table = io_uring_register_buffers_sparse(&io->ring, MER_IO_BUFFER_SLOTS) == 0;
    return 0;
}

void mer_ring_close(mer_io *io) {
    io_uring_queue_exit(&io->ring);
    free(io->buffers);
    io->buffers = NULL;
    io->n_buffers = 0;
}

int mer_io_files_registered(const mer_io *io) { return io->files_registered; }

static int register_pieces(mer_io *io, char *base, size_t length) {
    unsigned first = io->buffer_slots_used, slot = first;
    for (size_t at = 0; at < length; at += MER_IO_BUFFER_PIECE, slot++) {
        size_t n = length - at < MER_IO_BUFFER_PIECE ? length - at : MER_IO_BUFFER_PIECE;
        struct iovec piece = {base + at, n};
        __u64 tag = 0;
        int rc = slot < MER_IO_BUFFER_SLOTS ? io_uring_register_buffers_update_tag(&io->ring, slot, &piece, &tag, 1)
                                            : -ENOSPC;
        if (rc >= 0) continue;
        struct iovec none = {NULL, 0};
        while (slot-- > first) io_uring_register_buffers_update_tag(&io->ring, slot, &none, &tag, 1);
        return rc;
    }
    io->buffer_slots_used = slot;
    return 0;
}

int mer_io_add_buffer(mer_io *io, void *address, size_t length) {
    pthread_mutex_lock(&io->lock);
    int rc = io->closing ? -ECANCELED : io->uring && io->buffer_table ? 0 : -EOPNOTSUPP;
    mer_buffer *grown = NULL;
    if (rc == 0 && !(grown = realloc(io->buffers, sizeof *grown * (io->n_buffers + 1)))) rc = -ENOMEM;
    if (rc == 0) {
        io->buffers = grown;
        grown[io->n_buffers] = (mer_buffer){address, length, io->buffer_slots_used};
        rc = register_pieces(io, address, length);
    }
    if (rc == 0) {
        io->n_buffers++;
        io->stats.registered_bytes += (int64_t)length;
    }
    pthread_mutex_unlock(&io->lock);
    return rc;
}

void mer_io_drop_buffers(mer_io *io) {
    pthread_mutex_lock(&io->lock);
    for (unsigned slot = 0; io->uring && !io->closing && slot < io->buffer_slots_used; slot++) {
        struct iovec none = {NULL, 0};
        __u64 tag = 0;
        io_uring_register_buffers_update_tag(&io->ring, slot, &none, &tag, 1);
    }
    io->n_buffers = io->buffer_slots_used = 0;
    io->stats.registered_bytes = 0;
    pthread_mutex_unlock(&io->lock);
}

/* The slot of the registered piece that holds all of [dest, dest + n), or -1. */
static int fixed_slot(const mer_io *io, const char *dest, size_t n) {
    for (unsigned i = 0; i < io->n_buffers; i++) {
        const mer_buffer *b = &io->buffers[i];
        if (dest < b->base || dest + n > b->base + b->length) continue;
        size_t first = (size_t)(dest - b->base) / MER_IO_BUFFER_PIECE;
        size_t last = (size_t)(dest + n - 1 - b->base) / MER_IO_BUFFER_PIECE;
        return first == last ? (int)(b->first + first) : -1;
    }
    return -1;
}

/* Of a read into memory that may never have been touched the kernel finds and clears the pages, of one from the page
 * cache it copies them: a thread of its own does that, not the one that submits and may have something to compute.
 * A smaller read is not worth a thread. */
#define LARGE (256 << 10)

static void prepare(mer_io *io, mer_read_op *op) {
    /* Never NULL: there are as many entries as reads in flight. */
    struct io_uring_sqe *sqe = io_uring_get_sqe(&io->ring);
    if (mer_io_prepare(io, op)) {
        /* an injected fault comes back the way a real one does */
        if (op->late[0] || op->late[1])
            io_uring_prep_timeout(sqe, (struct __kernel_timespec *)op->late, 0, 0);
        else
            io_uring_prep_nop(sqe);
    } else {
        op->injected = 1;
        int fd = io->files_registered ? op->fd : io->fds[op->fd];
        char *dest = (char *)op->dest + op->progress;
        __u64 at = (__u64)(op->offset + op->progress);
        int slot = fixed_slot(io, dest, (size_t)op->asked);
        if (slot >= 0) {
            io_uring_prep_read_fixed(sqe, fd, dest, (unsigned)op->asked, at, slot);
            io->stats.fixed_ops++;
        } else {
            io_uring_prep_read(sqe, fd, dest, (unsigned)op->asked, at);
        }
        unsigned flags = io->files_registered ? IOSQE_FIXED_FILE : 0;
        if ((slot < 0 || op->fd != op->file) && op->asked >= LARGE && !op->retries) flags |= IOSQE_ASYNC;
        io_uring_sqe_set_flags(sqe, flags);
    }
    io_uring_sqe_set_data(sqe, op);
}

/* The ring is of no more use: what the kernel did not take fails, and so does all that comes. */
static void abandon(mer_io *io, int rc) {
    io->ring_error = rc;
    struct io_uring_sq *sq = &io->ring.sq;
    for (unsigned at = *sq->khead; at != sq->sqe_tail; at++) {
        io->in_flight--;
        mer_io_finish(io, (mer_read_op *)(uintptr_t)sq->sqes[at & sq->ring_mask].user_data, rc);
    }
    for (mer_read_op *op; (op = mer_io_take(io));) mer_io_finish(io, op, rc);
}

static unsigned unsubmitted(const mer_io *io) { return io->ring_error ? 0 : io_uring_sq_ready(&io->ring); }

void mer_ring_pump(mer_io *io) {
    if (io->ring_error) {
        for (mer_read_op *op; (op = mer_io_take(io));) mer_io_finish(io, op, io->ring_error);
        return;
    }
    while (io->in_flight < io->depth) {
        mer_read_op *op = mer_io_take(io);
        if (!op) break;
        io->in_flight++;
        prepare(io, op);
    }
    while (unsubmitted(io)) {
        int rc = io_uring_submit(&io->ring);
        if (rc >= 0 || rc == -EINTR) continue;
        /* Short of memory, or of room for completions: what is in flight must end first. */
        if (rc != -EAGAIN && rc != -EBUSY) abandon(io, rc);
        break;
    }
}

int mer_ring_reap(mer_io *io) {
    struct io_uring_cqe *cqe;
    int n = 0, again = 0;
    while (io_uring_peek_cqe(&io->ring, &cqe) == 0) {
        mer_read_op *op = io_uring_cqe_get_data(cqe);
        int64_t res = op->injected <= 0 ? op->injected : cqe->res;
        io_uring_cqe_seen(&io->ring, cqe);
        n++;
        if (!mer_io_advance(io, op, res)) {
            io->in_flight--;
        } else if (io->ring_error) {
            io->in_flight--;
            mer_io_finish(io, op, io->ring_error);
        } else {
            prepare(io, op);
            again++;
        }
    }
    if (again || (n && (io->pending[0].head || io->pending[1].head))) mer_ring_pump(io);
    return n;
}

void mer_ring_block(mer_io *io) {
    if (mer_ring_reap(io)) return;
    mer_ring_pump(io);
    int in_kernel = io->in_flight - (int)unsubmitted(io);
    /* Nobody else touches the completion queue meanwhile, so a completion can't be taken from
     * under this thread and leave it asleep. */
    io->reaping = 1;
    pthread_mutex_unlock(&io->lock);
    if (in_kernel > 0) {
        io_uring_enter((unsigned)io->ring.ring_fd, 0, 1, IORING_ENTER_GETEVENTS, NULL);
    } else {
        struct timespec pause = {0, 1000000}; /* the kernel had no memory for a submission */
        nanosleep(&pause, NULL);
    }
    pthread_mutex_lock(&io->lock);
    io->reaping = 0;
    mer_ring_reap(io);
    pthread_cond_broadcast(&io->changed); /* another waiter may reap next */
}
