/* Sigmoid and silu of LANES floats; ends of arrays are filled up with zeros. */
#ifndef MER_DECODER_GATES_H
#define MER_DECODER_GATES_H

#include "vec.h"

MER_INLINE void vf_sigmoid(vf *x) {
    const vi negative = *x < 0.0f;
    vf e = (vf)((vi)*x | INT32_MIN); /* -|x|: the sign bit set */
    vf_exp(&e);
    *x = VF_CHOOSE(negative, e, VF_ALL(1.0f)) / (1.0f + e);
}

MER_INLINE void vf_silu(vf *x) {
    vf s = *x;
    vf_sigmoid(&s);
    *x *= s;
}

/* The first n floats at p, up to LANES; p may be NULL: zeros. */
MER_INLINE void vf_load_some(vf *x, const float *p, long n) {
    if (p && n >= LANES) {
        memcpy(x, p, sizeof *x);
        return;
    }
    *x = (vf){0};
    if (p && n > 0) memcpy(x, p, sizeof(float) * (size_t)n);
}

MER_INLINE void vf_store_some(float *p, const vf *x, long n) {
    memcpy(p, x, n >= LANES ? sizeof *x : sizeof(float) * (size_t)n);
}

#endif
