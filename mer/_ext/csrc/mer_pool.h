/* A persistent pool of threads for computation. */
#ifndef MER_POOL_H
#define MER_POOL_H

typedef struct mer_pool mer_pool;

/* One task of a job; thread is in [0, n_threads), the caller of mer_pool_run being thread 0. */
typedef void (*mer_task_fn)(void *arg, long task, int thread);

/* n_threads counts the caller, so n_threads - 1 are started. After spin_us microseconds without work
 * a thread sleeps. NULL (and errno) when memory or threads can't be had. */
mer_pool *mer_pool_new(int n_threads, int spin_us);

/* Runs fn for every task in [0, n_tasks), handed out in ascending order; returns when all are done.
 * One job at a time: other callers wait their turn. A task must not call it on the same pool. */
void mer_pool_run(mer_pool *pool, mer_task_fn fn, void *arg, long n_tasks);

int mer_pool_size(const mer_pool *pool);

/* Stops and joins the threads. No run may be in progress or follow. NULL is allowed. */
void mer_pool_free(mer_pool *pool);

#endif
