/* What the kernels of a decoder's dense part take. */
#include "../../gpu/kernels/decoder.cuh"
