/* Products of bytes where one instruction adds four of them to each sum of 32 bits: dot4(sum, w, x), and add_products(sum,
 * w, four) with the same four bytes in every lane. `most` (see lanes.h) is of no meaning here. */
#ifndef MER_DOTS_H
#define MER_DOTS_H

/* Adds to n_tok sums the products of 4 n columns from q[t] + at on. An addition takes five cycles, so that few tokens
 * need two chains each. */
INLINE void dots(const int n_tok, const vec *w, const int8_t *const *q, const int at, const int n, const int most,
                 vec *sum) {
    (void)most;
    const int chains = n_tok > 4 ? 1 : 2;
    vec other[TOKENS];
    UNROLL for (int t = 0; t < n_tok; t++) other[t] = zeros();
    UNROLL for (int k = 0; k < n; k++)
        UNROLL for (int t = 0; t < n_tok; t++) {
            vec *const to = k % chains ? other : sum;
            to[t] = add_products(to[t], w[k], q[t] + at + 4 * k);
        }
    if (chains == 2) {
        UNROLL for (int t = 0; t < n_tok; t++) sum[t] = V(add_epi32)(sum[t], other[t]);
    }
}

/* Products of 32 columns of rows beside each other, as load_beside() has them: sums of neighbours. */
typedef struct {
    vec of[4];
} sums;

/* Adds the products of 16 columns. */
INLINE void multiply(sums *s, const vec w[4], const int8_t *q, const int most) {
    (void)most;
    for (int p = 0; p < 4; p++) s->of[p] = dot4(s->of[p], w[p], table16(q));
}

#endif
