// One row of activations: the weights stream by, as fast as memory gives them.
#pragma once

#include "quant_layout.h"
#include "reading.h"

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
  // Columns [first, last) of y, where kBlockLanes lanes of lines share a scale.
  template <int kBits, int kBlockLanes, int kDigits>
  static void stream(const QuantMatrix& w, const Activations& a, int64_t first, int64_t last,
                     float* y) {
    constexpr int kRows = Reading::kRows;
    const Shape shape(w);
    int64_t row = first;
    for (; row + kRows <= last; row += kRows)
      multiply<kBits, kBlockLanes, kRows, kDigits>(w, shape, a, row, y);
    for (; row < last; ++row) multiply<kBits, kBlockLanes, 1, kDigits>(w, shape, a, row, y);
  }

 private:
  // kRows rows of weights times each row of x, of whose digits the last has what goes with both.
  template <int kBits, int kBlockLanes, int kRows, int kDigits>
  [[gnu::always_inline]] static void multiply(const QuantMatrix& w, const Shape& shape,
                                              const Activations& a, int64_t row, float* y) {
    y += row;
    for (int64_t m = 0; m < a.count / kDigits; ++m, y += w.rows)
      Rows<kBits, kBlockLanes, kRows, kDigits>(w, shape, a, m, row).multiply(y);
  }

  // kRows rows of weights from `first` on, times row m of x.
  template <int kBits, int kBlockLanes, int kRows, int kDigits>
  class Rows {
    static constexpr int kShare = kBlockLanes < kLanes ? kBlockLanes : kLanes;
    // A step is as many blocks as fill a line, or as many lines as hold a block.
    static constexpr int64_t kStepBlocks = kLanes / kShare, kStepLines = kBlockLanes / kShare;
    static constexpr int64_t kLineCodes = Base::template kCodes<kBits>;
    static_assert(Base::template kFits<kBits, kStepLines, kDigits>);
    // Scales are prefetched with the data that they belong to.
    static constexpr int64_t kAheadBlocks = kReadAhead / (4 * kBlockLanes);

   public:
    Rows(const QuantMatrix& w, const Shape& shape, const Activations& a, int64_t m, int64_t first)
        : w_(w),
          shape_(shape),
          a_(a),
          m_(m),
          first_(first),
          data_(w.data + first * shape.row_bytes),
          first_scale_(first * shape.blocks),
          zeros_(w.zero_points ? w.zero_points + first * shape.zero_point_bytes : nullptr),
          zeros_end_(w.zero_points ? w.zero_points + w.rows * shape.zero_point_bytes : nullptr),
          scales_mask_(kCacheLine / bytes_of(w.scales) - 1),
          codes_(a.codes + last_digit() * a.stride),
          starts_(a.starts + last_digit() * a.start_count),
          x_scales_(a.scales + last_digit() * a.blocks),
          x_sums_(a.sums + last_digit() * a.blocks) {}

    void multiply(float* y) const {
      const int64_t steps = shape_.full_lines / kStepLines;
      Float sums[kRows];
      for (Float& sum : sums) sum = Simd::zero_float();
      alignas(64) float products[kRows][kLanes];
      int64_t left = shape_.blocks;
      for (int64_t step = 0; left > 0; step += kShare, left -= kLanes) {
        scale(left, products, sums);
        add_steps(step, steps < step + kShare ? steps : step + kShare, products, sums);
      }
      for (int r = 0; r < kRows; ++r) {
        float sum = Simd::sum(sums[r]);
        if (shape_.lines > shape_.full_lines)
          sum += Base::template last_line<kBits, kBlockLanes, kDigits>(w_, shape_, a_, m_, first_ + r);
        y[r] = sum + (w_.bias ? w_.bias[first_ + r] : 0.0f);
      }
    }

   private:
    int64_t last_digit() const { return (m_ + 1) * kDigits - 1; }  // which has what goes with both

    // Whole steps [from, to) of one vector of blocks, with the products of its scales. In one loop,
    // however many there are: AMD's prefetchers know a stream by the load's place in the code, and
    // lose a tenth of the speed where one place is two. Unrolled for small blocks only, whose
    // arithmetic takes longer than reading.
    [[gnu::always_inline]] void add_steps(int64_t from, int64_t to,
                                          const float (&products)[kRows][kLanes],
                                          Float (&sums)[kRows]) const {
      const uint8_t* data = data_ + from * kStepLines * kVector;
      const uint8_t* here = data_ + from * kStepLines * kVector * kRows;
      const int8_t* codes = codes_ + from * kStepLines * kLineCodes;
      const int32_t* starts = starts_ + from * kLanes;
      const auto step = [&](int64_t i) {
        const Int start = Simd::load(starts + i * kLanes);
        Int dots[kRows], before[kRows];
        for (Int& dot : dots) dot = Base::template open<kBits>(start);
        for (Int& dot : before) dot = Simd::zero();
        for (int64_t l = i * kStepLines; l < (i + 1) * kStepLines; ++l)
          for (int r = 0; r < kRows; ++r) {
            const int64_t at = (l * kRows + r) * kVector;
            if (at % kCacheLine == 0) fetch_ahead(here + at);
            const auto line =
                Base::template unpack<kBits>(data + r * shape_.row_bytes + l * kVector);
            const int8_t* met = codes + l * kLineCodes;
            dots[r] = Base::template line_dot<kBits>(dots[r], line, met);
            if (kDigits == 2)
              before[r] = Base::template line_dot<kBits>(before[r], line, met - a_.stride);
          }
        for (int r = 0; r < kRows; ++r) {
          const Int dot = Base::template close<kBits>(dots[r], start);
          sums[r] = Simd::fma(Simd::to_float(Base::template both<kDigits>(before[r], dot)),
                              Simd::template spread<kShare>(products[r] + i * kStepBlocks),
                              sums[r]);
        }
      };
      if constexpr (kStepBlocks > 1) {
#pragma GCC unroll 2
        for (int64_t i = 0; i < to - from; ++i) step(i);
      } else {
#pragma GCC unroll 1
        for (int64_t i = 0; i < to - from; ++i) step(i);
      }
    }

    // Products of the scales of a vector of blocks, of which `left` are there; takes from the sums
    // what the blocks' own zero points are beside the middle.
    [[gnu::always_inline]] void scale(int64_t left, float (&products)[kRows][kLanes],
                                      Float (&sums)[kRows]) const {
      const int64_t block = shape_.blocks - left;
      const Float x_scales = Simd::load_float(x_scales_ + block);
      const Float x_sums = Simd::negative(Simd::to_float(Simd::load(x_sums_ + block)));
      for (int r = 0; r < kRows; ++r) {
        // One vector of each cache line fetches it.
        const int64_t near = kRows * block + r * kLanes;
        if ((near & scales_mask_) == 0)
          fetch_into<Reading::kCache>(address_of(w_.scales, first_scale_ + near + kAheadBlocks));
        const int64_t at = first_scale_ + r * shape_.blocks + block;
        const Float scales = Base::scales_of(w_, shape_, at, left);
        const Float product = Simd::mul(scales, x_scales);
        Simd::store_float(products[r], product);
        if (!zeros_) continue;
        const uint8_t* zeros = zeros_ + r * shape_.zero_point_bytes + block * kBits / 8;
        const Float offsets = Base::template zero_offsets<kBits>(zeros, zeros_end_, left);
        sums[r] = Simd::fma(Simd::mul(product, offsets), x_sums, sums[r]);
      }
    }

    static void fetch_ahead(const uint8_t* here) {
      if constexpr (Reading::kNear > 0) fetch_into<Cache::kL1>(here + Reading::kNear);
      fetch_into<Reading::kCache>(here + kReadAhead);
    }

    const QuantMatrix& w_;
    const Shape& shape_;
    const Activations& a_;
    const int64_t m_, first_;
    const uint8_t* const data_;
    const int64_t first_scale_;
    const uint8_t* const zeros_;  // or null
    const uint8_t* const zeros_end_;
    const int64_t scales_mask_;  // of those in a line of the cache
    const int8_t* const codes_;
    const int32_t* const starts_;
    const float* const x_scales_;
    const int32_t* const x_sums_;
  };
};

}  // namespace rgexport
