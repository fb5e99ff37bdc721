/* The pool: tasks are claimed from one atomic counter, idle threads sleep on a futex.
 *
 * `left` counts unclaimed tasks and `unfinished` uncompleted ones. A thread reads the job's fields only
 * after it has claimed a task, and the job can't end before that task is done, so a thread that wakes
 * late finds either no task or a task of the current job: it never sees a stale one, and nobody waits for it.
 */
#define _GNU_SOURCE
#include "../mer_pool.h"

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define LINE 64
#define CLAIMS 2 /* a claim is that fraction of a thread's even share of what is left */

struct worker {
    pthread_t thread;
    mer_pool *pool;
    int index;
};

struct mer_pool {
    _Alignas(LINE) atomic_long left;
    _Alignas(LINE) atomic_long unfinished;
    _Alignas(LINE) atomic_uint epoch;    /* futex of the workers: +1 per job */
    atomic_uint done;                    /* futex of the caller: +1 when a job ends */
    atomic_int sleepers;
    atomic_int caller_sleeps;
    atomic_int stop;
    mer_range_fn fn;
    void *arg;
    long n_tasks;
    int n_threads;
    int spin_us;
    pid_t owner;
    pthread_mutex_t turn;
    struct worker *workers;
};

static void futex_wait(atomic_uint *word, unsigned seen) {
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
}

static void futex_wake(atomic_uint *word, int n) { syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, n, NULL, NULL, 0); }

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    atomic_signal_fence(memory_order_seq_cst);
#endif
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

/* Claims and runs tasks until none is left: neighbours at once, since the tasks of a product stream through
 * neighbouring memory, and what is fetched ahead should be the same core's; fewer as the end comes near. Each claim begins
 * with what is in no cache and leaves behind what the next one's thread fetches again. */
static void work(mer_pool *p, int thread) {
    long left = atomic_load_explicit(&p->left, memory_order_acquire);
    while (left > 0) {
        const long share = left / (CLAIMS * p->n_threads), n = share > 1 ? share : 1;
        if (!atomic_compare_exchange_weak_explicit(&p->left, &left, left - n, memory_order_acq_rel,
                                                   memory_order_acquire))
            continue;
        p->fn(p->arg, p->n_tasks - left, p->n_tasks - left + n, thread);
        if (atomic_fetch_sub_explicit(&p->unfinished, n, memory_order_acq_rel) == n) {
            atomic_fetch_add(&p->done, 1);
            if (atomic_load(&p->caller_sleeps)) futex_wake(&p->done, 1);
        }
        left = atomic_load_explicit(&p->left, memory_order_acquire);
    }
}

/* Spins until there is a task, a stop, or the time is over. */
static void spin_for_work(mer_pool *p) {
    const int64_t end = now_ns() + p->spin_us * INT64_C(1000);
    do {
        for (int i = 0; i < 32; i++) {
            if (atomic_load_explicit(&p->left, memory_order_relaxed) > 0 || atomic_load(&p->stop)) return;
            relax();
        }
    } while (now_ns() < end);
}

static void *worker_main(void *arg) {
    struct worker *w = arg;
    mer_pool *p = w->pool;
    while (!atomic_load(&p->stop)) {
        spin_for_work(p);
        const unsigned seen = atomic_load(&p->epoch);
        atomic_fetch_add(&p->sleepers, 1);
        if (atomic_load(&p->left) <= 0 && !atomic_load(&p->stop)) futex_wait(&p->epoch, seen);
        atomic_fetch_sub(&p->sleepers, 1);
        work(p, w->index);
    }
    return NULL;
}

static void stop_and_join(mer_pool *p, int started) {
    atomic_store(&p->stop, 1);
    atomic_fetch_add(&p->epoch, 1);
    futex_wake(&p->epoch, started);
    for (int i = 0; i < started; i++) pthread_join(p->workers[i].thread, NULL);
}

