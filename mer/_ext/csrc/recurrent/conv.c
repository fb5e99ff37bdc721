/* Causal convolution of channels, and the gates around it. */
#include "../mer_recurrent.h"
#include "../decoder/gates.h"

/* The inputs before token `end`, which lead into the next state; token t of the state before has a negative number. */
static void remember(const mer_conv *c, long t0, long end, long c0, long c1, const float *before, float *to) {
    const long rows = c->kernel - 1;
    for (long i = 0; i < rows; i++) {
        const long t = end - rows + i;
        float *row = to + i * c->channels + c0;
        if (t >= t0)
            memcpy(row, c->x + t * c->stride + c0, sizeof(float) * (size_t)(c1 - c0));
        else if (before)
            memcpy(row, before + (t - t0 + rows) * c->channels + c0, sizeof(float) * (size_t)(c1 - c0));
        else
            memset(row, 0, sizeof(float) * (size_t)(c1 - c0));
    }
}

MER_CLONES
void mer_convolve(const mer_conv *c, long t0, long t1, long c0, long c1, const float *before, float *after,
                  float *kept, long kept_at) {
    remember(c, t0, t1, c0, c1, before, after);
    if (kept) remember(c, t0, t0 + kept_at, c0, c1, before, kept);
    const long rows = c->kernel - 1;
    /* From the last token on, so that inputs are still there when they are wanted. */
    for (long t = t1 - 1; t >= t0; t--)
        for (long i = c0; i < c1; i += LANES) {
            vf sum, w, x;
            vf_load_some(&sum, c->bias ? c->bias + i : NULL, c1 - i);
            for (long j = 0; j <= rows; j++) {
                const long from = t - rows + j;
                const float *row = before ? before + (from - t0 + rows) * c->channels : NULL;
                if (from >= t0) row = c->x + from * c->stride;
                vf_load_some(&w, c->w + j * c->channels + i, c1 - i);
                vf_load_some(&x, row ? row + i : NULL, c1 - i);
                sum += w * x;
            }
            if (c->silu) vf_silu(&sum);
            vf_store_some(c->x + t * c->stride + i, &sum, c1 - i);
        }
}

MER_CLONES
void mer_multiply(float *x, const float *y, long n) {
    for (long i = 0; i < n; i++) x[i] *= y[i];
}

MER_CLONES
void mer_product(float *x, const float *y, const float *z, long n) {
    for (long i = 0; i < n; i++) x[i] = y[i] * z[i];
}
