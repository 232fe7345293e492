// AVX2 with dot products (AVX-VNNI): Intel's client processors, which have no AVX-512.
#include "quant_matmul_template.h"
#include "simd_avx2.h"

namespace rgexport {

// As Reading<Avx512Intel>, for two rows: a tenth faster, on a Xeon with the cores of such clients.
template <>
struct Reading<AvxVnni> : AnyReading<AvxVnni> {
  static constexpr int64_t kNear = 4096;
};

QuantKernels quant_kernels_avxvnni() { return QuantMatmul<AvxVnni>::kernels(); }

}  // namespace rgexport
