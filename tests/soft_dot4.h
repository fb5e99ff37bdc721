/* AVX-VNNI's byte product in plain C, after the pseudo-code in Intel's manual (volume 2, "VPDPBUSD"), for CPUs that have
 * none. */
#include <stdint.h>

__attribute__((target("avx2"))) static inline __m256i dot4(__m256i sum, __m256i w, __m256i x) {
    int32_t sums[8];
    uint8_t unsigned_bytes[32];
    int8_t signed_bytes[32];
    _mm256_storeu_si256((__m256i *)sums, sum);
    _mm256_storeu_si256((__m256i *)unsigned_bytes, w);
    _mm256_storeu_si256((__m256i *)signed_bytes, x);
    for (int i = 0; i < 32; i++) sums[i / 4] += unsigned_bytes[i] * signed_bytes[i];
    return _mm256_loadu_si256((const __m256i *)sums);
}
