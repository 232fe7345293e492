// Few rows of activations: the weights stream by, as fast as memory gives them.
#pragma once

#include "quant_layout.h"

namespace rgexport {

template <class Simd>
class QuantFew : QuantLayout<Simd> {
  using Base = QuantLayout<Simd>;
  using Base::kLanes;
  using Base::kVector;
  using Base::load_some;
  using Base::zero_offsets;
  using typename Base::Float;
  using typename Base::Int;
  using typename Base::Shape;
  static constexpr int64_t kAhead = 8192;  // bytes that the weights are prefetched by

 public:
  // Columns [first, last) of y, where kShare lanes of a line share a scale.
  template <int kBits, int kShare>
  static void stream(const QuantMatrix& w, const Activations& a, int64_t first, int64_t last,
                     float* y) {
    constexpr int kRows = 2;  // more are read from too many places at once
    const Shape shape(w);
    int64_t row = first;
    for (; row + kRows <= last; row += kRows)
      for (int64_t m = 0; m < a.count; ++m)
        Stream<kBits, kShare>::template rows<kRows>(w, shape, a, m, row, y + m * w.rows + row);
    for (; row < last; ++row)
      for (int64_t m = 0; m < a.count; ++m)
        Stream<kBits, kShare>::template rows<1>(w, shape, a, m, row, y + m * w.rows + row);
  }

 private:
  // One line of weights times the activations that it meets: a sum for each lane.
  template <int kBits>
  static Int line_dot(Int start, Int weights, const int8_t* codes) {
    if constexpr (kBits == 8) {
      if constexpr (Simd::kSignedBytes) weights = Simd::flip_sign(weights);
      return Simd::dot(start, weights, Simd::load(codes));
    } else {
      const Int low = Simd::dot(start, Simd::low_half(weights), Simd::load(codes));
      return Simd::dot(low, Simd::high_half(weights), Simd::load(codes + kVector));
    }
  }

  template <int kBits, int kShare>
  struct Stream {
    static constexpr int64_t kLineCodes = Base::template kCodes<kBits>;

    // Products of scales that a segment of a row needs, each in L1 for one use.
    static constexpr int64_t kSegment = 256;  // blocks

    static void multiply(const float* scales, const float* x_scales, int64_t count, int64_t ahead,
                         float* products) {
      for (int64_t b = 0; b < count; b += kLanes) {
        Simd::prefetch(scales + b + ahead);
        const Float product =
            Simd::mul(load_some(scales + b, count - b), Simd::load_float(x_scales + b));
        Simd::store_float(products + b, product);
      }
    }

    // kRows rows of weights from `first` on, times one row of activations.
    template <int kRows>
    static void rows(const QuantMatrix& w, const Shape& shape, const Activations& a, int64_t index,
                     int64_t first, float* y) {
      alignas(64) float products[kRows][kSegment];  // the first `count` are set
      const uint8_t* data = w.data + first * shape.row_bytes;
      const float* scales = w.scales + first * shape.blocks;
      const int8_t* codes = a.codes + index * a.stride;
      const int32_t* starts = a.lane_starts + index * (shape.lines * kLanes);
      const float* x_scales = a.scales + index * a.blocks;
      const int64_t per_line = kLanes / kShare, per_block = kShare < kLanes ? 1 : shape.per_block;
      const int64_t blocks = kShare < kLanes ? shape.full_lines * per_line : shape.blocks;
      const uint8_t* ahead = data + kAhead;
      const int64_t ahead_rows = kRows + kAhead / shape.row_bytes;
      Float sums[kRows];
      for (int r = 0; r < kRows; ++r) sums[r] = Simd::zero_float();
      for (int64_t block = 0; block < blocks; block += kSegment) {
        const int64_t count = blocks - block < kSegment ? blocks - block : kSegment;
        for (int r = 0; r < kRows; ++r)
          multiply(scales + r * shape.blocks + block, x_scales + block, count,
                   ahead_rows * shape.blocks, products[r]);
        for (int64_t b = 0; b < count; b += per_line) {
          Int dots[kRows];
          for (int r = 0; r < kRows; ++r) dots[r] = Simd::zero();
          for (int64_t l = 0; l < per_block; ++l) {
            const Int start = Simd::load(starts);
            for (int r = 0; r < kRows; ++r) {
              Simd::prefetch(ahead + r * kVector);
              const Int weights = Simd::load(data + r * shape.row_bytes);
              dots[r] = line_dot<kBits>(Simd::add(dots[r], start), weights, codes);
            }
            data += kVector, ahead += kRows * kVector, codes += kLineCodes, starts += kLanes;
          }
          for (int r = 0; r < kRows; ++r)
            sums[r] = Simd::fma(Simd::to_float(dots[r]),
                                Simd::template spread<kShare>(products[r] + b), sums[r]);
        }
      }
      for (int r = 0; r < kRows; ++r) {
        if (w.zero_points) sums[r] = take_zeros(sums[r], w, shape, a, index, first + r);
        float sum = Simd::sum(sums[r]);
        if (shape.lines > shape.full_lines) sum += last_line(w, shape, a, index, first + r);
        y[r] = sum + (w.bias ? w.bias[first + r] : 0.0f);
      }
    }

    // The part of a row behind its last whole line, lane by lane: nothing is read behind the row.
    static float last_line(const QuantMatrix& w, const Shape& shape, const Activations& a,
                           int64_t index, int64_t row) {
      alignas(64) uint8_t data[kVector] = {};
      alignas(64) int32_t dots[kLanes];
      const int64_t done = shape.full_lines * kVector, left = shape.row_bytes - done;
      std::memcpy(data, w.data + row * shape.row_bytes + done, left);
      const Int start =
          Simd::load(a.lane_starts + index * (shape.lines * kLanes) + shape.full_lines * kLanes);
      const int8_t* codes = a.codes + index * a.stride + shape.full_lines * kLineCodes;
      Simd::store(dots, line_dot<kBits>(start, Simd::load(data), codes));
      const float* scales = w.scales + row * shape.blocks;
      const float* x_scales = a.scales + index * a.blocks;
      float sum = 0;
      for (int64_t lane = 0; lane < left / 4; ++lane) {
        const int64_t block = (shape.full_lines * kLanes + lane) / (w.block * kBits / 32);
        sum += static_cast<float>(dots[lane]) * (scales[block] * x_scales[block]);
      }
      return sum;
    }
  };

  // `sums`, whose lanes are to be added up, less Σ_b s_w · z · s_x · Σ x̂ of a row.
  static Float take_zeros(Float sums, const QuantMatrix& w, const Shape& shape,
                          const Activations& a, int64_t index, int64_t row) {
    const float* scales = w.scales + row * shape.blocks;
    const float* x_scales = a.scales + index * a.blocks;
    const int32_t* x_sums = a.sums + index * a.blocks;
    for (int64_t b = 0; b < shape.blocks; b += kLanes) {
      const int64_t left = shape.blocks - b;
      const Float scale = Simd::mul(load_some(scales + b, left), Simd::load_float(x_scales + b));
      const Float x_sum = Simd::to_float(Simd::load(x_sums + b));
      const Float offsets = Simd::mul(scale, zero_offsets(w, row, b, left));
      sums = Simd::fma(offsets, Simd::negative(x_sum), sums);
    }
    return sums;
  }
};

}  // namespace rgexport
