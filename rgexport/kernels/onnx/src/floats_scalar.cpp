// SSE2 or NEON, which every 64-bit processor has.
#include "floats_table.h"

namespace rgexport {

FloatKernels floats_scalar() { return float_kernels(); }

}  // namespace rgexport
