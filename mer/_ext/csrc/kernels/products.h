/* The formats of blocks, and the functions that multiply with them. */
#ifndef MER_PRODUCTS_H
#define MER_PRODUCTS_H

#include "../mer_kernels.h"

/* BLOCK(name, columns of a block) */
#define MER_BLOCK_FORMATS(BLOCK) \
    BLOCK(q4_0, MER_Q4_0)        \
    BLOCK(q4_1, MER_Q4_1)        \
    BLOCK(q5_0, MER_Q5_0)        \
    BLOCK(q5_1, MER_Q5_1)        \
    BLOCK(q8_0, MER_Q8_0)        \
    BLOCK(q2_k, MER_Q2_K)        \
    BLOCK(q3_k, MER_Q3_K)        \
    BLOCK(q4_k, MER_Q4_K)        \
    BLOCK(q5_k, MER_Q5_K)        \
    BLOCK(q6_k, MER_Q6_K)        \
    BLOCK(iq4_nl, MER_IQ4_NL)    \
    BLOCK(iq4_xs, MER_IQ4_XS)    \
    BLOCK(mxfp4, MER_MXFP4)

/* Of each a function of mer_kernels.h's type for each instruction set, and where it stands in a table of them. */
#define MER_DECLARE_PRODUCTS(NAME, ID)                                                                            \
    void mer_scalar_##NAME(const void *w, long cols, long r0, long r1, const void *const *acts, long n_tok,       \
                           float *y, long y_stride);                                                              \
    void mer_avx2_##NAME(const void *w, long cols, long r0, long r1, const void *const *acts, long n_tok,         \
                         float *y, long y_stride);                                                                \
    void mer_avxvnni_##NAME(const void *w, long cols, long r0, long r1, const void *const *acts, long n_tok,      \
                            float *y, long y_stride);                                                             \
    void mer_avx512_##NAME(const void *w, long cols, long r0, long r1, const void *const *acts, long n_tok,       \
                           float *y, long y_stride);
MER_BLOCK_FORMATS(MER_DECLARE_PRODUCTS)

#define MER_AVX2_ENTRY(NAME, ID) [ID] = mer_avx2_##NAME,
#define MER_AVXVNNI_ENTRY(NAME, ID) [ID] = mer_avxvnni_##NAME,
#define MER_AVX512_ENTRY(NAME, ID) [ID] = mer_avx512_##NAME,

/* Loops that have to be unrolled: their counter becomes a constant, their arrays registers. */
#define UNROLL _Pragma("GCC unroll 8")

#endif
