// One row of activations: the weights stream by, as fast as memory gives them.
//
// The products of a row of weights lie where its lines have them, until those of kLanes blocks are there.
// Then they become one vector with a block in each lane, which is scaled and added to the sums of the
// vectors before it. quant_several.h adds the same numbers in the same order.
#pragma once

#include "quant_layout.h"
#include "reading.h"
#include "unrolled.h"

namespace rgexport {

template <class Simd, class Reading>
class QuantFew : QuantLayout<Simd> {
  using Base = QuantLayout<Simd>;
  using Base::kCacheLine;
  using Base::kLanes;
  using Base::kVector;
  using typename Base::Float;
  using typename Base::Int;
  using typename Base::Shape;

 public:
  // Columns of y, where kBlockLanes lanes of lines share a scale.
  template <int kBits, int kBlockLanes, int kDigits>
  static void stream(const QuantMatrix& w, const Activations& a, int64_t first, int64_t last,
                     float* y) {
    constexpr int kRows = Reading::kRows;
    const Shape shape(w);
    int64_t row = first;
    for (; row + kRows <= last; row += kRows)
      Rows<kBits, kBlockLanes, kRows, kDigits>(w, shape, a, row).multiply(y + row);
    for (; row < last; ++row)
      Rows<kBits, kBlockLanes, 1, kDigits>(w, shape, a, row).multiply(y + row);
  }

 private:
  // kRows rows of weights from `first` on.
  template <int kBits, int kBlockLanes, int kRows, int kDigits>
  class Rows {
    static constexpr int kShare = kBlockLanes < kLanes ? kBlockLanes : kLanes;
    // A step is as many blocks as fill a line, or as many lines as hold a block; kShare of them have as
    // many blocks as a vector has lanes.
    static constexpr int64_t kStepLines = kBlockLanes / kShare;
    static constexpr int kGroup = kShare < 4 ? kShare : 4, kGroups = kShare / kGroup;  // of steps
    static constexpr int64_t kLineCodes = Base::template kCodes<kBits>;
    static_assert(Base::template kFits<kBits, kStepLines, kDigits>);
    // Scales are prefetched with the data that they belong to.
    static constexpr int64_t kAheadBlocks = kReadAhead / (4 * kBlockLanes);

   public:
    Rows(const QuantMatrix& w, const Shape& shape, const Activations& a, int64_t first)
        : w_(w), shape_(shape), a_(a), data_(w.data + first * shape.row_bytes),
          first_scale_(first * shape.blocks),
          zeros_(w.zero_points ? w.zero_points + first * shape.zero_point_bytes : nullptr),
          zeros_end_(w.zero_points ? w.zero_points + w.rows * shape.zero_point_bytes : nullptr),
          bias_(w.bias ? w.bias + first : nullptr),
          scales_mask_(kCacheLine / bytes_of(w.scales) - 1) {}

    void multiply(float* y) const {
      Float sums[kRows];
      for (Float& sum : sums) sum = Simd::zero_float();
      int64_t line = 0;
      for (int64_t block = 0; block < shape_.blocks; block += kLanes, line += kShare * kStepLines)
        add(line, block, sums);
      for (int r = 0; r < kRows; ++r) {
        const float sum = Simd::sum(sums[r]);
        y[r] = bias_ ? sum + bias_[r] : sum;
      }
    }

   private:
    static constexpr int kLast = kDigits - 1;  // whose numbers are those of both

    // A vector of blocks. There is one loop over them: AMD's prefetchers know a stream by the load's place
    // in the code.
    [[gnu::always_inline]] void add(int64_t line, int64_t block, Float (&sums)[kRows]) const {
      Int dots[kRows];
      products(line, dots);
      const int64_t left = shape_.blocks - block;
      const Int starts = Simd::load(a_.starts + block);
      const Float x_scales = Simd::load_float(a_.scales + block);
      for (int r = 0; r < kRows; ++r) {
        // One vector of each cache line fetches it.
        const int64_t near = kRows * block + r * kLanes;
        if ((near & scales_mask_) == 0)
          fetch_into<Reading::kCache>(address_of(w_.scales, first_scale_ + near + kAheadBlocks));
        Int dot = Simd::add(dots[r], starts);
        if (zeros_) {
          const uint8_t* zeros = zeros_ + r * shape_.zero_point_bytes + block * kBits / 8;
          const Int offsets = Base::template offsets<kBits>(zeros, zeros_end_, left);
          dot = Simd::add(dot, Simd::times(offsets, Simd::load(a_.sums + block)));
        }
        const int64_t at = first_scale_ + r * shape_.blocks + block;
        const Float scales = Simd::mul(Base::scales_of(w_, shape_, at, left), x_scales);
        sums[r] = Simd::fma(Simd::to_float(dot), scales, sums[r]);
      }
    }

