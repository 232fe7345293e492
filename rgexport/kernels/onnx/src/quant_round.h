// Rounds activations to int8, a scale for each row and block of weights.
#pragma once

#include "quant_layout.h"
#include "unrolled.h"

namespace rgexport {

template <class Simd>
class QuantRound : QuantLayout<Simd> {
  using Base = QuantLayout<Simd>;
  using Base::kLanes;
  using Base::kVector;
  using typename Base::Float;
  using typename Base::Int;
  static constexpr int64_t kAhead = 512;  // floats that x is fetched by
  static constexpr int64_t kFetched = Base::kCacheLine / sizeof(float);

 public:
  static void round_few(const QuantMatrix& w, const float* x, const Activations& a, int64_t index) {
    const auto instance = [](auto bits, auto block) { return Chunk<bits, block, true>::round; };
    Base::pick(w, instance)(w, x, a, index);
  }
  static void round_many(const QuantMatrix& w, const float* x, const Activations& a,
                         int64_t index) {
    const auto instance = [](auto bits, auto block) { return Chunk<bits, block, false>::round; };
    Base::pick(w, instance)(w, x, a, index);
  }

 private:
  // The columns of a block or of a line of weights, whatever has more: a code is a byte. Few rows lie
  // side by side: a line of codes of each, and the numbers of a block of each. There a row has numbers
  // once, those of its last digit, and starts and sums of both digits.
  template <int kBits, int kBlock, bool kFew>
  struct Chunk {
    static constexpr int64_t kLine = Base::template kCodes<kBits>;
    static constexpr int64_t kColumns = kBlock < kLine ? kLine : kBlock;
    static constexpr int64_t kBlocks = kColumns / kBlock, kBlockLanes = kBlock * kBits / 32;
    static constexpr int kVectors = kLine / kLanes;
    static constexpr int32_t kTaken =
        kFew ? Base::template kZeroPoint<kBits> : Base::template kPanelZeroPoint<kBits>;

    static void round(const QuantMatrix& w, const float* x, const Activations& a, int64_t index) {
      const int64_t rows = a.count / a.digits, step = kFew ? rows : 1;
      const int64_t first = kFew ? index / a.digits : index * a.blocks;
      const int64_t line_step = kFew ? a.count * kLine : kLine;
      int8_t* codes = a.codes + index * (kFew ? kLine : a.stride);
      const bool second = index % a.digits == 1;
      int64_t at = first;  // of a block's numbers
      for (int64_t k = 0; k < w.columns; k += kColumns, codes += kColumns / kLine * line_step) {
        const int64_t left = w.columns - k;
        float scales[kBlocks];
        int32_t sums[kBlocks] = {};
        if (left >= kColumns) {
          for (int64_t i = 0; i < kColumns; i += kFetched) __builtin_prefetch(x + k + kAhead + i);
          columns(x + k, second, codes, line_step, scales, sums);
        } else {
          alignas(64) float padded[kColumns] = {};
          std::memcpy(padded, x + k, left * sizeof(float));
          columns(padded, second, codes, line_step, scales, sums);
        }
        for (int64_t b = 0; b < kBlocks; ++b, at += step) {
          if (kFew && second) sums[b] += kDigit * a.sums[at];
          a.scales[at] = scales[b];
          a.sums[at] = sums[b];
          a.starts[at] = -kTaken * sums[b];
        }
      }
      for (; at < first + a.blocks * step; at += step)
        a.scales[at] = 0, a.sums[at] = 0, a.starts[at] = 0;
    }

    static void columns(const float* x, bool second, int8_t* codes, int64_t stride, float* scales,
                        int32_t* sums) {
      Digit<Simd> digits[kBlocks];
      for (int64_t b = 0; b < kBlocks; ++b) {
        digits[b] = Digit<Simd>(largest(x + b * kBlock), second);
        scales[b] = digits[b].scale();
      }
      Int all = Simd::zero();
      for (int64_t line = 0; line < kColumns; line += kLine, codes += stride) {
        Int rounded[kVectors];
        unrolled<kVectors>([&](auto v) {
          const int64_t at = line + v * kLanes;
          rounded[v] = digits[at / kBlock].codes(Simd::load_float(x + at));
        });
        all = Simd::add(all, place(rounded, codes));
      }
      if constexpr (kBlocks == 1) {
        *sums = static_cast<int32_t>(Simd::sum(Simd::to_float(all)));
      } else {
        alignas(64) int32_t lanes[kLanes];
        Simd::store(lanes, all);
        for (int64_t i = 0; i < kLanes; ++i) sums[i / kBlockLanes] += lanes[i];
      }
    }

    static float largest(const float* x) {
      Float lanes = Simd::zero_float();
      for (int64_t i = 0; i < kBlock; i += kLanes)
        lanes = Simd::max_size(lanes, Simd::load_float(x + i));
      return Simd::max(lanes);
    }

    // Puts a line of codes where the unpacked weights will be. Returns the sums of the lanes.
    static Int place(const Int (&rounded)[kVectors], int8_t* codes) {
      const Int ones = Simd::broadcast(0x01010101);
      Int parts[2] = {Simd::pack(rounded[0], rounded[1], rounded[2], rounded[3])};
      if constexpr (kBits == 4) {
        const Int last = Simd::pack(rounded[4], rounded[5], rounded[6], rounded[7]);
        parts[1] = Simd::odd_bytes(parts[0], last);
        parts[0] = Simd::even_bytes(parts[0], last);
      }
      Int sums = Simd::zero();
      for (int64_t part = 0; part < 8 / kBits; ++part) {
        Simd::store(codes + part * kVector, parts[part]);
        sums = Simd::dot(sums, ones, parts[part]);
      }
      return sums;
    }
  };
};

}  // namespace rgexport
