/* Random shapes through every kernel this CPU can run, in heap buffers of the exact size and at odd
 * addresses, for the sanitizers to watch; results against plain C, and parts of products against the
 * whole byte for byte. Then the dispatcher's choice for CPUs that are not this one. With MER_TILES the AMX kernels
 * run on tiles in plain C, where the rest of them can. */
#include "mer_kernels.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#define CHECK(ok, ...)                                                 \
    do {                                                               \
        if (!(ok)) {                                                   \
            fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #ok);   \
            fprintf(stderr, __VA_ARGS__);                              \
            fputc('\n', stderr);                                       \
            exit(1);                                                   \
        }                                                              \
    } while (0)

static uint64_t state = 88172645463325252u;

static uint32_t next_random(void) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state >> 16);
}

static long between(long low, long high) { return low + (long)(next_random() % (uint32_t)(high - low + 1)); }

static float unit(void) { return (float)next_random() * 0x1p-31f - 1.0f; }

/* Formats, and where in a block their F16 scale and that of the minimum are; -1: they have none. */
static const struct {
    int id, scale, min;
} formats[] = {
    {MER_F32, -1, -1},   {MER_F16, 0, -1},   {MER_BF16, -1, -1},   {MER_Q4_0, 0, -1},
    {MER_Q4_1, 0, 2},    {MER_Q5_0, 0, -1},  {MER_Q5_1, 0, 2},     {MER_Q8_0, 0, -1},
    {MER_Q2_K, 80, 82},  {MER_Q3_K, 108, -1}, {MER_Q4_K, 0, 2},    {MER_Q5_K, 0, 2},
    {MER_Q6_K, 208, -1}, {MER_IQ4_NL, 0, -1}, {MER_IQ4_XS, 0, -1}, {MER_MXFP4, -1, -1},
};
enum { N_FORMATS = sizeof formats / sizeof *formats };

/* Sane weights: random quants, scales and floats of moderate size. */
static void fill_weights(int number, char *w, size_t bytes) {
    const int fmt = formats[number].id, scale = formats[number].scale, min = formats[number].min;
    for (size_t i = 0; i < bytes; i++) w[i] = (char)next_random();
    const size_t block = fmt == MER_F32 ? 4 : mer_row_bytes(fmt, mer_block_len(fmt));
    for (size_t i = 0; i < bytes; i += block) {
        if (fmt == MER_F32) {
            const float f = unit();
            memcpy(w + i, &f, 4);
        } else if (fmt == MER_BF16) {
            const uint16_t h = (uint16_t)(mer_f32_bits(unit()) >> 16);
            memcpy(w + i, &h, 2);
        } else if (fmt == MER_MXFP4) {
            w[i] = (char)(110 + next_random() % 20);
        } else { /* F16 elements or scales: keep the exponent below 1 */
            const size_t high = i + (size_t)scale + 1;
            w[high] = (char)(w[high] & 0xb7);
            if (min >= 0) w[i + (size_t)min + 1] = (char)(w[i + (size_t)min + 1] & 0xb7);
        }
    }
}

static float *whole_product(const mer_isa *isa, int fmt, const char *w, long rows, long cols, const float *x,
                            long n_tok) {
    const size_t bytes = mer_act_bytes(fmt, cols);
    char *acts = aligned_alloc(64, bytes * (size_t)n_tok);
    const void **ptrs = malloc(sizeof *ptrs * (size_t)n_tok);
    float *y = malloc(sizeof *y * (size_t)(rows * n_tok));
    for (long t = 0; t < n_tok; t++) {
        ptrs[t] = acts + (size_t)t * bytes;
        mer_prepare(isa, fmt, x + t * cols, acts + (size_t)t * bytes, cols);
    }
    isa->matmul[fmt](w, cols, 0, rows, ptrs, n_tok, y, rows);

    const long r0 = between(0, rows - 1), r1 = between(r0 + 1, rows), t0 = between(0, n_tok - 1);
    const long part_rows = r1 - r0, part_tok = between(1, n_tok - t0);
    float *part = malloc(sizeof *part * (size_t)(part_rows * part_tok));
    isa->matmul[fmt](w, cols, r0, r1, ptrs + t0, part_tok, part - r0, part_rows);
    for (long t = 0; t < part_tok; t++)
        CHECK(!memcmp(part + t * part_rows, y + (t0 + t) * rows + r0, sizeof *y * (size_t)part_rows),
              "%s format %d: %ld x %ld, %ld tokens, rows %ld to %ld", isa->name, fmt, rows, cols, n_tok, r0, r1);
    free(part);
    free(acts);
    free(ptrs);
    return y;
}

