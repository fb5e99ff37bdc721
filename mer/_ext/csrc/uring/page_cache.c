/* Whether the page cache holds a part of a file. */
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "internal.h"

/* Since Linux 6.5; in no header of older systems. */
#ifdef __alpha__
#define CACHESTAT 561
#else
#define CACHESTAT 451
#endif

int mer_io_in_page_cache(int fd, int64_t offset, int64_t length) {
    struct {
        uint64_t off, len;
    } range = {(uint64_t)offset, (uint64_t)length};
    struct {
        uint64_t nr_cache, nr_dirty, nr_writeback, nr_evicted, nr_recently_evicted;
    } found;
    int64_t page = sysconf(_SC_PAGESIZE), pages = (offset + length + page - 1) / page - offset / page;
    /* It fails on older kernels, and for files that are another's and not to be written to. */
    return syscall(CACHESTAT, fd, &range, &found, 0) == 0 && (int64_t)found.nr_cache >= pages;
}