    // The products with a vector of blocks, from a line on.
    [[gnu::always_inline]] void products(int64_t line, Int (&dots)[kRows]) const {
      constexpr int64_t kLines = kGroup * kStepLines;
      Int groups[kRows][kGroups];
      unrolled<kGroups>([&](auto g) {
        const int64_t first = line + g * kLines;
        if (g > 0 && first >= shape_.lines) {
          for (int r = 0; r < kRows; ++r) groups[r][g] = Simd::zero();
          return;
        }
        Int steps[kGroup][kRows];
        if (first + kLines <= shape_.full_lines) {
          unrolled<kGroup>([&](auto i) { step<true>(first, i, steps[i]); });
        } else {
          Int some[kGroup][kRows];  // steps[] stays in registers
          last_steps(first, some);
          unrolled<kGroup * kRows>(
              [&](auto i) { steps[i / kRows][i % kRows] = some[i / kRows][i % kRows]; });
        }
        for (int r = 0; r < kRows; ++r) {
          Int sum = Simd::pair_sums(steps[0][r], steps[1][r]);
          if constexpr (kGroup == 4)
            sum = Simd::pair_sums(sum, Simd::pair_sums(steps[2][r], steps[3][r]));
          groups[r][g] = sum;
        }
      });
      for (int r = 0; r < kRows; ++r) dots[r] = Simd::template blocks_in_order<kShare>(groups[r]);
    }

    // Where not all lines are there.
    [[gnu::noinline]] void last_steps(int64_t first, Int (&steps)[kGroup][kRows]) const {
#pragma GCC unroll 1
      for (int i = 0; i < kGroup; ++i) step<false>(first, i, steps[i]);
    }

    // Those with the blocks of a line, or with the block of some lines: of step `index` of a group, which
    // begins with line `first`.
    template <bool kAll>
    [[gnu::always_inline]] void step(int64_t first, int index, Int (&dots)[kRows]) const {
      const int64_t line = first + index * kStepLines;
      Int before[kRows];
      for (int r = 0; r < kRows; ++r) dots[r] = before[r] = Simd::zero();
      if (!kAll && line >= shape_.lines) return;
      const uint8_t* data = data_ + line * kVector;
      const uint8_t* group = data_ + first * kVector * kRows;
      const int8_t* codes = a_.codes + line * kDigits * kLineCodes;
      for (int64_t l = 0; l < kStepLines; ++l, codes += kDigits * kLineCodes)
        for (int r = 0; r < kRows; ++r) {
          // Each line of the cache once, but twice where a group has less.
          const int64_t at = ((index * kStepLines + l) * kRows + r) * kVector;
          if (at % kCacheLine == 0) fetch_ahead(group + at);
          const uint8_t* from = data + r * shape_.row_bytes + l * kVector;
          const auto weights = Base::template unpacked<kBits>(
              kAll || line + l < shape_.full_lines ? Simd::load_once(from) : last_line(from));
          dots[r] = Base::template line_dot<kBits>(dots[r], weights, codes + kLast * kLineCodes);
          if (kDigits == 2) before[r] = Base::template line_dot<kBits>(before[r], weights, codes);
        }
      for (int r = 0; r < kRows; ++r) {
        const Int dot = Base::template close<kBits>(dots[r], Simd::zero());
        dots[r] = Base::template both<kDigits>(before[r], dot);
      }
    }

    // Nothing is read behind the row.
    Int last_line(const uint8_t* from) const {
      alignas(64) uint8_t padded[kVector] = {};
      std::memcpy(padded, from, shape_.row_bytes - shape_.full_lines * kVector);
      return Simd::load(padded);
    }

    static void fetch_ahead(const uint8_t* here) {
      if constexpr (Reading::kNear > 0) fetch_into<Cache::kL1>(here + Reading::kNear);
      fetch_into<Reading::kCache>(here + kReadAhead);
    }

    const QuantMatrix& w_;
    const Shape& shape_;
    const Activations& a_;
    const uint8_t* const data_;
    const int64_t first_scale_;
    const uint8_t* const zeros_;  // or null
    const uint8_t* const zeros_end_;
    const float* const bias_;    // or null
    const int64_t scales_mask_;  // of those in a line of the cache
  };
};

}  // namespace rgexport
