/* Rows of floats in the 16 bits in which they go to other machines and come back. */
#ifndef MER_NARROW_H
#define MER_NARROW_H

#include <stdint.h>

/* n numbers as F16 or BF16 (fmt): to the nearest, ties to even; beyond the largest one, 65504 of F16, infinity. */
void mer_narrow(int fmt, const float *x, long n, uint16_t *to);

/* The same numbers as floats. */
void mer_widen_rows(int fmt, const uint16_t *h, long n, float *to);

/* to = x as it is after both; `to` may be x. Rounding twice is rounding once. */
void mer_round(int fmt, const float *x, long n, float *to);

#endif
