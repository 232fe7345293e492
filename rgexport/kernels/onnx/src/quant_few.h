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

// Weights that are stored in lines, from row `first` on; two_level.h has others. kBlockLanes lanes of
// lines share a scale.
template <class Simd, class Reading, int kBits, int kBlockLanes>
class StoredLines : QuantLayout<Simd> {
  using Base = QuantLayout<Simd>;
  using Base::kCacheLine;
  using Base::kLanes;
  using Base::kVector;
  using typename Base::Float;
  using typename Base::Int;
  using typename Base::Shape;
  // Scales are prefetched with the data that they belong to.
  static constexpr int64_t kAheadBlocks = kReadAhead / (4 * kBlockLanes);

 public:
  using Matrix = QuantMatrix;
  static constexpr int kTileLines = 1;  // that only unpack together

  static const QuantMatrix& layout(const Matrix& w) { return w; }
  StoredLines(const Matrix& w, const Shape& shape, int64_t first)
      : w_(w), shape_(shape), data_(w.data + first * shape.row_bytes),
        first_scale_(first * shape.blocks), scales_mask_(kCacheLine / bytes_of(w.scales) - 1) {}

  // Line start + offset of row `r` of kRows. `offset` is a constant; kAll is false near the row's end.
  template <int kRows, bool kAll>
  [[gnu::always_inline]] typename Base::template Line<kBits> line(int64_t start, int64_t offset,
                                                                  int r) const {
    // Each line of the cache once, but twice where a vector of blocks has less.
    if ((offset * kRows + r) * kVector % kCacheLine == 0)
      fetch_ahead<Reading>(data_ + ((start + offset) * kRows + r) * kVector);
    const uint8_t* from = data_ + r * shape_.row_bytes + (start + offset) * kVector;
    const bool is_full = kAll || start + offset < shape_.full_lines;
    return Base::template unpacked<kBits>(is_full ? Simd::load_once(from) : last_line(from));
  }

  template <int kRows>
  void fetch_scales(int64_t block, int r) const {
    // One vector of each cache line fetches it.
    const int64_t near = kRows * block + r * kLanes;
    if ((near & scales_mask_) == 0)
      fetch_into<Reading::kCache>(address_of(w_.scales, first_scale_ + near + kAheadBlocks));
  }
  // Those of the vector of blocks that begins with first + offset.
  Float scales(int64_t first, int64_t offset, int r) const {
    const int64_t block = first + offset, at = first_scale_ + r * shape_.blocks + block;
    return Base::load_scales(w_, shape_, at, shape_.blocks - block);
  }

  // What the products of a vector of blocks start from.
  static Int starts(const Activations& a, int64_t block) { return Simd::load(a.starts + block); }

 private:
  // Nothing is read behind the row.
  Int last_line(const uint8_t* from) const {
    alignas(64) uint8_t padded[kVector] = {};
    std::memcpy(padded, from, shape_.row_bytes - shape_.full_lines * kVector);
    return Simd::load(padded);
  }

  const QuantMatrix& w_;
  const Shape& shape_;
  const uint8_t* const data_;
  const int64_t first_scale_;
  const int64_t scales_mask_;  // of those in a line of the cache
};

// `Weights` is a class such as StoredLines; kRowsAtOnce of its rows are read side by side.
template <class Simd, class Weights, int kBits, int kBlockLanes, int kRowsAtOnce, int kDigits>
class QuantFew : QuantLayout<Simd> {
  using Base = QuantLayout<Simd>;
  using Base::kLanes;
  using typename Base::Float;
  using typename Base::Int;
  using typename Base::Shape;
  using Matrix = typename Weights::Matrix;

 public:
  // Columns [first, last) of y.
  static void stream(const Matrix& w, const Activations& a, int64_t first, int64_t last, float* y) {
    const Shape shape(Weights::layout(w));
    int64_t row = first;
    for (; row + kRowsAtOnce <= last; row += kRowsAtOnce)
      Rows<kRowsAtOnce>(w, shape, a, row).multiply(y + row);
    for (; row < last; ++row) Rows<1>(w, shape, a, row).multiply(y + row);
  }

 private:
  // kRows rows of weights from `first` on.
  template <int kRows>
  class Rows {
    static constexpr int kShare = kBlockLanes < kLanes ? kBlockLanes : kLanes;
    // A step is as many blocks as fill a line, or as many lines as hold a block; kShare of them have as
    // many blocks as a vector has lanes.
    static constexpr int64_t kStepLines = kBlockLanes / kShare, kVectorLines = kShare * kStepLines;
    static constexpr int kGroup = kShare < 4 ? kShare : 4, kGroups = kShare / kGroup;  // of steps
    static constexpr int64_t kLineCodes = Base::template kCodes<kBits>;
    static_assert(Base::template kFitsShort<kBits, kStepLines, kDigits>);
    // Vectors of blocks that a tile has, where it has several.
    static constexpr int kVectors =
        Weights::kTileLines > kVectorLines ? Weights::kTileLines / kVectorLines : 1;

   public:
    Rows(const Matrix& w, const Shape& shape, const Activations& a, int64_t first)
        : Rows(w, Weights::layout(w), shape, a, first) {}

