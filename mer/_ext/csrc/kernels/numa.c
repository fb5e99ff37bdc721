/* Placement on machines of several memory nodes; without libnuma, by the two calls that it takes. */
#define _GNU_SOURCE
#include "../mer_pool.h"

#include <errno.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

int mer_interleave(void *p, size_t n, uint64_t nodes) {
    enum { MPOL_INTERLEAVE = 3, MPOL_MF_MOVE = 2 };
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    const uintptr_t from = ((uintptr_t)p + page - 1) / page * page, to = ((uintptr_t)p + n) / page * page;
    if (from >= to) return 0;
    /* the kernel takes one bit less than it is told */
    return syscall(SYS_mbind, from, to - from, MPOL_INTERLEAVE, &nodes, 65UL, MPOL_MF_MOVE) ? errno : 0;
}