static void products(const mer_isa *isa, mer_pool *pool) {
    for (int round = 0; round < 5 * N_FORMATS; round++) {
        const int fmt = formats[round % N_FORMATS].id;
        const long block = mer_block_len(fmt);
        const long rows = between(1, 40), n_tok = round / N_FORMATS % 3 ? between(1, 11) : between(12, 80);
        const long cols = block == 1 ? between(1, 200) : block * between(1, 256 / block + 3);
        const size_t bytes = mer_row_bytes(fmt, cols) * (size_t)rows, shift = (size_t)between(0, 3);
        char *room = malloc(bytes + shift), *w = room + shift; /* the last row ends with the buffer */
        float *x = malloc(sizeof *x * (size_t)(cols * n_tok));
        fill_weights(round % N_FORMATS, w, bytes);
        for (long i = 0; i < cols * n_tok; i++) x[i] = unit();
        float *y = whole_product(isa, fmt, w, rows, cols, x, n_tok);
        float *want = whole_product(&mer_isa_scalar, fmt, w, rows, cols, x, n_tok);
        for (long i = 0; i < rows * n_tok; i++) {
            const float slack = mer_act_is_q8(fmt) ? 0 : 1e-6f * (float)cols * (fmt == MER_F16 ? 2.0f : 1.0f);
            CHECK(fabsf(y[i] - want[i]) <= slack, "%s format %d: %g, not %g", isa->name, fmt, (double)y[i],
                  (double)want[i]);
        }
        void *scratch = malloc(mer_linear_scratch_bytes(fmt, cols, n_tok));
        float *threaded = malloc(sizeof *threaded * (size_t)(rows * n_tok));
        mer_linear(isa, pool, fmt, w, rows, cols, x, n_tok, threaded, scratch);
        CHECK(!memcmp(y, threaded, sizeof *y * (size_t)(rows * n_tok)), "%s format %d", isa->name, fmt);
        free(threaded);
        free(scratch);
        free(want);
        free(y);
        free(x);
        free(room);
    }
}

/* NaN, infinity, zero, the largest and the smallest, where undefined conversions would show. */
static void odd_values(const mer_isa *isa) {
    static const float odd[] = {NAN, INFINITY, -INFINITY, 0.0f, -0.0f, 3.4e38f, -3.4e38f, 1e-45f, 1e-31f, 1.0f};
    for (int round = 0; round < 200; round++) {
        float x[64], h[64];
        for (int i = 0; i < 64; i++) x[i] = next_random() % 4 ? unit() * 100 : odd[next_random() % 10];
        char *act = aligned_alloc(64, mer_act_bytes(MER_Q8_0, 64)), *ref = aligned_alloc(64, mer_act_bytes(MER_Q8_0, 64));
        memset(act, 0, mer_act_bytes(MER_Q8_0, 64));
        memset(ref, 0, mer_act_bytes(MER_Q8_0, 64));
        isa->quantise(x, act, 64);
        mer_isa_scalar.quantise(x, ref, 64);
        CHECK(!memcmp(act, ref, mer_act_bytes(MER_Q8_0, 64)), "%s quantise", isa->name);
        const long n = between(1, 64);
        float *gate = malloc(sizeof *gate * (size_t)n);
        memcpy(gate, x, sizeof *gate * (size_t)n);
        isa->swiglu(gate, gate, h, n);
        for (long i = 0; i < n; i++) {
            float want;
            mer_isa_scalar.swiglu(gate + i, gate + i, &want, 1);
            CHECK(want != want ? h[i] != h[i] : mer_f32_bits(want) == mer_f32_bits(h[i]), "%s swiglu(%g)",
                  isa->name, (double)gate[i]);
        }
        isa->geglu(gate, gate, h, n);
        for (long i = 0; i < n; i++) {
            float want;
            mer_isa_scalar.geglu(gate + i, gate + i, &want, 1);
            CHECK(want != want ? h[i] != h[i] : mer_f32_bits(want) == mer_f32_bits(h[i]), "%s geglu(%g)",
                  isa->name, (double)gate[i]);
        }
        isa->clamped_swiglu(gate, gate, h, n, 1.702f, 7.0f, 1.0f);
        for (long i = 0; i < n; i++) {
            float want;
            mer_isa_scalar.clamped_swiglu(gate + i, gate + i, &want, 1, 1.702f, 7.0f, 1.0f);
            CHECK(want != want ? h[i] != h[i] : mer_f32_bits(want) == mer_f32_bits(h[i]), "%s clamped_swiglu(%g)",
                  isa->name, (double)gate[i]);
        }
        free(gate);
        free(act);
        free(ref);
    }
}