mer_pool *mer_pool_new(int n_threads, int spin_us) {
    mer_pool *p = aligned_alloc(LINE, (sizeof(mer_pool) + LINE - 1) / LINE * LINE);
    if (!p) return NULL;
    *p = (mer_pool){.n_threads = n_threads, .spin_us = spin_us, .owner = getpid()};
    p->workers = calloc((size_t)n_threads, sizeof *p->workers);
    if (!p->workers) {
        free(p);
        return NULL;
    }
    pthread_mutex_init(&p->turn, NULL);
    /* Signals are for the thread that the interpreter expects them on. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int started = 0, err = 0;
    for (; started < n_threads - 1; started++) {
        struct worker *w = &p->workers[started];
        w->pool = p;
        w->index = started + 1;
        err = pthread_create(&w->thread, NULL, worker_main, w);
        if (err) break;
        char name[16];
        snprintf(name, sizeof name, "mer-compute-%u", (unsigned)w->index % 1000);
        pthread_setname_np(w->thread, name);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (err) {
        stop_and_join(p, started);
        pthread_mutex_destroy(&p->turn);
        free(p->workers);
        free(p);
        errno = err;
        return NULL;
    }
    return p;
}

void mer_pool_run_ranges(mer_pool *p, mer_range_fn fn, void *arg, long n_tasks) {
    if (n_tasks <= 0) return;
    pthread_mutex_lock(&p->turn);
    if (p->n_threads == 1 || n_tasks == 1) {
        fn(arg, 0, n_tasks, 0);
        pthread_mutex_unlock(&p->turn);
        return;
    }
    p->fn = fn;
    p->arg = arg;
    p->n_tasks = n_tasks;
    const unsigned seen = atomic_load(&p->done);
    atomic_store_explicit(&p->unfinished, n_tasks, memory_order_relaxed);
    atomic_store(&p->left, n_tasks);
    atomic_fetch_add(&p->epoch, 1);
    /* A worker adds itself to `sleepers` before it looks at `left` for the last time: either it sees
     * this job, or it is seen here. */
    if (atomic_load(&p->sleepers) > 0) {
        const long others = p->n_threads - 1;
        futex_wake(&p->epoch, (int)(n_tasks - 1 < others ? n_tasks - 1 : others));
    }
    work(p, 0);
    const int64_t end = now_ns() + p->spin_us * INT64_C(1000);
    while (atomic_load(&p->done) == seen && now_ns() < end)
        for (int i = 0; i < 32 && atomic_load(&p->done) == seen; i++) relax();
    if (atomic_load(&p->done) == seen) {
        atomic_store(&p->caller_sleeps, 1);
        while (atomic_load(&p->done) == seen) futex_wait(&p->done, seen);
        atomic_store(&p->caller_sleeps, 0);
    }
    pthread_mutex_unlock(&p->turn);
}

struct single {
    mer_task_fn fn;
    void *arg;
};

static void each_task(void *arg, long first, long end, int thread) {
    const struct single *s = arg;
    for (long i = first; i < end; i++) s->fn(s->arg, i, thread);
}

void mer_pool_run(mer_pool *p, mer_task_fn fn, void *arg, long n_tasks) {
    struct single s = {fn, arg};
    mer_pool_run_ranges(p, each_task, &s, n_tasks);
}

int mer_pool_pin(mer_pool *p, int thread, const int *cpus, int n_cpus) {
    cpu_set_t set;
    CPU_ZERO(&set);
    for (int i = 0; i < n_cpus; i++)
        if (cpus[i] < CPU_SETSIZE) CPU_SET(cpus[i], &set);
    return pthread_setaffinity_np(p->workers[thread - 1].thread, sizeof set, &set);
}

int mer_pool_size(const mer_pool *p) { return p->n_threads; }

void mer_pool_free(mer_pool *p) {
    if (!p) return;
    /* The threads live in the process that made them; after a fork there is nothing to join. */
    if (getpid() == p->owner) stop_and_join(p, p->n_threads - 1);
    pthread_mutex_destroy(&p->turn);
    free(p->workers);
    free(p);
}
