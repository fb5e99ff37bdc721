/* What layers with a recurrent state do to one token, or to some tokens of one sequence; recurrent.pyx spreads it over
 * the pool.
 *
 * A state is a function of the sequence's tokens alone: they are taken one by one in their order, and channels and
 * columns of a state know nothing of each other. So neither the cut of a prompt into steps nor threads can show.
 * `before` is the state before the first token (NULL: a sequence begins, all zeros), `after` that behind the last one;
 * they are never the same memory. `kept`, where it is not NULL, gets the state behind the first `kept_at` tokens. */
#ifndef MER_RECURRENT_H
#define MER_RECURRENT_H

#include <stddef.h>

/* Columns of a state that one task takes through all tokens; a head's state is padded to a multiple of them. */
#define MER_DELTA_COLUMNS 32

/* A causal convolution of each channel by itself, in place: x[t][c] becomes bias[c] + the sum over j of
 * w[j][c] * x[t - kernel + 1 + j][c], through silu if asked for. Channels [c0, c1) of x [n, stride].
 * w: [kernel, channels]; a state: [kernel - 1, channels], the inputs before. bias: [channels] or NULL. */
typedef struct {
    float *x;
    const float *w;
    const float *bias;
    long stride, channels, kernel;
    int silu;
} mer_conv;

void mer_convolve(const mer_conv *c, long t0, long t1, long c0, long c1, const float *before, float *after,
                  float *kept, long kept_at);

/* x *= y */
void mer_multiply(float *x, const float *y, long n);

/* x = y * z */
void mer_product(float *x, const float *y, const float *z, long n);

/* y = x / rms(x) * w * silu(gate); y may be x. */
void mer_gated_rms_norm(const float *x, const float *w, const float *gate, float *y, long n, float eps);

/* The gated delta rule (Yang et al., arXiv 2412.06464), of each value head with a state S [key_dim, value_dim]:
 *   S = decay * S;  S += k (beta * (v - S^T k))^T;  out = S^T q
 * In memory S is [value_dim / COLUMNS, key_dim, COLUMNS]. */
typedef struct {
    float *mixed;      /* [tokens, stride] q and k of all key heads, then v of all value heads */
    float *out;        /* [tokens, value_heads * value_dim] */
    float *decay;      /* [tokens, value_heads] in: a projection; then exp(rate * softplus(a + bias)) */
    float *beta;       /* [tokens, value_heads] in: a projection; then its sigmoid */
    const float *rate; /* [value_heads], negative */
    const float *bias; /* [value_heads] */
    long stride, key_heads, value_heads, key_dim, value_dim;
    int tiled; /* value head h reads key head h % key_heads; else h / (value_heads / key_heads) */
} mer_delta;

/* Floats of one head's state. */
size_t mer_delta_state(long key_dim, long value_dim);

/* Token t: q and k get length 1 (q is then divided by the root of key_dim), decay and beta their values. */
void mer_delta_prepare(const mer_delta *d, long t);

/* Tokens [t0, t1) of one sequence, columns [column, column + COLUMNS) of one value head, whose states these are. */
void mer_delta_rule(const mer_delta *d, long t0, long t1, long head, long column, const float *before, float *after,
                    float *kept, long kept_at);

#endif
