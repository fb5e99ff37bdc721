/* Code that is compiled once for each width of registers, from a header whose functions are named FUNCTION(name), and
 * chosen here: the compiler's clones of a function have vectors of one width (vec.h). */
#ifndef MER_DECODER_LEVEL_H
#define MER_DECODER_LEVEL_H

/* Queries times blocks that attention has under way at once, at the least: as many chains as a processor can overlap. */
#define MER_LEAST_UNITS 16
#define MER_ATTENTION_UNITS(QUERIES) ((QUERIES) > MER_LEAST_UNITS ? (QUERIES) : MER_LEAST_UNITS)

#if defined(__x86_64__)
#define MER_DECLARE_LEVELS(NAME, ...) \
    void NAME##_avx512(__VA_ARGS__);  \
    void NAME##_avx2(__VA_ARGS__);    \
    void NAME##_plain(__VA_ARGS__);
#define MER_BEST_LEVEL(NAME, ...)                                                                               \
    do {                                                                                                        \
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&                          \
            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))                           \
            NAME##_avx512(__VA_ARGS__);                                                                         \
        else if (__builtin_cpu_supports("avx2"))                                                                \
            NAME##_avx2(__VA_ARGS__);                                                                           \
        else                                                                                                    \
            NAME##_plain(__VA_ARGS__);                                                                          \
    } while (0)
#else
#define MER_DECLARE_LEVELS(NAME, ...) void NAME##_plain(__VA_ARGS__);
#define MER_BEST_LEVEL(NAME, ...) NAME##_plain(__VA_ARGS__)
#endif

#endif
