/* A persistent pool of threads for computation. */
#ifndef MER_POOL_H
#define MER_POOL_H

#include <stddef.h>
#include <stdint.h>

typedef struct mer_pool mer_pool;

/* One task of a job; thread is in [0, n_threads), the caller of mer_pool_run being thread 0. */
typedef void (*mer_task_fn)(void *arg, long task, int thread);

/* Neighbouring tasks of a job, [first, end). */
typedef void (*mer_range_fn)(void *arg, long first, long end, int thread);

/* n_threads counts the caller, so n_threads - 1 are started. After spin_us microseconds without work
 * a thread sleeps. NULL (and errno) when memory or threads can't be had. */
mer_pool *mer_pool_new(int n_threads, int spin_us);

/* Runs fn for every task in [0, n_tasks), handed out in ascending order; returns when all are done.
 * One job at a time: other callers wait their turn. A task must not call it on the same pool. */
void mer_pool_run(mer_pool *pool, mer_task_fn fn, void *arg, long n_tasks);

/* The same, for tasks that are better done several at once, as neighbouring rows of a matrix are: each thread's
 * claims grow smaller towards the end, and add up to [0, n_tasks). */
void mer_pool_run_ranges(mer_pool *pool, mer_range_fn fn, void *arg, long n_tasks);

int mer_pool_size(const mer_pool *pool);

/* Keeps thread 1 <= thread < n_threads on these CPUs; 0 or an errno. Thread 0 is the caller's own. */
int mer_pool_pin(mer_pool *pool, int thread, const int *cpus, int n_cpus);

/* Spreads the pages of n bytes at p, as far as they are whole ones, over the memory nodes whose bits are set; 0 or an
 * errno. Pages that are there already move. */
int mer_interleave(void *p, size_t n, uint64_t nodes);

/* Stops and joins the threads. No run may be in progress or follow. NULL is allowed. */
void mer_pool_free(mer_pool *pool);

#endif
