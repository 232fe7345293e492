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
  static constexpr int64_t kMostFew = 4;

  static QuantKernels kernels() {
    return {few(), [](const QuantMatrix&) { return kernel(multiply_many); }, kMostFew,
            QuantMany<Simd>::kPanel, QuantMany<Simd>::kPanels};
  }

  static QuantKernel few() { return kernel(multiply_few); }

 private:
  static QuantKernel kernel(decltype(QuantKernel::multiply) multiply) {
    return {code_bytes, padded_blocks, QuantRound<Simd>::round, multiply};
  }

  static void multiply_few(const QuantMatrix& w, const Activations& a, int64_t first, int64_t last,
                           float* y) {
    (w.bits == 4 ? pick_few<4>(w) : pick_few<8>(w))(w, a, first, last, y);
  }

  static void multiply_many(const QuantMatrix& w, const Activations& a, int64_t first,
                            int64_t last, float* y) {
    const int64_t lanes = Shape(w).lanes;
    (w.bits == 4 ? pick_many<4>(lanes) : pick_many<8>(lanes))(w, a, first, last, y);
  }

  // The kernel for a size of blocks, from 16 columns to 256.
  template <int kBits, int kBlock = 256>
  static auto pick_few(const QuantMatrix& w) {
    if constexpr (kBlock > 16) {
      if (w.block < kBlock) return pick_few<kBits, kBlock / 2>(w);
    }
    return QuantFew<Simd>::template stream<kBits, kBlock * kBits / 32>;
  }

  // The kernel for a number of lanes that share a scale.
  template <int kBits, int kShare = kLanes>
  static auto pick_many(int64_t lanes) {
    if constexpr (kShare > 2) {
      if (lanes < kShare) return pick_many<kBits, kShare / 2>(lanes);
    }
    return QuantMany<Simd>::template panels<kBits, kShare>;
  }
};

}  // namespace rgexport
