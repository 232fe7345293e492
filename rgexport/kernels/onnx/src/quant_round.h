// Rounds activations to int8, a scale for each row and block of weights.
#pragma once

#include <cmath>

#include "quant_layout.h"

namespace rgexport {

template <class Simd>
class QuantRound : QuantLayout<Simd> {
  using Base = QuantLayout<Simd>;
  using Base::kLanes;
  using Base::kVector;
  using Base::parts;
  using typename Base::Float;
  static constexpr int64_t kMostCodes = 2 * kVector;  // of a line

 public:
  static void round(const QuantMatrix& w, const float* x, const Activations& a, int64_t index) {
    int8_t* codes = a.codes + index * a.stride;
    float* scales = a.scales + index * a.blocks;
    int32_t* sums = a.sums + index * a.blocks;
    const int64_t line_columns = kVector * parts(w),
                  step = w.block > line_columns ? line_columns : w.block;
    const auto whole_step = step_of(step);
    std::memset(codes, 0, a.stride);
    for (int64_t b = 0; b < a.blocks; ++b) scales[b] = 0, sums[b] = 0;
    for (int64_t b = 0; b < w.blocks(); ++b) {
      const int64_t first = b * w.block;
      const int64_t count = w.columns - first < w.block ? w.columns - first : w.block;
      const float most = absmax(x + first, count);
      scales[b] = most / 127.0f;
      const float inverse = most > 0 ? 127.0f / most : 0.0f;
      int64_t at = 0;
      for (; at + step <= count; at += step)
        sums[b] += whole_step(w, x + first + at, inverse, first + at, codes);
      if (at < count)
        sums[b] += round_step(w, x + first + at, count - at, step, inverse, first + at, codes);
    }
  }

 private:
  static float absmax(const float* x, int64_t count) {
    Float lanes = Simd::zero_float();
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) lanes = Simd::max_size(lanes, Simd::load_float(x + i));
    float most = Simd::max(lanes);
    for (; i < count; ++i) most = std::fmax(most, std::fabs(x[i]));
    return most;
  }

  // Rounds `count` columns, from `column` on, and puts the codes of `step` of them in their places.
  [[gnu::always_inline]] static inline int32_t round_step(const QuantMatrix& w, const float* x,
                                                          int64_t count, int64_t step,
                                                          float inverse, int64_t column,
                                                          int8_t* codes) {
    alignas(64) int8_t natural[kMostCodes];
    if (count < step) std::memset(natural, 0, step);
    const int32_t sum = round_codes(x, count, inverse, natural);
    place(w, natural, step, column, codes);
    return sum;
  }

  // The same for a whole step, whose length the compiler knows.
  template <int64_t kStep>
  static int32_t round_whole(const QuantMatrix& w, const float* x, float inverse, int64_t column,
                             int8_t* codes) {
    return round_step(w, x, kStep, kStep, inverse, column, codes);
  }

  template <int64_t kStep = kMostCodes>
  static auto step_of(int64_t step) {
    if constexpr (kStep > 16) {
      if (step < kStep) return step_of<kStep / 2>(step);
    }
    return round_whole<kStep>;
  }

  // Nearest integers, halves to even: what adding 1.5 · 2^23 leaves in the low bits.
  [[gnu::always_inline]] static inline int32_t round_codes(const float* x, int64_t count,
                                                           float inverse, int8_t* codes) {
    constexpr float kMagic = 12582912.0f;
    if (count > kMostCodes) __builtin_unreachable();
    int32_t sum = 0;
    for (int64_t i = 0; i < count; ++i) {
      const float shifted = x[i] * inverse + kMagic;
      int32_t bits;
      std::memcpy(&bits, &shifted, 4);
      const int32_t code = bits - 0x4B400000;
      codes[i] = static_cast<int8_t>(code);
      sum += code;
    }
    return sum;
  }

  // Puts codes of consecutive columns where the unpacked weights will be.
  [[gnu::always_inline]] static inline void place(const QuantMatrix& w, const int8_t* natural,
                                                  int64_t count, int64_t column, int8_t* codes) {
    if (w.bits == 8) {
      std::memcpy(codes + column, natural, count);
      return;
    }
    const int64_t line = column / (2 * kVector), within = column % (2 * kVector) / 2;
    int8_t* even = codes + line * 2 * kVector + within;
    int8_t* odd = even + kVector;
    for (int64_t i = 0; i < count / 2; ++i) {
      even[i] = natural[2 * i];
      odd[i] = natural[2 * i + 1];
    }
  }
};

}  // namespace rgexport
