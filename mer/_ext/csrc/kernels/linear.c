/* A whole matrix on the pool: activations prepared token by token, then rows in chunks. */
#include "../mer_kernels.h"

/* A chunk is large enough to hide the cost of claiming it and small enough to share out evenly. */
#define CHUNK_BYTES (64 * 1024)
/* Kernels take rows in groups; a chunk of whole groups wastes no lanes. */
#define ROW_GROUP 16
/* Kernels go through the rows once for so many tokens; for more of them a chunk should still be in the cache. */
#define TOKENS_AT_ONCE 32

struct job {
    const mer_isa *isa;
    const void *w;
    const float *x;
    float *y;
    char *acts;
    const void **rows_of_acts;
    size_t act_bytes;
    long rows, cols, n_tok, chunk;
    int fmt;
};

size_t mer_linear_scratch_bytes(int fmt, long cols, long n_tok) {
    return (size_t)n_tok * (mer_act_bytes(fmt, cols) + sizeof(void *)) + 64;
}

static void prepare_task(void *arg, long t, int thread) {
    (void)thread;
    const struct job *j = arg;
    mer_prepare(j->isa, j->fmt, j->x + t * j->cols, j->acts + (size_t)t * j->act_bytes, j->cols);
}

static void rows_of_tasks(void *arg, long first, long end, int thread) {
    (void)thread;
    const struct job *j = arg;
    const long r0 = first * j->chunk;
    const long r1 = end * j->chunk < j->rows ? end * j->chunk : j->rows;
    const long step = j->n_tok > TOKENS_AT_ONCE ? j->chunk : r1 - r0;
    for (long r = r0; r < r1; r += step)
        j->isa->matmul[j->fmt](j->w, j->cols, r, r + step < r1 ? r + step : r1, j->rows_of_acts, j->n_tok, j->y, j->rows);
}

void mer_linear(const mer_isa *isa, mer_pool *pool, int fmt, const void *w, long rows, long cols,
                const float *x, long n_tok, float *y, void *scratch) {
    if (rows <= 0 || n_tok <= 0) return;
    struct job j = {
        .isa = isa, .w = w, .x = x, .y = y, .rows = rows, .cols = cols, .n_tok = n_tok, .fmt = fmt,
    };
    j.act_bytes = mer_act_bytes(fmt, cols);
    j.acts = (char *)mer_pad64((size_t)scratch);
    j.rows_of_acts = (const void **)(j.acts + (size_t)n_tok * j.act_bytes);
    for (long t = 0; t < n_tok; t++) j.rows_of_acts[t] = j.acts + (size_t)t * j.act_bytes;
    mer_pool_run(pool, prepare_task, &j, n_tok);

    const size_t row_bytes = mer_row_bytes(fmt, cols);
    const long groups = CHUNK_BYTES / ((long)row_bytes * ROW_GROUP);
    j.chunk = (groups > 0 ? groups : 1) * ROW_GROUP;
    mer_pool_run_ranges(pool, rows_of_tasks, &j, (rows + j.chunk - 1) / j.chunk);
}
