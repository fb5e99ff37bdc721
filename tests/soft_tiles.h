/* The tile instructions in plain C, after the pseudo-code in Intel's manual (volume 2, "LDTILECFG" to "TILEZERO"), for
 * CPUs that have none. A tile that is used as it was not configured stops the program, as the CPU would. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SOFT_REQUIRE(ok)                                                   \
    do {                                                                   \
        if (!(ok)) {                                                       \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #ok);       \
            abort();                                                       \
        }                                                                  \
    } while (0)

static __thread mer_tile_config soft_config;
static __thread uint8_t soft_tile[8][16][64];

static void tile_configure(const mer_tile_config *config) {
    soft_config = *config;
    SOFT_REQUIRE(config->palette == 1 && config->start_row == 0);
    for (int i = 0; i < 14; i++) SOFT_REQUIRE(config->reserved[i] == 0);
    for (int t = 0; t < 16; t++) {
        SOFT_REQUIRE(t < 8 || (config->rows[t] == 0 && config->row_bytes[t] == 0));
        SOFT_REQUIRE(config->rows[t] <= 16 && config->row_bytes[t] <= 64);
        SOFT_REQUIRE((config->rows[t] == 0) == (config->row_bytes[t] == 0));
    }
    memset(soft_tile, 0, sizeof soft_tile);
}

static void tile_release(void) { memset(&soft_config, 0, sizeof soft_config); }

static void soft_check(int t) { SOFT_REQUIRE(soft_config.palette == 1 && soft_config.rows[t] > 0); }

static void tile_zero(int t) {
    soft_check(t);
    memset(soft_tile[t], 0, sizeof soft_tile[t]);
}

static void tile_load(int t, const void *from, long stride) {
    tile_zero(t);
    for (int r = 0; r < soft_config.rows[t]; r++)
        memcpy(soft_tile[t][r], (const char *)from + r * stride, soft_config.row_bytes[t]);
}

static void tile_store(int t, void *to, long stride) {
    soft_check(t);
    for (int r = 0; r < soft_config.rows[t]; r++)
        memcpy((char *)to + r * stride, soft_tile[t][r], soft_config.row_bytes[t]);
}

static void soft_check_product(int sums, int a, int b) {
    soft_check(sums), soft_check(a), soft_check(b);
    SOFT_REQUIRE(sums != a && sums != b && a != b);
    SOFT_REQUIRE(soft_config.rows[sums] == soft_config.rows[a]);
    SOFT_REQUIRE(soft_config.row_bytes[sums] == soft_config.row_bytes[b]);
    SOFT_REQUIRE(soft_config.row_bytes[a] == 4 * soft_config.rows[b]);
    SOFT_REQUIRE(soft_config.row_bytes[sums] % 4 == 0);
}

static void tile_dot_int8(int sums, int a, int b) {
    soft_check_product(sums, a, b);
    for (int m = 0; m < soft_config.rows[sums]; m++)
        for (int n = 0; n < soft_config.row_bytes[sums] / 4; n++) {
            int32_t c;
            memcpy(&c, &soft_tile[sums][m][4 * n], 4);
            for (int k = 0; k < soft_config.row_bytes[a] / 4; k++)
                for (int i = 0; i < 4; i++)
                    c += (int8_t)soft_tile[a][m][4 * k + i] * (int8_t)soft_tile[b][k][4 * n + i];
            memcpy(&soft_tile[sums][m][4 * n], &c, 4);
        }
}

/* Subnormal numbers count as zero, as operands and as results. */
static float soft_flush(float f) { return fabsf(f) < 0x1p-126f ? copysignf(0.0f, f) : f; }

static float soft_bf16(const uint8_t *at) {
    uint16_t half;
    memcpy(&half, at, 2);
    const uint32_t bits = (uint32_t)half << 16;
    float f;
    memcpy(&f, &bits, 4);
    return soft_flush(f);
}

static void tile_dot_bf16(int sums, int a, int b) {
    soft_check_product(sums, a, b);
    for (int m = 0; m < soft_config.rows[sums]; m++)
        for (int n = 0; n < soft_config.row_bytes[sums] / 4; n++) {
            float even = 0, odd = 0, c;
            for (int k = 0; k < soft_config.row_bytes[a] / 4; k++) {
                even = soft_flush(
                    fmaf(soft_bf16(&soft_tile[a][m][4 * k]), soft_bf16(&soft_tile[b][k][4 * n]), even));
                odd = soft_flush(
                    fmaf(soft_bf16(&soft_tile[a][m][4 * k + 2]), soft_bf16(&soft_tile[b][k][4 * n + 2]), odd));
            }
            memcpy(&c, &soft_tile[sums][m][4 * n], 4);
            c = soft_flush(soft_flush(c) + soft_flush(even + odd));
            memcpy(&soft_tile[sums][m][4 * n], &c, 4);
        }
}
