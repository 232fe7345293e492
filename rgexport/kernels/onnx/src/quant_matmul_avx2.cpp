// AVX2 without dot products.
#include "quant_matmul_template.h"
#include "simd_avx2.h"

namespace rgexport {

QuantKernels quant_kernels_avx2() { return QuantMatmul<Avx2>::kernels(); }

}  // namespace rgexport
