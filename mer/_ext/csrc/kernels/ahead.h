/* Prefetching of weights. A group of rows is read as several short streams at once, which the hardware's
 * prefetchers follow badly; but the rows of consecutive groups are one run of memory, so each step through a
 * group fetches its share of that run, a fixed distance ahead. */
#ifndef MER_AHEAD_H
#define MER_AHEAD_H

#include <stddef.h>

#define AHEAD_INLINE static inline __attribute__((always_inline))
#define AHEAD_LEAST ((size_t)8 << 10)  /* covers the latency of memory at full bandwidth */
#define AHEAD_NEAR ((size_t)16 << 10)  /* what the first level of cache has room for, beside what is in use */
#define AHEAD_START ((size_t)32 << 10) /* what a call fetches before its first step, at the most */

typedef struct {
    size_t distance;
    int far; /* beyond AHEAD_NEAR: into the second level of cache */
} mer_ahead;

/* Fetches the lines of n bytes at p; a prefetch never faults, so it may run past the end. The branches hide p from each
 * other, or compilers work out every address before them. */
AHEAD_INLINE void ahead_lines(const char *p, size_t n, int far) {
    if (far) {
        __asm__("" : "+r"(p));
        for (size_t i = 0; i < n; i += 64) __builtin_prefetch(p + i, 0, 2);
    } else {
        __asm__("" : "+r"(p));
        for (size_t i = 0; i < n; i += 64) __builtin_prefetch(p + i, 0, 3);
    }
}

/* For a run of groups at p: a distance of at least one group, since each of its rows is read from the
 * first step on. */
AHEAD_INLINE mer_ahead ahead_begin(const char *p, size_t group_bytes) {
    mer_ahead a;
    a.distance = group_bytes > AHEAD_LEAST ? group_bytes : AHEAD_LEAST;
    a.far = a.distance > AHEAD_NEAR;
    ahead_lines(p, a.distance < AHEAD_START ? a.distance : AHEAD_START, a.far);
    return a;
}

/* One step of a group: the n bytes that lie as far into the run as this step. */
AHEAD_INLINE void ahead_step(mer_ahead a, const char *p, size_t n) { ahead_lines(p + a.distance, n, a.far); }

#endif
