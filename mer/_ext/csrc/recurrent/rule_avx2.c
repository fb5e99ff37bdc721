/* The gated delta rule in AVX2. */
#if defined(__x86_64__)
#include <stdint.h> /* before the pragma: what the system's headers have is for every CPU */
#include <string.h>

#include "../mer_recurrent.h"
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,f16c,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,f16c,bmi2")
#endif
#define LANES 8
#define FUNCTION(NAME) NAME##_avx2
#include "rule.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
