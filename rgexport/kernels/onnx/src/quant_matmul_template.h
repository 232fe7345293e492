// The kernels of quant_matmul.h for any vector unit with a dot product of four bytes.
#pragma once

#include "quant_few.h"
#include "quant_many.h"
#include "quant_round.h"

namespace rgexport {

template <class Simd>
class QuantMatmul : QuantLayout<Simd> {
  using Base = QuantLayout<Simd>;
  using Base::code_bytes;
  using Base::kLanes;
  using Base::padded_blocks;
  using typename Base::Shape;

 public:
  static QuantKernels kernels() {
    constexpr int64_t kMostFew = 4;
    return {kernel(few), [](const QuantMatrix&) { return kernel(many); }, kMostFew,
            QuantMany<Simd>::kPanel, QuantMany<Simd>::kPanels};
  }

 private:
  static QuantKernel kernel(decltype(QuantKernel::multiply) multiply) {
    return {code_bytes, padded_blocks, QuantRound<Simd>::round, multiply};
  }

  static void few(const QuantMatrix& w, const Activations& a, int64_t first, int64_t last,
                  float* y) {
    const int64_t lanes = Shape(w).lanes;
    (w.bits == 4 ? pick<4>(lanes) : pick<8>(lanes)).few(w, a, first, last, y);
  }

  static void many(const QuantMatrix& w, const Activations& a, int64_t first, int64_t last,
                   float* y) {
    const int64_t lanes = Shape(w).lanes;
    (w.bits == 4 ? pick<4>(lanes) : pick<8>(lanes)).many(w, a, first, last, y);
  }

  // The kernels for a number of lanes that share a scale.
  struct Instance {
    void (*few)(const QuantMatrix&, const Activations&, int64_t, int64_t, float*);
    void (*many)(const QuantMatrix&, const Activations&, int64_t, int64_t, float*);
  };

  template <int kBits, int kShare = kLanes>
  static Instance pick(int64_t lanes) {
    if constexpr (kShare > 2) {
      if (lanes < kShare) return pick<kBits, kShare / 2>(lanes);
    }
    return {QuantFew<Simd>::template stream<kBits, kShare>,
            QuantMany<Simd>::template panels<kBits, kShare>};
  }
};

}  // namespace rgexport
