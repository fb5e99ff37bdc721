/* The back end of threads that block in preadv(2). */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <sys/uio.h>
#include <time.h>

#include "internal.h"

static void serve(mer_io *io, mer_read_op *op) {
    int64_t res;
    do {
        if (mer_io_prepare(io, op)) {
            struct timespec late = {op->late[0], op->late[1]};
            pthread_mutex_unlock(&io->lock);
            nanosleep(&late, NULL);
            pthread_mutex_lock(&io->lock);
            res = op->injected;
            continue;
        }
        struct iovec piece = {(char *)op->dest + op->progress, (size_t)op->asked};
        int fd = io->fds[op->fd];
        off_t at = op->offset + op->progress;
        pthread_mutex_unlock(&io->lock);
        res = preadv(fd, &piece, 1, at);
        if (res < 0) res = -errno;
        pthread_mutex_lock(&io->lock);
    } while (mer_io_advance(io, op, res));
}

static void *worker(void *arg) {
    mer_io *io = arg;
    pthread_mutex_lock(&io->lock);
    while (!io->stop) {
        mer_read_op *op = io->in_flight < io->depth ? mer_io_take(io) : NULL;
        if (op) {
            io->in_flight++;
            serve(io, op);
            io->in_flight--;
        } else {
            pthread_cond_wait(&io->work, &io->lock);
        }
    }
    pthread_mutex_unlock(&io->lock);
    return NULL;
}

void mer_threads_close(mer_io *io) {
    io->stop = 1;
    pthread_cond_broadcast(&io->work);
    pthread_mutex_unlock(&io->lock);
    for (int i = 0; i < io->n_threads; i++) pthread_join(io->threads[i], NULL);
    pthread_mutex_lock(&io->lock);
    free(io->threads);
    io->threads = NULL;
    io->n_threads = 0;
}

int mer_threads_open(mer_io *io, int n) {
    io->threads = calloc((size_t)n, sizeof *io->threads);
    if (!io->threads) return -ENOMEM;
    for (; io->n_threads < n; io->n_threads++) {
        int rc = pthread_create(&io->threads[io->n_threads], NULL, worker, io);
        if (rc == 0) continue;
        if (io->n_threads > 0) break; /* fewer threads do as well */
        free(io->threads);
        return -rc;
    }
    return 0;
}
