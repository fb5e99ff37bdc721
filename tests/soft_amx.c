/* amx.c with tiles in plain C (soft_tiles.h), for test_kernels_amx.py to call. */
#define MER_TILES "soft_tiles.h"
#include "kernels/amx.c"

#define SOFT_ISA mer_isa_amx
#include "soft_kernels.h"
