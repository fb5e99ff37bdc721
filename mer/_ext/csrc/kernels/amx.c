/* AMX: products of tiles, for batches.
 *
 * Integer formats: the tile product of 16 tokens and 16 rows over one block of 32 is the same integer that AVX-512
 * has, and what follows is the same arithmetic, so every result has its bytes. Few tokens are left to AVX-512, and so are
 * formats whose sums are scaled within a block: tiles give them by way of memory, which took longer for Q4_K.
 *
 * BF16: the tile adds pairs in an order of its own, which one token follows without tiles (add_step). Activations
 * are not rounded: they are split into three BF16 numbers whose sum they are, high, middle and low, which makes three
 * products. F16 has more bits than BF16, and F32 more still: they would take six and nine, and stay with avx512.c.
 */
#if defined(__x86_64__)
#include <immintrin.h> /* before the pragma: its functions carry their own targets */
#ifdef __clang__
#define TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,amx-tile,amx-int8,amx-bf16"
#pragma clang attribute push(__attribute__((target(TARGET))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,amx-tile,amx-int8,amx-bf16")
#endif
#include "ahead.h"
#include "elementwise.h"
#include "products.h"
#include "rows512.h"
#include "tiles.h"

#define TILE 16    /* tokens of a tile */
#define STRIP 64   /* tokens that one unpacking of weights serves: four tiles */
#define AT_LEAST 8 /* tokens that a tile is worth its time for */

/* Tiles 0 to 3 take sums [token, row]; 4 holds weights, 5 and 6 activations. */
enum { SUM_TILES = 4, TILES = 7 };

static void configure(int act_bytes) {
    mer_tile_config c = {.palette = 1};
    for (int t = 0; t < TILES; t++) {
        c.row_bytes[t] = (uint16_t)(t <= SUM_TILES ? 64 : act_bytes);
        c.rows[t] = (uint8_t)(t == SUM_TILES ? act_bytes / 4 : TILE);
    }
    tile_configure(&c);
}

/* The sums of one block over a strip. weights: four bytes of each row a line, as load_lanes gives them. q: the
 * tokens' 32 activations each; a last tile of less than 16 tokens has lines of no meaning. */
INLINE void multiply_block(const int8_t weights[8][64], const int8_t (*q)[32], long n_tok, int32_t (*sums)[ROWS]) {
    tile_load(4, weights, 64);
#define MULTIPLY(T, A)                            \
    if (n_tok > T * TILE) {                       \
        tile_load(A, q + T * TILE, 32);           \
        tile_zero(T);                             \
        tile_dot_int8(T, A, 4);                   \
        tile_store(T, sums + T * TILE, 64);       \
    }
    MULTIPLY(0, 5)
    MULTIPLY(1, 6)
    MULTIPLY(2, 5)
    MULTIPLY(3, 6)
#undef MULTIPLY
}

INLINE void gather_block(const mer_act_q8 *a, long n_tok, long b, int8_t (*q)[32]) {
    for (long t = 0; t < n_tok; t++)
        _mm256_store_si256((__m256i *)q[t], _mm256_loadu_si256((const __m256i *)(a[t].q + b * 32)));
}

INLINE void store_lanes(int8_t (*line)[64], const __m512i w[4]) {
    for (int k = 0; k < 4; k++) _mm512_store_si512(line[k], w[k]);
}

/* A strip's buffers: they stay in the first level of cache. */
typedef struct {
    _Alignas(64) int8_t weights[8][64];
    int8_t q[STRIP][32];
    int32_t sums[STRIP][ROWS];
    float acc[STRIP][ROWS];
    mer_act_q8 a[STRIP];
} strip;

/* acc + d * da * n: in the order of avx512.c */
INLINE void add_sums(strip *s, __m512 d, long n_tok, long b) {
    for (long t = 0; t < n_tok; t++) {
        const __m512 scale = _mm512_mul_ps(d, _mm512_set1_ps(s->a[t].d[b]));
        const __m512 n = _mm512_cvtepi32_ps(_mm512_load_si512(s->sums[t]));
        _mm512_store_ps(s->acc[t], _mm512_add_ps(_mm512_load_ps(s->acc[t]), _mm512_mul_ps(scale, n)));
    }
}