static void choices(void) {
    enum { FMA = 1u << 12, OSXSAVE = 1u << 27, AVX = 1u << 28, F16C = 1u << 29, AVX2 = 1u << 5 };
    const unsigned avx512 = AVX2 | 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31, vnni = 1u << 11;
    const unsigned leaf1 = FMA | OSXSAVE | AVX | F16C, amx = 1u << 22 | 1u << 24 | 1u << 25;
    const struct {
        mer_cpuid cpu;
        const char *best;
    } cases[] = {
        {{0}, "scalar"},
        {{leaf1, AVX2, 0, 7, 0, 0, 0}, "avx2"},
        {{leaf1, AVX2, 0, 7, 0, 0, 1u << 4}, "avxvnni"},
        {{leaf1, AVX2, 0, 7, 0, 0, ~(1u << 4)}, "avx2"},
        {{leaf1, AVX2, 0, 3, 0, 0, 1u << 4}, "scalar"},
        {{leaf1, AVX2, 0, 3, 0, 0, 0}, "scalar"}, /* the system does not keep the upper halves */
        {{leaf1 & ~(unsigned)OSXSAVE, AVX2, 0, 7, 0, 0, 0}, "scalar"},
        {{leaf1 & ~(unsigned)FMA, AVX2, 0, 7, 0, 0, 0}, "scalar"},
        {{leaf1 & ~(unsigned)F16C, AVX2, 0, 7, 0, 0, 0}, "scalar"},
        {{leaf1, 0, 0, 7, 0, 0, 0}, "scalar"},
        {{leaf1, avx512, vnni, 0xe7, 0, 0, 0}, "avx512"},
        {{leaf1, avx512, vnni, 0xe7, 0, 0, 1u << 4}, "avx512"},
        {{leaf1, avx512, 0, 0xe7, 0, 0, 0}, "avx2"}, /* the first generation, without VNNI */
        {{leaf1, avx512, vnni, 0x07, 0, 0, 0}, "avx2"},
        {{leaf1, avx512 & ~(1u << 31), vnni, 0xe7, 0, 0, 0}, "avx2"},
        {{leaf1, avx512 & ~(unsigned)AVX2, vnni, 0xe7, 0, 0, 0}, "scalar"},
        {{leaf1, avx512, vnni, 0x600e7, amx, 1, 0}, "amx"},
        {{leaf1, avx512, vnni, 0x600e7, amx, 0, 0}, "avx512"}, /* the system does not let this process have tiles */
        {{leaf1, avx512, vnni, 0x200e7, amx, 1, 0}, "avx512"}, /* or keeps their configuration and no data */
        {{leaf1, avx512, vnni, 0x000e7, amx, 1, 0}, "avx512"},
        {{leaf1, avx512, vnni, 0x600e7, amx & ~(1u << 22), 1, 0}, "avx512"},
        {{leaf1, avx512, vnni, 0x600e7, amx & ~(1u << 24), 1, 0}, "avx512"},
        {{leaf1, avx512, vnni, 0x600e7, amx & ~(1u << 25), 1, 0}, "avx512"},
        {{leaf1, avx512, 0, 0x600e7, amx, 1, 0}, "avx2"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const mer_isa *found[8];
        const int n = mer_isas_for(&cases[i].cpu, found, 8);
        CHECK(!strcmp(found[0]->name, cases[i].best), "case %zu: %s", i, found[0]->name);
        CHECK(!strcmp(found[n - 1]->name, "scalar"), "case %zu", i);
        if (!strcmp(found[0]->name, "amx")) { /* tiles where they pay, for the rest what comes next */
            CHECK(found[0]->matmul[MER_Q4_0] != found[1]->matmul[MER_Q4_0], "case %zu", i);
            CHECK(found[0]->matmul[MER_Q4_K] == found[1]->matmul[MER_Q4_K], "case %zu", i);
        }
        CHECK(mer_isas_for(&cases[i].cpu, found, 1) == 1, "case %zu", i);
    }
}

int main(void) {
    const mer_isa *found[8];
    int n = mer_isas(found, 8);
#ifdef MER_TILES
    if (found[0] == &mer_isa_avx512) found[n++] = &mer_isa_amx;
#endif
#ifdef MER_DOT4
    int here = 0, avx2 = 0;
    for (int i = 0; i < n; i++) {
        here |= found[i] == &mer_isa_avxvnni;
        avx2 |= found[i] == &mer_isa_avx2;
    }
    if (avx2 && !here) found[n++] = &mer_isa_avxvnni;
#endif
    mer_pool *pool = mer_pool_new(3, 10);
    for (int i = 0; i < n; i++) {
        products(found[i], pool);
        odd_values(found[i]);
        printf("passed: %s\n", found[i]->name);
    }
    mer_pool_free(pool);
    choices();
    return 0;
}
