// AMX: tiles of 16 rows of activations times 16 outputs, for many rows. For few, AVX-512 with GFNI:
// each processor with AMX is Intel's, and has it.
#include "amx_bf16.h"
#include "amx_int8.h"
#include "quant_matmul_template.h"
#include "simd_avx512.h"

namespace rgexport {

namespace {

using Few = QuantMatmul<Avx512>;

QuantKernel many(const QuantMatrix& w) {
  return w.block < 64 ? AmxBf16::kernel() : AmxInt8::kernel();
}

}  // namespace

QuantKernels quant_kernels_amx() {
  return {Few::few(), Few::two_level, Few::several(),
          many,       unpack_rows,    QuantSeveral<Avx512>::kMaxRows,
          kPanel,     kPanels};
}

}  // namespace rgexport