    void multiply(float* y) const {
      Float sums[kRows];
      for (Float& sum : sums) sum = Simd::zero_float();
      int64_t block = 0, line = 0;
      for (; block < shape_.blocks; block += kVectors * kLanes, line += kVectors * kVectorLines)
        unrolled<kVectors>([&](auto vector) {
          if (vector == 0 || block + vector * kLanes < shape_.blocks)
            add<vector>(line, block, sums);
        });
      for (int r = 0; r < kRows; ++r) {
        const float sum = Simd::sum(sums[r]);
        y[r] = bias_ ? sum + bias_[r] : sum;
      }
    }

   private:
    static constexpr int kLast = kDigits - 1;  // whose numbers are those of both

    Rows(const Matrix& w, const QuantMatrix& layout, const Shape& shape, const Activations& a,
         int64_t first)
        : weights_(w, shape, first), shape_(shape), a_(a),
          zeros_(layout.zero_points ? layout.zero_points + first * shape.zero_point_bytes
                                    : nullptr),
          zeros_end_(layout.zero_points ? layout.zero_points + layout.rows * shape.zero_point_bytes
                                        : nullptr),
          bias_(layout.bias ? layout.bias + first : nullptr) {}

    // A vector of blocks, number kVector of those from `line` and block `first` on. There is one loop over
    // them: AMD's prefetchers know a stream by the load's place in the code.
    template <int kVector>
    [[gnu::always_inline]] void add(int64_t line, int64_t first, Float (&sums)[kRows]) const {
      const int64_t block = first + kVector * kLanes;
      Int dots[kRows];
      products<kVector * kVectorLines>(line, dots);
      const Int starts = Weights::starts(a_, block);
      const Float x_scales = Simd::load_float(a_.scales + block);
      for (int r = 0; r < kRows; ++r) {
        weights_.template fetch_scales<kRows>(block, r);
        Int dot = Simd::add(dots[r], starts);
        if (zeros_) {
          const uint8_t* zeros = zeros_ + r * shape_.zero_point_bytes + block * kBits / 8;
          const Int offsets =
              Base::template load_zero_point_offsets<kBits>(zeros, zeros_end_, shape_.blocks - block);
          dot = Simd::add(dot, Simd::times(offsets, Simd::load(a_.sums + block)));
        }
        const Float scales = Simd::mul(weights_.scales(first, kVector * kLanes, r), x_scales);
        sums[r] = Simd::fma(Simd::to_float(dot), scales, sums[r]);
      }
    }

    // The products with a vector of blocks, from line start + kOffset on.
    template <int64_t kOffset>
    [[gnu::always_inline]] void products(int64_t start, Int (&dots)[kRows]) const {
      constexpr int64_t kLines = kGroup * kStepLines;
      Int groups[kRows][kGroups];
      unrolled<kGroups>([&](auto g) {
        constexpr int64_t offset = kOffset + g * kLines;
        if (g > 0 && start + offset >= shape_.lines) {
          for (int r = 0; r < kRows; ++r) groups[r][g] = Simd::zero();
          return;
        }
        Int steps[kGroup][kRows];
        if (start + offset + kLines <= shape_.full_lines) {
          unrolled<kGroup>([&](auto i) { step<true>(start, offset + i * kStepLines, steps[i]); });
        } else {
          Int some[kGroup][kRows];  // steps[] stays in registers
          last_steps(start, offset, some);
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
    [[gnu::noinline]] void last_steps(int64_t start, int64_t offset,
                                      Int (&steps)[kGroup][kRows]) const {
#pragma GCC unroll 1
      for (int i = 0; i < kGroup; ++i) step<false>(start, offset + i * kStepLines, steps[i]);
    }

    // Those with the blocks of a line, or with the block of some lines, from start + offset on.
    template <bool kAll>
    [[gnu::always_inline]] void step(int64_t start, int64_t offset, Int (&dots)[kRows]) const {
      Int before[kRows];
      for (int r = 0; r < kRows; ++r) dots[r] = before[r] = Simd::zero();
      if (!kAll && start + offset >= shape_.lines) return;
      const int8_t* codes = a_.codes + (start + offset) * kDigits * kLineCodes;
      for (int64_t l = 0; l < kStepLines; ++l, codes += kDigits * kLineCodes)
        for (int r = 0; r < kRows; ++r) {
          const auto weights = weights_.template line<kRows, kAll>(start, offset + l, r);
          dots[r] = Base::template accumulate_line<kBits>(dots[r], weights, codes + kLast * kLineCodes);
          if (kDigits == 2) before[r] = Base::template accumulate_line<kBits>(before[r], weights, codes);
        }
      for (int r = 0; r < kRows; ++r) {
        const Int dot = Base::template end_block<kBits>(dots[r], Simd::zero());
        dots[r] = Base::template combine_digits<kDigits>(before[r], dot);
      }
    }

    const Weights weights_;
    const Shape& shape_;
    const Activations& a_;
    const uint8_t* const zeros_;  // or null
    const uint8_t* const zeros_end_;
    const float* const bias_;  // or null
  };
};

}  // namespace rgexport
