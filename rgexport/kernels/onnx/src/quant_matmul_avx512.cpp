// AVX-512 with VNNI.
#include "quant_matmul_template.h"
#include "simd_avx512.h"

namespace rgexport {

QuantKernels quant_kernels_avx512() { return QuantMatmul<Avx512>::kernels(); }

}  // namespace rgexport
