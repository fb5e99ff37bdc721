/* What runs kernels, for the simulated driver. */
#include "cuda_shim.h"

namespace simulated {

/* NULL: no kernel of that name. */
const bind *find_kernel(const char *name);

/* Runs a kernel; false: threads wait for others that never come. */
bool run_grid(const call &kernel, dim3 grid, dim3 dim, size_t shared);

} // namespace simulated
