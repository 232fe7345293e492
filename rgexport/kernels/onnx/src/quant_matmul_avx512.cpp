// AVX-512 with VNNI.
#include "cpu.h"
#include "quant_matmul_template.h"
#include "simd_avx512.h"

namespace rgexport {

// Fetched by hand, bytes stream by a sixth slower than the processor's own prefetchers bring them.
// Halves do so a quarter faster: their arithmetic takes so long that these do not get far enough.
template <>
struct Reading<Avx512Zen4> {
  static constexpr int kRows = 1;
  template <int kBits>
  static constexpr bool kFetched = kBits == 4;
  static __m512i line(const uint8_t* p) {
    __m512i weights = Avx512::load(p);
    __asm__("" : "+v"(weights));  // GCC would load them twice
    return weights;
  }
};

QuantKernels quant_kernels_avx512() {
  QuantKernels kernels = QuantMatmul<Avx512>::kernels();
  if (is_zen4()) kernels.few = QuantMatmul<Avx512Zen4>::few();
  return kernels;
}

}  // namespace rgexport
