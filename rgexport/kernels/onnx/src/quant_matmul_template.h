// The kernels of quant_matmul.h for any vector unit with a dot product of four bytes.
#pragma once

#include "quant_few.h"
#include "quant_many.h"
#include "quant_round.h"
#include "quant_several.h"
#include "two_level.h"

namespace rgexport {

template <class Simd>
class QuantMatmul : QuantLayout<Simd> {
  using Base = QuantLayout<Simd>;
  using Base::code_bytes;
  using Base::kLanes;
  using Base::padded_blocks;
  using Base::pick;

 public:
  static QuantKernels kernels() {
    return {few(),
            two_level,
            several(),
            many,
            unpack_rows,
            QuantSeveral<Simd>::kMaxRows,
            QuantMany<Simd>::kPanel,
            QuantMany<Simd>::kPanels};
  }

  // Most were the fastest one somewhere: in turn, on Intel's servers; there without AVX-512; on Zen 4
  // for 4 bits; on Zen 5; on Zen 4 for 8 bits; on Intel with AVX2 for small blocks. The first is for
  // who cannot tell yet.
  static std::array<QuantKernel, kReadings> few() {
    return {few<Reading<1, Cache::kL2, 2048>>(), few<Reading<2, Cache::kL2, 4096>>(),
            few<Reading<1, Cache::kL2>>(),       few<Reading<2, Cache::kL1>>(),
            few<Reading<1, Cache::kNone>>(),     few<Reading<1, Cache::kL1>>(),
            few<Reading<1, Cache::kOnce>>()};
  }
  static TwoLevelProduct two_level(const TwoLevelMatrix& w, int reading) {
    if (w.unpacked.row_bytes() % most_tile(w.bits) != 0) return nullptr;
    return reading == 0 ? two_level_of<Reading<2, Cache::kL2, 4096>>(w)
                        : two_level_of<Reading<1, Cache::kL2, 2048>>(w);
  }
  static QuantKernel several() {
    return {code_bytes, padded_blocks, QuantRound<Simd>::round_few, multiply_several};
  }

 private:
  static QuantKernel many(const QuantMatrix&) {
    return {code_bytes, padded_blocks, QuantRound<Simd>::round_many, multiply_many};
  }

  template <class Reading>
  static QuantKernel few() {
    return {code_bytes, padded_blocks, QuantRound<Simd>::round_few, multiply_few<Reading>};
  }

  template <class Reading>
  static TwoLevelProduct two_level_of(const TwoLevelMatrix& w) {
    constexpr struct {
      int bits, block;
    } kLayouts[] = {{2, 16}, {2, 32}, {3, 16}, {3, 32}, {3, 64}, {4, 16},
                    {4, 32}, {4, 64}, {5, 32}, {5, 64}, {6, 32}};  // of plans
    TwoLevelProduct product = nullptr;
    unrolled<sizeof kLayouts / sizeof *kLayouts>([&](auto i) {
      constexpr int stored = kLayouts[i].bits, block = kLayouts[i].block;
      constexpr int bits = stored <= 4 ? 4 : 8, lanes = block * bits / 32;
      using Weights = PlaneLines<Simd, Reading, stored, lanes>;
      if (w.bits == stored && w.unpacked.block == block)
        product = QuantFew<Simd, Weights, bits, lanes, Reading::kRows, 1>::stream;
    });
    return product;
  }

  template <class Reading>
  static void multiply_few(const QuantMatrix& w, const Activations& a, int64_t first, int64_t last,
                           float* y) {
    const auto instance = [&](auto bits, auto block) {
      constexpr int lanes = block * bits / 32;
      using Weights = StoredLines<Simd, Reading, bits, lanes>;
      if constexpr (bits == 8)
        if (a.digits == 2) return QuantFew<Simd, Weights, bits, lanes, Reading::kRows, 2>::stream;
      return QuantFew<Simd, Weights, bits, lanes, Reading::kRows, 1>::stream;
    };
    pick(w, instance)(w, a, first, last, y);
  }

  static void multiply_several(const QuantMatrix& w, const Activations& a, int64_t first,
                               int64_t last, float* y) {
    const auto instance = [&](auto bits, auto block) {
      constexpr int lanes = block * bits / 32, share = lanes < kLanes ? lanes : kLanes;
      if constexpr (bits == 8)
        if (a.digits == 2) return QuantSeveral<Simd>::template stream<bits, share, 2>;
      return QuantSeveral<Simd>::template stream<bits, share, 1>;
    };
    pick(w, instance)(w, a, first, last, y);
  }

  static void multiply_many(const QuantMatrix& w, const Activations& a, int64_t first, int64_t last,
                            float* y) {
    const auto instance = [&](auto bits, auto block) {
      constexpr int lanes = block * bits / 32, share = lanes < kLanes ? lanes : kLanes;
      if constexpr (bits == 8)
        if (a.digits == 2) return QuantMany<Simd>::template panels<bits, share, 2>;
      return QuantMany<Simd>::template panels<bits, share, 1>;
    };
    pick(w, instance)(w, a, first, last, y);
  }
};

}  // namespace rgexport
