/* What the file system of a file says about O_DIRECT. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>

#include "mer_io.h"

int mer_dio_alignment(const char *path, uint32_t *memory, uint32_t *offset) {
#ifdef STATX_DIOALIGN
    struct statx s;
    if (statx(AT_FDCWD, path, 0, STATX_DIOALIGN, &s) < 0) return -errno;
    if (!(s.stx_mask & STATX_DIOALIGN)) return -EOPNOTSUPP;
    *memory = s.stx_dio_mem_align;
    *offset = s.stx_dio_offset_align;
    return 0;
#else
    (void)path, (void)memory, (void)offset;
    return -EOPNOTSUPP;
#endif
}