INLINE void strip_q4_0(strip *s, const rows16 *row, const mer_ahead *ahead, long n_tok, long cols) {
    const __m512i mask = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8);
    for (long b = 0; b < cols / 32; b++) {
        const size_t at = (size_t)b * sizeof(mer_block_q4_0);
        if (ahead) ahead_step(*ahead, row->run[0] + ROWS * at, ROWS * sizeof(mer_block_q4_0));
        __m512i raw[4], low[4], high[4];
        load_lanes(row, at + 2, raw);
        for (int k = 0; k < 4; k++) {
            low[k] = _mm512_sub_epi8(_mm512_and_si512(raw[k], mask), eight);
            high[k] = _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(raw[k], 4), mask), eight);
        }
        store_lanes(s->weights, low);
        store_lanes(s->weights + 4, high);
        gather_block(s->a, n_tok, b, s->q);
        multiply_block(s->weights, s->q, n_tok, s->sums);
        add_sums(s, load_scales(row, at), n_tok, b);
    }
}

INLINE void strip_mxfp4(strip *s, const rows16 *row, const mer_ahead *ahead, long n_tok, long cols) {
    const __m512i mask = _mm512_set1_epi8(15), values = _mm512_broadcast_i32x4(load128((const char *)mer_e2m1));
    for (long b = 0; b < cols / 32; b++) {
        const size_t at = (size_t)b * sizeof(mer_block_mxfp4);
        if (ahead) ahead_step(*ahead, row->run[0] + ROWS * at, ROWS * sizeof(mer_block_mxfp4));
        __m512i raw[4], low[4], high[4];
        load_lanes(row, at + 1, raw);
        for (int k = 0; k < 4; k++) {
            low[k] = _mm512_shuffle_epi8(values, _mm512_and_si512(raw[k], mask));
            high[k] = _mm512_shuffle_epi8(values, _mm512_and_si512(_mm512_srli_epi16(raw[k], 4), mask));
        }
        store_lanes(s->weights, low);
        store_lanes(s->weights + 4, high);
        gather_block(s->a, n_tok, b, s->q);
        multiply_block(s->weights, s->q, n_tok, s->sums);
        add_sums(s, load_powers(row, at), n_tok, b);
    }
}

INLINE void strip_q8_0(strip *s, const rows16 *row, const mer_ahead *ahead, long n_tok, long cols) {
    for (long b = 0; b < cols / 32; b++) {
        const size_t at = (size_t)b * sizeof(mer_block_q8_0);
        if (ahead) ahead_step(*ahead, row->run[0] + ROWS * at, ROWS * sizeof(mer_block_q8_0));
        for (int half = 0; half < 2; half++) {
            __m512i w[4];
            load_lanes(row, at + 2 + (size_t)half * 16, w);
            store_lanes(s->weights + half * 4, w);
        }
        gather_block(s->a, n_tok, b, s->q);
        multiply_block(s->weights, s->q, n_tok, s->sums);
        add_sums(s, load_scales(row, at), n_tok, b);
    }
}

/* Rows in sixteens, tokens in strips; what is left of the tokens and would fill less than half a tile goes by
 * avx512.c. */
