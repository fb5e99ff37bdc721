/* Rows of an embedding as floats. */
#include "../mer_formats.h"
#include "kv.h"

MER_CLONES
int mer_embed(int fmt, const void *weights, long cols, const int32_t *tokens, long n, float *out) {
    const size_t row_bytes = mer_row_bytes(fmt, cols);
    for (long t = 0; t < n; t++, out += cols) {
        const char *row = (const char *)weights + (size_t)tokens[t] * row_bytes;
        switch (fmt) {
        case MER_F32: memcpy(out, row, row_bytes); break;
        case MER_F16:
            for (long i = 0; i < cols; i++) {
                uint16_t h;
                memcpy(&h, row + 2 * i, 2);
                out[i] = half_to_float(h);
            }
            break;
        case MER_BF16:
            for (long i = 0; i < cols; i++) {
                uint16_t h;
                memcpy(&h, row + 2 * i, 2);
                out[i] = mer_bf16_to_f32(h);
            }
            break;
        case MER_Q8_0:
            for (long b = 0; b < cols / 32; b++) {
                const mer_block_q8_0 *block = (const mer_block_q8_0 *)row + b;
                const float scale = half_to_float(block->d);
                for (long i = 0; i < 32; i++) out[b * 32 + i] = (float)block->qs[i] * scale;
            }
            break;
        default: return 0;
        }
    }
    return 1;
}
