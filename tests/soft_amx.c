/* amx.c with tiles in plain C (soft_tiles.h), for test_kernels_amx.py to call. */
#define MER_TILES "soft_tiles.h"
#include "kernels/amx.c"

size_t soft_act_bytes(int fmt, long cols) { return mer_act_bytes(fmt, cols); }

void soft_prepare(int fmt, const float *x, void *act, long cols) { mer_prepare(&mer_isa_amx, fmt, x, act, cols); }

void soft_matmul(int fmt, const void *w, long cols, long r0, long r1, const void *const *acts, long n_tok, float *y,
                 long y_stride) {
    mer_isa_amx.matmul[fmt](w, cols, r0, r1, acts, n_tok, y, y_stride);
}