#define INT_MATMUL(NAME, FMT, MULTIPLY)                                                                       \
    static void NAME(const void *w, long cols, long r0, long r1, const void *const *acts, long n_tok, float *y, \
                     long y_stride) {                                                                         \
        const long few = n_tok % TILE < AT_LEAST ? n_tok % TILE : 0;                                          \
        n_tok -= few;                                                                                         \
        if (few)                                                                                              \
            mer_isa_avx512.matmul[FMT](w, cols, r0, r1, acts + n_tok, few, y + n_tok * y_stride, y_stride);   \
        if (n_tok == 0) return;                                                                               \
        strip s;                                                                                              \
        memset(s.q, 0, sizeof s.q);                                                                           \
        configure(32);                                                                                        \
        const size_t bytes = mer_row_bytes(FMT, cols);                                                        \
        const mer_ahead run = ahead_begin((const char *)w + (size_t)r0 * bytes, ROWS * bytes);                \
        for (long r = r0; r < r1; r += ROWS) {                                                                \
            const rows16 row = open_rows((const char *)w + (size_t)r * bytes, bytes, r1 - r);                 \
            for (long t = 0; t < n_tok; t += STRIP) {                                                         \
                const long n = n_tok - t < STRIP ? n_tok - t : STRIP;                                         \
                for (long i = 0; i < n; i++) s.a[i] = mer_act_view(acts[t + i], cols);                        \
                memset(s.acc, 0, (size_t)n * sizeof s.acc[0]);                                                \
                MULTIPLY(&s, &row, t || few ? NULL : &run, n, cols);                                          \
                for (long i = 0; i < n; i++)                                                                  \
                    store_rows(y + (t + i) * y_stride + r, _mm512_load_ps(s.acc[i]), r1 - r);                 \
            }                                                                                                 \
        }                                                                                                     \
        tile_release();                                                                                       \
    }

INT_MATMUL(matmul_q4_0, MER_Q4_0, strip_q4_0)
INT_MATMUL(matmul_q8_0, MER_Q8_0, strip_q8_0)
INT_MATMUL(matmul_mxfp4, MER_MXFP4, strip_mxfp4)

/* BF16. A step is 32 columns: 64 bytes of each row, and of each token's three parts. */
#define STEP 32

/* A split row of activations: for each step its 32 high, 32 middle and 32 low parts. They are cut off, not rounded, so
 * that nothing overflows and each remainder is exact. What is not finite has no remainder. */
static void split(const float *x, void *act, long cols) {
    uint16_t *out = act;
    const __m512i top = _mm512_set1_epi32((int)0xffff0000u), quiet = _mm512_set1_epi32(0x00400000);
    for (long k = 0; k < cols; k += 16) {
        const __mmask16 lanes = (__mmask16)(cols - k < 16 ? (1u << (cols - k)) - 1 : 0xffff);
        __m512 rest = _mm512_maskz_loadu_ps(lanes, x + k);
        const __mmask16 nan = _mm512_cmp_ps_mask(rest, rest, _CMP_UNORD_Q);
        rest = _mm512_castsi512_ps(
            _mm512_mask_or_epi32(_mm512_castps_si512(rest), nan, _mm512_castps_si512(rest), quiet));
        const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_sub_ps(rest, rest), _mm512_setzero_ps(), _CMP_EQ_OQ);
        for (int part = 0; part < 3; part++) {
            const __m512i cut = _mm512_and_si512(_mm512_castps_si512(rest), top);
            const __m256i half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(cut, 16));
            _mm256_storeu_si256((__m256i *)(out + k / STEP * 3 * STEP + part * STEP + k % STEP), half);
            rest = _mm512_maskz_sub_ps(finite, rest, _mm512_castsi512_ps(cut));
        }
    }
    if (cols % STEP && cols % STEP <= 16) /* the second half of the last step */
        for (int part = 0; part < 3; part++)
            memset(out + cols / STEP * 3 * STEP + part * STEP + 16, 0, 16 * sizeof *out);
}

/* The next `bytes` of sixteen rows, beyond them zeros: lane r of w[k] has columns 2 k and 2 k + 1 of row r. */
INLINE void load_step(const rows16 *row, size_t at, size_t bytes, __m512i w[STEP / 2]) {
    char padded[ROWS][64];
    rows16 from = *row;
    if (bytes < 64) {
        memset(padded, 0, sizeof padded);
        for (int i = 0; i < ROWS; i++) memcpy(padded[i], row_at(row, i) + at, bytes);
        for (int i = 0; i < 4; i++) from.run[i] = padded[4 * i];
        from.step = 64;
        at = 0;
    }
    for (int k = 0; k < 4; k++) load_lanes(&from, at + (size_t)k * 16, w + 4 * k);
}

