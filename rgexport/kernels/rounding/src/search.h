// Scales by clip search: the least squared error among fractions of the scale of the extremes.
//
// Each lane has a block of its own, so that its errors are summed in the order of its weights.
#pragma once

#include "kernels.h"
#include "numbers.h"

namespace rgexport {
namespace {

// Fractions that are tried, from first to last; with 8 bits little is won far from 1.
constexpr int kFractions = 32;
constexpr int kRefits = 3;

inline float fraction(int bits, int i) {
  const float first = bits == 8 ? 0.9f : 0.5f, last = 1.12f;
  return first + (last - first) * i / (kFractions - 1);
}

using Lanes = float[kLanes];

// A scale and a zero point for each lane.
struct Candidate {
  Lanes scale, zero;
};

// Blocks side by side: `w` [size, kLanes]; `h` weighs the squared errors.
class Blocks {
 public:
  Blocks(const float* w, const float* h, int64_t size, int bits, bool half)
      : w_(w), h_(h), size_(size), top_((1 << bits) - 1.0f), half_(half) {}

  void start(const Candidate& first) {
    best_ = first;
    Lanes errors[1];
    measure<1>(&first, errors);
    for (int i = 0; i < kLanes; ++i) least_[i] = errors[0][i];
  }

  // Takes the candidates of less error that can be stored, each in its lanes; returns how many.
  template <int kCount>
  int attempt(Candidate* candidates) {
    Lanes errors[kCount];
    if (half_)
      for (int c = 0; c < kCount; ++c)
        for (int i = 0; i < kLanes; ++i)
          candidates[c].scale[i] = nearest_half(candidates[c].scale[i]);
    measure<kCount>(candidates, errors);
    int taken = 0;
    const float most = half_ ? kHalfMost : kHuge;
    for (int c = 0; c < kCount; ++c)
      for (int i = 0; i < kLanes; ++i) {  // without branches: they take longer than the sums
        const float scale = candidates[c].scale[i], zero = candidates[c].zero[i];
        const float size = size_of(scale), reach = top_ - zero > zero ? top_ - zero : zero;
        const int better = (errors[c][i] < least_[i]) & (size >= kTiny) & (size * reach <= most);
        least_[i] = better ? errors[c][i] : least_[i];
        best_.scale[i] = better ? scale : best_.scale[i];
        best_.zero[i] = better ? zero : best_.zero[i];
        taken += better;
      }
    return taken;
  }

  // With the scales of least squared error for the levels that the best so far give.
  Candidate fitted() const {
    Lanes products = {}, squares = {}, inverse;
    for (int i = 0; i < kLanes; ++i) inverse[i] = 1 / best_.scale[i];
    for (int64_t e = 0; e < size_; ++e)
      for (int i = 0; i < kLanes; ++i) {
        const float w = w_[e * kLanes + i], v = level(w * inverse[i], best_.zero[i]);
        const float part = h_[e * kLanes + i] * v;
        products[i] = fma(part, w, products[i]);
        squares[i] = fma(part, v, squares[i]);
      }
    Candidate found = best_;
    for (int i = 0; i < kLanes; ++i)
      if (squares[i] > 0) found.scale[i] = products[i] / squares[i];
    return found;
  }

  const Candidate& best() const { return best_; }
  float top() const { return top_; }

  // The level of a weight in units of the scale, less the zero point.
  float level(float units, float zero) const {
    return whole_number(limited(units, -zero, top_ - zero));
  }

 private:
  template <int kCount>
  void measure(const Candidate* candidates, Lanes* errors) const {
    Lanes inverse[kCount], sums[kCount];
    for (int c = 0; c < kCount; ++c)
      for (int i = 0; i < kLanes; ++i) inverse[c][i] = 1 / candidates[c].scale[i], sums[c][i] = 0;
    for (int64_t e = 0; e < size_; ++e) {
#pragma GCC unroll 8
      for (int c = 0; c < kCount; ++c)
        for (int i = 0; i < kLanes; ++i) {
          const float w = w_[e * kLanes + i];
          const float v = level(w * inverse[c][i], candidates[c].zero[i]);
          const float off = fma(-v, candidates[c].scale[i], w);
          sums[c][i] = fma(off * h_[e * kLanes + i], off, sums[c][i]);
        }
    }
    for (int c = 0; c < kCount; ++c)
      for (int i = 0; i < kLanes; ++i) errors[c][i] = sums[c][i];
  }

  const float *w_, *h_;
  const int64_t size_;
  const float top_;
  const bool half_;
  Candidate best_;
  Lanes least_;
};

void try_symmetric(Blocks& blocks, const Candidate& first, float fraction) {
  Candidate both[2] = {first, first};
  for (int i = 0; i < kLanes; ++i) {
    both[0].scale[i] = first.scale[i] * fraction;
    both[1].scale[i] = -both[0].scale[i];
  }
  blocks.attempt<2>(both);
}

// Zero points around the one that keeps the middle of the range in the middle of the levels.
void try_asymmetric(Blocks& blocks, const Candidate& first, float fraction) {
  const float top = blocks.top();
  Candidate near[3];
  for (int i = 0; i < kLanes; ++i) {
    const float middle = whole_number((first.zero[i] - top / 2) / fraction + top / 2);
    for (int c = 0; c < 3; ++c) {
      near[c].scale[i] = first.scale[i] * fraction;
      near[c].zero[i] = limited(middle - 1 + c, 0, top);
    }
  }
  blocks.attempt<3>(near);
}

void search(const float* weights, const float* importance, int64_t rows, int64_t blocks,
            int64_t block, int bits, int symmetric, bool half, float* scales, float* zeros,
            uint8_t* levels) {
  const Memory<float> w(block * kLanes), h(block * kLanes);
  for (int64_t from = 0; from < rows * blocks; from += kLanes) {
    const auto own = [&](int lane) { return lesser(from + lane, rows * blocks - 1); };
    Candidate first;
    for (int i = 0; i < kLanes; ++i) {
      first.scale[i] = scales[own(i)], first.zero[i] = zeros[own(i)];
      const float* weight = weights + own(i) * block;
      const float* weighs = importance ? importance + own(i) % blocks * block : nullptr;
      for (int64_t e = 0; e < block; ++e) {
        w[e * kLanes + i] = weight[e];
        h[e * kLanes + i] = weighs ? weighs[e] : 1.0f;
      }
    }
    Blocks some(w.data(), h.data(), block, bits, half);
    some.start(first);
    for (int i = 0; i < kFractions; ++i)
      (symmetric ? try_symmetric : try_asymmetric)(some, first, fraction(bits, i));
    for (int i = 0; i < kRefits; ++i) {
      Candidate fitted = some.fitted();
      if (!some.attempt<1>(&fitted)) break;
    }
    for (int i = 0; i < kLanes && from + i < rows * blocks; ++i) {
      const float scale = some.best().scale[i], zero = some.best().zero[i], inverse = 1 / scale;
      scales[from + i] = scale, zeros[from + i] = zero;
      uint8_t* to = levels + (from + i) * block;
      for (int64_t e = 0; e < block; ++e)
        to[e] = static_cast<uint8_t>(some.level(w[e * kLanes + i] * inverse, zero) + zero);
    }
  }
}

}  // namespace
}  // namespace rgexport
