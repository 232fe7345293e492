// Few rows of activations: the weights stream by, as fast as memory gives them.
#pragma once

#include "quant_layout.h"

namespace rgexport {

template <class Simd>
class QuantFew : QuantLayout<Simd> {
  using Base = QuantLayout<Simd>;
  using Base::kCacheLine;
  using Base::kLanes;
  using Base::kVector;
  using Base::load_some;
  using Base::zero_offsets;
  using typename Base::Float;
  using typename Base::Int;
  using typename Base::Shape;
  static constexpr int64_t kAhead = 8192;  // bytes that the weights are prefetched by

 public:
  // Columns [first, last) of y, where kBlockLanes lanes of lines share a scale.
  template <int kBits, int kBlockLanes>
  static void stream(const QuantMatrix& w, const Activations& a, int64_t first, int64_t last,
                     float* y) {
    constexpr int kRows = 2;  // more are read from too many places at once
    const Shape shape(w);
    int64_t row = first;
    for (; row + kRows <= last; row += kRows)
      for (int64_t m = 0; m < a.count; ++m)
        Rows<kBits, kBlockLanes, kRows>(w, shape, a, m, row).multiply(y + m * w.rows + row);
    for (; row < last; ++row)
      for (int64_t m = 0; m < a.count; ++m)
        Rows<kBits, kBlockLanes, 1>(w, shape, a, m, row).multiply(y + m * w.rows + row);
  }

 private:
  // kRows rows of weights from `first` on, times one row of activations.
  template <int kBits, int kBlockLanes, int kRows>
  class Rows {
    static constexpr int kShare = kBlockLanes < kLanes ? kBlockLanes : kLanes;
    // A step is as many blocks as fill a line, or as many lines as hold a block.
    static constexpr int64_t kStepBlocks = kLanes / kShare, kStepLines = kBlockLanes / kShare;
    static constexpr int64_t kLineCodes = Base::template kCodes<kBits>;

   public:
    Rows(const QuantMatrix& w, const Shape& shape, const Activations& a, int64_t index,
         int64_t first)
        : w_(w),
          shape_(shape),
          first_(first),
          data_(w.data + first * shape.row_bytes),
          scales_(w.scales + first * shape.blocks),
          codes_(a.codes + index * a.stride),
          starts_(a.lane_starts + index * (shape.lines * kLanes)),
          x_scales_(a.scales + index * a.blocks),
          x_sums_(a.sums + index * a.blocks) {}

    void multiply(float* y) {
      for (Float& sum : sums_) sum = Simd::zero_float();
      const int64_t steps = shape_.full_lines / kStepLines;
      int64_t block = 0, step = 0;
      for (; step + kShare <= steps; step += kShare, block += kLanes) some(block, step, kShare);
      if (block < shape_.blocks) some(block, step, steps - step);
      for (int r = 0; r < kRows; ++r) {
        float sum = Simd::sum(sums_[r]);
        if (shape_.lines > shape_.full_lines) sum += last_line(r);
        y[r] = sum + (w_.bias ? w_.bias[first_ + r] : 0.0f);
      }
    }

   private:
    // A vector of blocks from `block` on, and the steps of them that are whole.
    [[gnu::always_inline]] void some(int64_t block, int64_t step, int64_t steps) {
      alignas(64) float products[kRows][kLanes];
      scale(block, products);
      const uint8_t* data = data_ + step * kStepLines * kVector;
      const uint8_t* ahead = data_ + step * kStepLines * kVector * kRows + kAhead;
      const int8_t* codes = codes_ + step * kStepLines * kLineCodes;
#pragma GCC unroll 4
      for (int64_t i = 0; i < steps; ++i) {
        for (int64_t byte = 0; byte < kRows * kStepLines * kVector; byte += kCacheLine)
          Simd::prefetch(ahead + i * kRows * kStepLines * kVector + byte);
        Int dots[kRows];
        for (Int& dot : dots) dot = Simd::load(starts_ + (step + i) * kLanes);
        for (int64_t l = 0; l < kStepLines; ++l)
          for (int r = 0; r < kRows; ++r)
            dots[r] = line_dot(dots[r],
                               Simd::load(data + r * shape_.row_bytes +
                                          (i * kStepLines + l) * kVector),
                               codes + (i * kStepLines + l) * kLineCodes);
        for (int r = 0; r < kRows; ++r)
          sums_[r] = Simd::fma(Simd::to_float(dots[r]),
                               Simd::template spread<kShare>(products[r] + i * kStepBlocks),
                               sums_[r]);
      }
    }

    // Products of the scales of a vector of blocks; takes from the sums what the blocks' own zero
    // points are beside the middle.
    [[gnu::always_inline]] void scale(int64_t block, float (&products)[kRows][kLanes]) {
      const int64_t left = shape_.blocks - block;
      const int64_t ahead = (kRows + kAhead / shape_.row_bytes) * shape_.blocks;
      const Float x_scales = Simd::load_float(x_scales_ + block);
      for (int r = 0; r < kRows; ++r) {
        const float* scales = scales_ + r * shape_.blocks + block;
        Simd::prefetch(scales + ahead);
        const Float product = Simd::mul(load_some(scales, left), x_scales);
        Simd::store_float(products[r], product);
        if (!w_.zero_points) continue;
        const Float x_sums = Simd::to_float(Simd::load(x_sums_ + block));
        const Float zeros = Simd::mul(product, zero_offsets(w_, first_ + r, block, left));
        sums_[r] = Simd::fma(zeros, Simd::negative(x_sums), sums_[r]);
      }
    }

    // One line of weights times the activations that it meets: a sum for each lane.
    static Int line_dot(Int start, Int weights, const int8_t* codes) {
      if constexpr (kBits == 8) {
        if constexpr (Simd::kSignedBytes) weights = Simd::flip_sign(weights);
        return Simd::dot(start, weights, Simd::load(codes));
      } else {
        const Int low = Simd::dot(start, Simd::low_half(weights), Simd::load(codes));
        return Simd::dot(low, Simd::high_half(weights), Simd::load(codes + kVector));
      }
    }

    // The part of a row behind its last whole line, lane by lane: nothing is read behind the row.
    float last_line(int r) const {
      alignas(64) uint8_t data[kVector] = {};
      alignas(64) int32_t dots[kLanes];
      const int64_t done = shape_.full_lines * kVector, left = shape_.row_bytes - done;
      std::memcpy(data, data_ + r * shape_.row_bytes + done, left);
      const int8_t* codes = codes_ + shape_.full_lines * kLineCodes;
      const Int start = Simd::load(starts_ + shape_.full_lines * kLanes);
      Simd::store(dots, line_dot(start, Simd::load(data), codes));
      float sum = 0;
      for (int64_t lane = 0; lane < left / 4; ++lane) {
        const int64_t block = (shape_.full_lines * kLanes + lane) / kBlockLanes;
        sum += static_cast<float>(dots[lane]) *
               (scales_[r * shape_.blocks + block] * x_scales_[block]);
      }
      return sum;
    }

    const QuantMatrix& w_;
    const Shape& shape_;
    const int64_t first_;
    const uint8_t* const data_;
    const float* const scales_;
    const int8_t* const codes_;
    const int32_t* const starts_;
    const float* const x_scales_;
    const int32_t* const x_sums_;
    Float sums_[kRows];
  };
};

}  // namespace rgexport
