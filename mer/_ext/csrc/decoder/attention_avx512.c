/* Attention in AVX-512. */
#if defined(__x86_64__)
#include <math.h> /* before the pragma: what the system's headers have is for every CPU */
#include <string.h>

#include "../mer_decoder.h"
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx2,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl")
#endif
#define LANES 16
#define FUNCTION(NAME) NAME##_avx512
#include "attend.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
