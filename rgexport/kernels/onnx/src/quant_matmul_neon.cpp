// Arm with dot products (armv8.2-a+dotprod).
#include "quant_matmul_template.h"
#include "simd_neon.h"

namespace rgexport {

QuantKernels quant_kernels_neon() { return QuantMatmul<Neon>::kernels(); }

}  // namespace rgexport
