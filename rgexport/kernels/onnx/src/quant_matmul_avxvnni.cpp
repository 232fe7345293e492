// AVX2 with dot products (AVX-VNNI): Intel's client processors, which have no AVX-512.
#include "quant_matmul_template.h"
#include "simd_avx2.h"

namespace rgexport {

QuantKernels quant_kernels_avxvnni() { return QuantMatmul<AvxVnni>::kernels(); }

}  // namespace rgexport