INLINE size_t step_bytes(long cols, long k) { return cols - k < STEP ? 2 * (size_t)(cols - k) : 64; }

/* What the tile products of a step come to for one token, in their order: even columns and odd ones are added up apart
 * from zero on, ascending, each product fused with its sum, then both together, then onto the row's sum. */
INLINE __m512 add_step(__m512 sum, const __m512i w[STEP / 2], const char *parts) {
    const __m512i top = _mm512_set1_epi32((int)0xffff0000u);
    float x[3][STEP];
    __m512 even[3], odd[3];
    for (int part = 0; part < 3; part++) {
        for (int i = 0; i < STEP; i += 16) {
            const __m256i h = _mm256_loadu_si256((const __m256i *)(parts + 64 * part + 2 * i));
            _mm512_storeu_si512(x[part] + i, _mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
        }
        even[part] = odd[part] = _mm512_setzero_ps();
    }
    for (int k = 0; k < STEP / 2; k++) {
        const __m512 low = _mm512_castsi512_ps(_mm512_slli_epi32(w[k], 16));
        const __m512 high = _mm512_castsi512_ps(_mm512_and_si512(w[k], top));
        for (int part = 0; part < 3; part++) {
            even[part] = _mm512_fmadd_ps(_mm512_set1_ps(x[part][2 * k]), low, even[part]);
            odd[part] = _mm512_fmadd_ps(_mm512_set1_ps(x[part][2 * k + 1]), high, odd[part]);
        }
    }
    for (int part = 0; part < 3; part++) sum = _mm512_add_ps(sum, _mm512_add_ps(even[part], odd[part]));
    return sum;
}

/* One token, which would leave most of each tile empty. Apart, so that nothing moves past the setting of MXCSR. */
static __attribute__((noinline)) void one_bf16(const char *w, size_t bytes, long cols, long r0, long r1,
                                               const char *act, float *y) {
    const mer_ahead run = ahead_begin(w + (size_t)r0 * bytes, ROWS * bytes);
    for (long r = r0; r < r1; r += ROWS) {
        const rows16 row = open_rows(w + (size_t)r * bytes, bytes, r1 - r);
        __m512 sum = _mm512_setzero_ps();
        for (long k = 0; k < cols; k += STEP) {
            const size_t at = 2 * (size_t)k;
            __m512i step[STEP / 2];
            ahead_step(run, row.run[0] + ROWS * at, ROWS * 64);
            load_step(&row, at, step_bytes(cols, k), step);
            sum = add_step(sum, step, act + 3 * at);
        }
        store_rows(y + r, sum, r1 - r);
    }
}

typedef struct {
    _Alignas(64) char weights[16][64];
    char parts[3][STRIP][64];
    float sums[STRIP][ROWS];
} strip_bf16;

static void many_bf16(const char *w, size_t bytes, long cols, long r0, long r1, const void *const *acts, long n_tok,
                      float *y, long y_stride) {
    strip_bf16 s;
    memset(s.parts, 0, sizeof s.parts);
    configure(64);
    const mer_ahead run = ahead_begin(w + (size_t)r0 * bytes, ROWS * bytes);
    for (long r = r0; r < r1; r += ROWS) {
        const rows16 row = open_rows(w + (size_t)r * bytes, bytes, r1 - r);
        for (long t = 0; t < n_tok; t += STRIP) {
            const long n = n_tok - t < STRIP ? n_tok - t : STRIP;
            tile_zero(0);
            tile_zero(1);
            tile_zero(2);
            tile_zero(3);
            for (long k = 0; k < cols; k += STEP) {
                const size_t at = 2 * (size_t)k;
                __m512i step[STEP / 2];
                if (t == 0) ahead_step(run, row.run[0] + ROWS * at, ROWS * 64);
                load_step(&row, at, step_bytes(cols, k), step);
                for (int i = 0; i < STEP / 2; i++) _mm512_store_si512(s.weights[i], step[i]);
                for (long i = 0; i < n; i++) {
                    const char *const from = (const char *)acts[t + i] + 3 * at;
                    for (int part = 0; part < 3; part++)
                        _mm512_store_si512(s.parts[part][i], _mm512_loadu_si512(from + 64 * part));
                }
                tile_load(4, s.weights, 64);
#define MULTIPLY(T)                                                \
    for (int part = 0; part < 3 && n > T * TILE; part++) {         \
        tile_load(5, s.parts[part][T * TILE], 64);                 \
        tile_dot_bf16(T, 5, 4);                                    \
    }
                MULTIPLY(0)
                MULTIPLY(1)
                MULTIPLY(2)
                MULTIPLY(3)
#undef MULTIPLY
            }
            tile_store(0, s.sums[0], 64);
            tile_store(1, s.sums[TILE], 64);
            tile_store(2, s.sums[2 * TILE], 64);
            tile_store(3, s.sums[3 * TILE], 64);
            for (long i = 0; i < n; i++)
                store_rows(y + (t + i) * y_stride + r, _mm512_load_ps(s.sums[i]), r1 - r);
        }
    }
    tile_release();
}

static void matmul_bf16(const void *w, long cols, long r0, long r1, const void *const *acts, long n_tok, float *y,
                        long y_stride) {
    enum { FLUSH = 1 << 15, DENORMALS_ARE_ZERO = 1 << 6 }; /* as tile products do */
    const size_t bytes = mer_row_bytes(MER_BF16, cols);
    if (n_tok != 1) {
        many_bf16(w, bytes, cols, r0, r1, acts, n_tok, y, y_stride);
        return;
    }
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | FLUSH | DENORMALS_ARE_ZERO);
    one_bf16(w, bytes, cols, r0, r1, acts[0], y);
    _mm_setcsr(before);
}

