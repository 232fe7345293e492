// AVX-512 with VNNI.
#include "cpu.h"
#include "quant_few_avx512.h"
#include "quant_matmul_template.h"

namespace rgexport {

QuantKernels quant_kernels_avx512() {
  QuantKernels kernels = QuantMatmul<Avx512>::kernels();
  if (is_intel()) kernels.few = QuantMatmul<Avx512Intel>::few();
  if (is_zen4()) kernels.few = QuantMatmul<Avx512Zen4>::few();
  return kernels;
}

}  // namespace rgexport
