/* Sigmoid and silu of 16 floats; ends of arrays are filled up with zeros. */
#ifndef MER_DECODER_GATES_H
#define MER_DECODER_GATES_H

#include "vec.h"

MER_INLINE void v16_sigmoid(v16 *x) {
    const v16i negative = *x < 0.0f;
    v16 e = (v16)((v16i)*x | INT32_MIN); /* -|x|: the sign bit set */
    v16_exp(&e);
    const v16 top = (v16)(((v16i)e & negative) | ((v16i)((v16){0} + 1.0f) & ~negative));
    *x = top / (1.0f + e);
}

MER_INLINE void v16_silu(v16 *x) {
    v16 s = *x;
    v16_sigmoid(&s);
    *x *= s;
}

/* The first n floats at p, n up to 16; p may be NULL: zeros. */
MER_INLINE void v16_load_some(v16 *x, const float *p, long n) {
    if (p && n >= 16) {
        memcpy(x, p, sizeof *x);
        return;
    }
    *x = (v16){0};
    if (p) memcpy(x, p, sizeof(float) * (size_t)n);
}

MER_INLINE void v16_store_some(float *p, const v16 *x, long n) {
    memcpy(p, x, n >= 16 ? sizeof *x : sizeof(float) * (size_t)n);
}

#endif
