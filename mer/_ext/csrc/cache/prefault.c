#define _GNU_SOURCE
#include "prefault.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* Linux 5.14 */
#endif

/* A huge page at a time: whoever wants a processor, or to change the mappings, waits for no more than that. */
#define PIECE ((size_t)2 << 20)
/* Not lower: a thread that gets no processor at all would keep others from the mappings that it holds. */
#define NICE 10
#define PAUSE_NS 1000000

struct prefault {
    pthread_t thread;
    pthread_mutex_t mutex;
    pthread_cond_t more; /* more is in use, or the thread must stop */
    char *base;
    size_t bytes, ahead, near;
    _Atomic size_t used;
    atomic_int hold, stop;
    pid_t owner;
};

static size_t at_most(size_t a, size_t b) { return a < b ? a : b; }

/* Where to stop for now. */
static size_t goal(const prefault *p) {
    const size_t used = atomic_load(&p->used);
    return used >= p->bytes || p->bytes - used <= p->ahead ? p->bytes : used + p->ahead;
}

static void *run(void *arg) {
    prefault *const p = arg;
    setpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid), NICE);
    for (size_t at = 0; at < p->bytes;) {
        pthread_mutex_lock(&p->mutex);
        while (!atomic_load(&p->stop) && at >= goal(p)) pthread_cond_wait(&p->more, &p->mutex);
        pthread_mutex_unlock(&p->mutex);
        if (atomic_load(&p->stop)) break;
        const size_t used = atomic_load(&p->used) / PIECE * PIECE; /* what is in use is being touched by its reads */
        if (used > at) at = used;
        if (atomic_load(&p->hold) && at >= used + p->near) {
            const struct timespec pause = {0, PAUSE_NS};
            nanosleep(&pause, NULL);
            continue;
        }
        const size_t n = at_most(PIECE, p->bytes - at);
        if (n && madvise(p->base + at, n, MADV_POPULATE_WRITE) && errno != EINTR && errno != EAGAIN) break;
        at += n;
    }
    return NULL;
}

prefault *prefault_start(char *base, size_t bytes, size_t ahead, size_t near) {
    prefault *p = calloc(1, sizeof *p);
    if (!p) return NULL;
    p->base = base;
    p->bytes = bytes;
    p->ahead = ahead;
    p->near = near;
    p->owner = getpid();
    pthread_mutex_init(&p->mutex, NULL);
    pthread_cond_init(&p->more, NULL);
    /* Signals are for the thread that the interpreter expects them on. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    const int rc = pthread_create(&p->thread, NULL, run, p);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (rc) {
        free(p);
        return NULL;
    }
    pthread_setname_np(p->thread, "mer-prefault");
    return p;
}

static void wake(prefault *p) {
    pthread_mutex_lock(&p->mutex);
    pthread_cond_signal(&p->more);
    pthread_mutex_unlock(&p->mutex);
}

void prefault_reach(prefault *p, size_t bytes) {
    if (bytes <= atomic_load_explicit(&p->used, memory_order_relaxed)) return;
    atomic_store(&p->used, bytes);
    wake(p);
}

void prefault_hold(prefault *p, int on) { atomic_store_explicit(&p->hold, on, memory_order_relaxed); }

void prefault_stop(prefault *p) {
    if (!p) return;
    if (getpid() == p->owner) { /* after a fork there is no such thread */
        atomic_store(&p->stop, 1);
        wake(p);
        pthread_join(p->thread, NULL);
    }
    pthread_mutex_destroy(&p->mutex);
    pthread_cond_destroy(&p->more);
    free(p);
}
