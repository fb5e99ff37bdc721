/* A thread that touches the arena's memory before it is needed. The first touch of a page is when the kernel finds and
 * clears it; in the midst of a step, reads wait for that. */
#ifndef MER_PREFAULT_H
#define MER_PREFAULT_H

#include <stddef.h>

typedef struct prefault prefault;

/* Touches [base, base + bytes), never more than `ahead` bytes beyond what is in use, and `near` while it is held: what is
 * read next will be touched anyway, and nobody waits for that if it was touched before. base: a multiple of 2 MiB. NULL
 * where there is no thread or memory for it. */
prefault *prefault_start(char *base, size_t bytes, size_t ahead, size_t near);
/* The first `bytes` are in use from now on. By one thread at a time. */
void prefault_reach(prefault *p, size_t bytes);
/* Whether processors are wanted for something else. */
void prefault_hold(prefault *p, int on);
void prefault_stop(prefault *p); /* waits for the thread; NULL is allowed */

#endif
