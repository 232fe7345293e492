// AMX: tiles of 16 rows of activations times 16 outputs, for many rows. For few, AVX-512's kernels.
#include "amx_bf16.h"
#include "amx_int8.h"

namespace rgexport {

QuantKernels quant_kernels_avx512();

namespace {

QuantKernel many(const QuantMatrix& w) {
  return w.block < 64 ? AmxBf16::kernel() : AmxInt8::kernel();
}

}  // namespace

QuantKernels quant_kernels_amx() {
  QuantKernels kernels = quant_kernels_avx512();
  kernels.many = many;
  kernels.panel = kPanel;
  kernels.most_panels = kPanels;
  return kernels;
}

}  // namespace rgexport
