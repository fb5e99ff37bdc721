/* Which instruction sets can run here. */
#include "../mer_kernels.h"

int mer_isas(const mer_isa **out, int room) {
    int n = 0;
    if (n < room) out[n++] = &mer_isa_scalar;
    return n;
}
