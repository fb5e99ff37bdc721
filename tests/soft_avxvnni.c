/* lanes_avxvnni.c with its byte product in plain C (soft_dot4.h), for test_kernels_avxvnni.py to call. */
#define MER_DOT4 "soft_dot4.h"
#include "kernels/lanes_avxvnni.c"

#define SOFT_ISA mer_isa_avxvnni
#include "soft_kernels.h"
