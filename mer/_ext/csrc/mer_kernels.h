/* The compute kernels: one table of functions per instruction set.
 *
 * Order of accumulation. For the integer formats (Q4_0, Q8_0, Q4_K, MXFP4) a block's dot product is an exact
 * integer, and the blocks of a row are added in ascending order in one float per (row, token), multiply
 * and add rounded separately. So every instruction set gives the same bytes. For F32, F16 and BF16 the
 * order is one of plain C, another of AVX2 and AVX-512, and for BF16 a third of AMX. In no case does it depend on how many rows or tokens a call
 * holds, or on which of them come first: that is the batch invariance all else rests on.
 */
#ifndef MER_KERNELS_H
#define MER_KERNELS_H

#include "mer_formats.h"
#include "mer_pool.h"

/* y[t * y_stride + r] = dot(W[r], acts[t]) for r in [r0, r1), t in [0, n_tok).
 * w points to row 0 at any alignment; acts[t] come from prepare(). */
typedef void (*mer_matmul_fn)(const void *w, long cols, long r0, long r1, const void *const *acts,
                              long n_tok, float *y, long y_stride);

typedef struct mer_isa {
    const char *name;
    /* One row of activations into the int8 form. act is 4-byte aligned at least, best 64. */
    void (*quantise)(const float *x, void *act, long cols);
    /* The same for products with BF16; NULL: they take the floats as they are. */
    void (*split)(const float *x, void *act, long cols);
    /* h[i] = silu(gate[i]) * up[i]; h may be gate or up. */
    void (*swiglu)(const float *gate, const float *up, float *h, long n);
    /* h[i] = gelu(gate[i]) * up[i], gelu by tanh; h may be gate or up. */
    void (*geglu)(const float *gate, const float *up, float *h, long n);
    /* h[i] = g * sigmoid(alpha * g) * (u + added), g being gate[i], at the most `limit`, and u up[i] within +-limit. */
    void (*clamped_swiglu)(const float *gate, const float *up, float *h, long n, float alpha, float limit,
                           float added);
    /* By format id; NULL where the format is not known. */
    mer_matmul_fn matmul[MER_FORMAT_IDS];
} mer_isa;

extern const mer_isa mer_isa_scalar;
#if defined(__x86_64__)
extern const mer_isa mer_isa_avx2;
extern const mer_isa mer_isa_avxvnni;
extern const mer_isa mer_isa_avx512;
extern const mer_isa mer_isa_amx;
#endif

/* What CPUID says, which registers the operating system saves, and whether it lets this process use tiles. */
typedef struct {
    uint32_t leaf1_ecx, leaf7_ebx, leaf7_ecx, xcr0, leaf7_edx;
    int tiles_allowed;
    uint32_t leaf7_1_eax; /* of sub-leaf 1 */
} mer_cpuid;

/* The instruction sets that a CPU can run, best first; returns how many. */
int mer_isas_for(const mer_cpuid *cpu, const mer_isa **out, int room);

/* The same for this CPU. */
int mer_isas(const mer_isa **out, int room);

static inline void mer_prepare(const mer_isa *isa, int fmt, const float *x, void *act, long cols) {
    if (mer_act_is_q8(fmt))
        isa->quantise(x, act, cols);
    else if (fmt == MER_BF16 && isa->split)
        isa->split(x, act, cols);
    else
        memcpy(act, x, 4 * (size_t)cols);
}

/* Scratch that mer_linear needs. */
size_t mer_linear_scratch_bytes(int fmt, long cols, long n_tok);

/* y[t * rows + r] = dot(W[r], x[t]): a whole matrix on the pool. x is [n_tok, cols], y [n_tok, rows]. */
void mer_linear(const mer_isa *isa, mer_pool *pool, int fmt, const void *w, long rows, long cols,
                const float *x, long n_tok, float *y, void *scratch);

/* Bytes per second at which the pool reads n_pieces MiB of memory, the best of several sweeps; -errno. */
double mer_memory_bandwidth(mer_pool *pool, long n_pieces, int sweeps);

#endif
