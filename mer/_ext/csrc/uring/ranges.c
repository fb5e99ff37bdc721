/* Reads of extents at any offset, to any address: straight into place where O_DIRECT allows it,
 * otherwise through bounce buffers. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "internal.h"

#define ALIGN ((int64_t)MER_IO_ALIGN)
/* Sixteen of these saturate a device, and are all the memory that this may take. */
#define PIECE ((int64_t)1 << 20)
#define LANES 16

/* One piece under way. */
typedef struct {
    mer_read_op op;
    int busy;
    long range;
    char *dest; /* where `wanted` bytes go from bounce + skip; NULL when read straight into place */
    int64_t skip, wanted;
} lane;

typedef struct {
    mer_io *io;
    const mer_range *ranges;
    long n, range;
    int64_t at; /* bytes of the current range that are on their way already */
    int priority;
    char *bounce;
    lane lanes[LANES];
} job;

static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

/* Makes lane `i` the next piece of the job. 1, 0 when nothing is left, or -errno. */
static int next_piece(job *j, int i) {
    while (j->range < j->n && j->at >= j->ranges[j->range].length) {
        j->range++;
        j->at = 0;
    }
    if (j->range == j->n) return 0;
    const mer_range *r = &j->ranges[j->range];
    lane *l = &j->lanes[i];
    int64_t offset = r->offset + j->at, left = r->length - j->at;
    int64_t align = j->io->direct ? ALIGN : 1;
    char *dest = r->dest + j->at;
    memset(l, 0, sizeof *l);
    l->range = j->range;
    l->op.file = r->file;
    l->op.priority = j->priority;
    if (offset % align == 0 && (uintptr_t)dest % (uint64_t)align == 0 && left >= align) {
        l->op.offset = offset;
        l->op.length = l->wanted = min64(left, PIECE) / align * align;
        l->op.dest = dest;
    } else {
        if (!j->bounce) {
            j->bounce = mmap(NULL, LANES * PIECE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (j->bounce == MAP_FAILED) {
                j->bounce = NULL;
                return -ENOMEM;
            }
        }
        l->op.offset = offset / align * align;
        l->skip = offset - l->op.offset;
        /* Where only the head is unaligned, bounce no more than its block. */
        int congruent = (uint64_t)l->skip == (uintptr_t)dest % (uint64_t)align;
        int64_t room = (congruent && l->skip ? align : PIECE) - l->skip;
        l->wanted = min64(left, room);
        l->op.needed = l->skip + l->wanted;
        l->op.length = (l->op.needed + align - 1) / align * align;
        l->op.dest = j->bounce + i * PIECE;
        l->dest = dest;
    }
    j->at += l->wanted;
    l->busy = 1;
    return 1;
}

int mer_io_read_ranges(mer_io *io, const mer_range *ranges, long n, int priority, long *failed) {
    job *j = calloc(1, sizeof *j);
    if (!j) return -ENOMEM;
    j->io = io;
    j->ranges = ranges;
    j->n = n;
    j->priority = priority;
    int rc = 0, busy = 0, more = 1;
    while (busy || (more && rc == 0)) {
        uint64_t seen = mer_io_completed(io);
        int progress = 0;
        for (int i = 0; i < LANES; i++) {
            lane *l = &j->lanes[i];
            if (l->busy && mer_read_done(&l->op)) {
                l->busy = 0;
                busy--;
                progress = 1;
                if (l->op.result == 0 && l->dest)
                    memcpy(l->dest, (char *)l->op.dest + l->skip, (size_t)l->wanted);
                if (l->op.result < 0 && rc == 0) {
                    rc = l->op.result;
                    *failed = l->range;
                }
            }
            if (l->busy || !more || rc < 0) continue;
            more = next_piece(j, i);
            if (more < 0) {
                rc = more;
                *failed = j->range;
            }
            if (more <= 0) continue;
            busy++;
            progress = 1;
            mer_io_submit(io, &l->op, 1);
        }
        if (busy && !progress) mer_io_wait_past(io, seen);
    }
    if (j->bounce) munmap(j->bounce, LANES * PIECE);
    free(j);
    return rc;
}