static void quantise(const float *x, void *act, long cols) { mer_isa_avx512.quantise(x, act, cols); }

static void swiglu(const float *gate, const float *up, float *h, long n) { mer_isa_avx512.swiglu(gate, up, h, n); }

static void geglu(const float *gate, const float *up, float *h, long n) { mer_isa_avx512.geglu(gate, up, h, n); }

static void clamped_swiglu(const float *gate, const float *up, float *h, long n, float alpha, float limit, float added) {
    mer_isa_avx512.clamped_swiglu(gate, up, h, n, alpha, limit, added);
}

static void matmul_f16(const void *w, long cols, long r0, long r1, const void *const *acts, long n_tok, float *y,
                       long y_stride) {
    mer_isa_avx512.matmul[MER_F16](w, cols, r0, r1, acts, n_tok, y, y_stride);
}

static void matmul_f32(const void *w, long cols, long r0, long r1, const void *const *acts, long n_tok, float *y,
                       long y_stride) {
    mer_isa_avx512.matmul[MER_F32](w, cols, r0, r1, acts, n_tok, y, y_stride);
}

const mer_isa mer_isa_amx = {
    .name = "amx",
    .quantise = quantise,
    .split = split,
    .swiglu = swiglu,
    .geglu = geglu,
    .clamped_swiglu = clamped_swiglu,
    .matmul =
        {
            [MER_F32] = matmul_f32,
            [MER_F16] = matmul_f16,
            [MER_BF16] = matmul_bf16,
            [MER_Q4_1] = mer_avx512_q4_1,
            [MER_Q5_0] = mer_avx512_q5_0,
            [MER_Q5_1] = mer_avx512_q5_1,
            [MER_Q2_K] = mer_avx512_q2_k,
            [MER_Q3_K] = mer_avx512_q3_k,
            [MER_Q4_K] = mer_avx512_q4_k,
            [MER_Q5_K] = mer_avx512_q5_k,
            [MER_Q6_K] = mer_avx512_q6_k,
            [MER_IQ4_NL] = mer_avx512_iq4_nl,
            [MER_IQ4_XS] = mer_avx512_iq4_xs,
            [MER_Q4_0] = matmul_q4_0,
            [MER_Q8_0] = matmul_q8_0,
            [MER_MXFP4] = matmul_mxfp4,
        },
};
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
