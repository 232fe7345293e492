// Several rows of activations, such as conversations or a few tokens of one: weights are read from memory
// once, and unpacked for kTogether rows at a time.
//
// A row gives what it gives alone, see quant_few.h, to the last bit: the same numbers are added in the
// same order.
#pragma once

#include "quant_layout.h"
#include "reading.h"
#include "unrolled.h"

namespace rgexport {

template <class Simd>
class QuantSeveral : QuantLayout<Simd> {
  using Base = QuantLayout<Simd>;
  using Base::kLanes;
  using Base::kVector;
  using typename Base::Float;
  using typename Base::Int;
  using typename Base::Shape;
  static constexpr int kRows = Simd::kWeightRows;
  static constexpr int kTogether = Simd::kTogether;
  // Vectors of blocks at a time: what they meet of the activations stays in L1, or in L2 where blocks
  // are large.
  static constexpr int kVectors = 2;
  static constexpr int64_t kBlocks = kVectors * kLanes;

 public:
  static constexpr int64_t kMost = Simd::kMostSeveral;  // rows of x

  // Columns [first, last) of y, where kBlockLanes lanes of lines share a scale.
  template <int kBits, int kBlockLanes, int kDigits>
  static void stream(const QuantMatrix& w, const Activations& a, int64_t first, int64_t last,
                     float* y) {
    const Shape shape(w);
    for (int64_t row = first; row < last; row += kRows) {
      const int64_t rows = last - row < kRows ? last - row : kRows;
      Rows<kBits, kBlockLanes, kDigits>(w, shape, a, row, rows).multiply(y + row);
    }
  }

 private:
  // Rows of weights from `first` on: kRows, of which the last may be one row several times.
  template <int kBits, int kBlockLanes, int kDigits>
  class Rows {
    static constexpr int kShare = kBlockLanes < kLanes ? kBlockLanes : kLanes;
    // A step is as many blocks as fill a line, or as many lines as hold a block.
    static constexpr int64_t kStepBlocks = kLanes / kShare, kStepLines = kBlockLanes / kShare;
    static constexpr int64_t kLineCodes = Base::template kCodes<kBits>;
    static_assert(Base::template kFits<kBits, kStepLines, kDigits>);

   public:
    Rows(const QuantMatrix& w, const Shape& shape, const Activations& a, int64_t first, int64_t rows)
        : w_(w), shape_(shape), a_(a), first_(first), rows_(rows) {}

    void multiply(float* y) {
      const int64_t count = a_.count / kDigits;
      for (int64_t m = 0; m < count; ++m)
        for (int r = 0; r < kRows; ++r) sums_[m][r] = Simd::zero_float();
      for (int64_t block = 0; block < shape_.blocks; block += kBlocks) {
        scale(block);
        add<kTogether>(block, 0, count);
      }
      for (int64_t m = 0; m < count; ++m)
        for (int64_t r = 0; r < rows_; ++r) {
          float sum = Simd::sum(sums_[m][r]);
          if (shape_.lines > shape_.full_lines)
            sum += Base::template last_line<kBits, kBlockLanes, kDigits>(w_, shape_, a_, m,
                                                                         first_ + r);
          y[m * w_.rows + r] = sum + (w_.bias ? w_.bias[first_ + r] : 0.0f);
        }
    }

   private:
    int64_t row(int r) const { return first_ + (r < rows_ ? r : rows_ - 1); }

    // The scales of some blocks, and what zero points are beside the middle, for all rows of x.
    void scale(int64_t block) {
      for (int r = 0; r < kRows; ++r)
        for (int64_t b = 0; b < kBlocks && block + b < shape_.blocks; b += kLanes) {
          const int64_t left = shape_.blocks - block - b, at = row(r) * shape_.blocks + block + b;
          fetch_into<Cache::kL2>(address_of(w_.scales, at + kReadAhead / (4 * kBlockLanes)));
          Simd::store_float(scales_[r] + b, Base::scales_of(w_, shape_, at, left));
          if (!w_.zero_points) continue;
          const uint8_t* from =
              w_.zero_points + row(r) * shape_.zero_point_bytes + (block + b) * kBits / 8;
          const uint8_t* end = w_.zero_points + w_.rows * shape_.zero_point_bytes;
          Simd::store_float(offsets_[r] + b, Base::template zero_offsets<kBits>(from, end, left));
        }
    }

    // The rows of x from number m on times some blocks.
    template <int kCount>
    void add(int64_t block, int64_t m, int64_t count) {
      for (; m + kCount <= count; m += kCount) add_rows<kCount>(block, m);
      if constexpr (kCount > 1) add<kCount / 2>(block, m, count);
    }

    template <int kCount>
    [[gnu::noinline]] void add_rows(int64_t block, int64_t m) {
      // The last digit has what goes with both.
      const int64_t index = (m + 1) * kDigits - 1;
      const float* x_scales = a_.scales + index * a_.blocks;
      const int32_t* x_sums = a_.sums + index * a_.blocks;
      const int64_t x_blocks = kDigits * a_.blocks;
      const bool zeros = w_.zero_points;
      Float sums[kCount][kRows];
      each<kCount>([&](auto c, auto r) { sums[c][r] = sums_[m + c][r]; });
      for (int64_t b = 0; b < kBlocks && block + b < shape_.blocks; b += kLanes) {
        alignas(64) float products[kCount][kRows][kLanes];
        unrolled<kCount>([&](auto c) {
          const int64_t at = c * x_blocks + block + b;
          const Float x_scale = Simd::load_float(x_scales + at);
          Float x_sum = Simd::zero_float();
          if (zeros) x_sum = Simd::negative(Simd::to_float(Simd::load(x_sums + at)));
          unrolled<kRows>([&](auto r) {
            const Float product = Simd::mul(Simd::load_float(scales_[r] + b), x_scale);
            Simd::store_float(products[c][r], product);
            if (zeros)
              sums[c][r] = Simd::fma(Simd::mul(product, Simd::load_float(offsets_[r] + b)), x_sum,
                                     sums[c][r]);
          });
        });
        add_steps<kCount>((block + b) / kStepBlocks, index, products, sums);
      }
      each<kCount>([&](auto c, auto r) { sums_[m + c][r] = sums[c][r]; });
    }

    // The whole steps of a vector of blocks, from number `step` on.
    template <int kCount>
    [[gnu::always_inline]] void add_steps(int64_t step, int64_t index,
                                          const float (&products)[kCount][kRows][kLanes],
                                          Float (&sums)[kCount][kRows]) const {
      const int64_t all = shape_.full_lines / kStepLines - step;
      const int64_t steps = all < kShare ? all : kShare;
      const uint8_t* data[kRows];
      unrolled<kRows>([&](auto r) {
        data[r] = w_.data + row(r) * shape_.row_bytes + step * kStepLines * kVector;
      });
      const int8_t* codes = a_.codes + index * a_.stride + step * kStepLines * kLineCodes;
      const int32_t* starts = a_.starts + index * a_.start_count + step * kLanes;
      const int64_t code_stride = kDigits * a_.stride, start_stride = kDigits * a_.start_count;
      for (int64_t i = 0; i < steps; ++i, starts += kLanes) {
        Int dots[kCount][kRows], before[kCount][kRows];
        each<kCount>([&](auto c, auto r) {
          dots[c][r] = Base::template open<kBits>(Simd::load(starts + c * start_stride));
          before[c][r] = Simd::zero();
        });
        for (int64_t l = 0; l < kStepLines; ++l, codes += kLineCodes) {
          typename Base::template Line<kBits> line[kRows];
          unrolled<kRows>([&](auto r) {
            fetch_into<Cache::kL1>(data[r] + 2048);
            fetch_into<Cache::kL2>(data[r] + kReadAhead);
            line[r] = Base::template unpack<kBits>(data[r]);
            data[r] += kVector;
          });
          unrolled<kCount>([&](auto c) {
            const int8_t* here = codes + c * code_stride;
            const auto x = Base::template load_codes<kBits>(here);
            unrolled<kRows>([&](auto r) {
              dots[c][r] = Base::template line_dot<kBits>(dots[c][r], line[r], x);
            });
            if constexpr (kDigits == 2) {
              const auto x_before = Base::template load_codes<kBits>(here - a_.stride);
              unrolled<kRows>([&](auto r) {
                before[c][r] = Base::template line_dot<kBits>(before[c][r], line[r], x_before);
              });
            }
          });
        }
        each<kCount>([&](auto c, auto r) {
          const Int dot = Base::template close<kBits>(dots[c][r], Simd::load(starts + c * start_stride));
          const Float scale = Simd::template spread<kShare>(products[c][r] + i * kStepBlocks);
          sums[c][r] = Simd::fma(
              Simd::to_float(Base::template both<kDigits>(before[c][r], dot)), scale, sums[c][r]);
        });
      }
    }

    // body(c, r) for each of some rows of x, and each row of weights.
    template <int kCount, class Body>
    [[gnu::always_inline]] static void each(const Body& body) {
      unrolled<kCount>([&](auto c) { unrolled<kRows>([&](auto r) { body(c, r); }); });
    }

    const QuantMatrix& w_;
    const Shape& shape_;
    const Activations& a_;
    const int64_t first_, rows_;
    Float sums_[kMost][kRows];
    alignas(64) float scales_[kRows][kBlocks], offsets_[kRows][kBlocks];
  };
};

}  // namespace rgexport
